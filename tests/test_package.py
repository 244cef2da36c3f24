"""What is built and installed: one package, which works beside anybody's folders."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.processes import COMMANDS, environment

ROOT = Path(__file__).parent.parent
PACKAGE = "knowledge_boosting"
LICENCES = ("LICENSE", "samples/LICENSE.txt", "samples/hrtf/LICENSE.txt", "samples/speech/LICENSE.txt")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist, and with the wheel that this sdist gives."""
    source, unpacked, folder = (tmp_path_factory.mktemp(name) for name in ("source", "unpacked", "built"))
    for room in (PACKAGE, "samples", *(path.name for path in (ROOT / PACKAGE).iterdir() if path.is_symlink())):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / room, source / room, symlinks=True, ignore=ignored, dirs_exist_ok=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "tests/training/speech/LICENSE.txt"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    shutil.copy(__file__, source / "tests")
    for step in ("build_sdist", "build_wheel"):
        script = f"import setuptools.build_meta as backend; backend.{step}({str(folder)!r})"
        result = subprocess.run([sys.executable, "-c", script], cwd=source, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        if step == "build_sdist":
            (sdist,) = folder.glob("*.tar.gz")
            with tarfile.open(sdist) as archive:
                archive.extractall(unpacked, filter="data")
            (source,) = unpacked.iterdir()
    return folder


def names(built: Path) -> list[str]:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_has_one_package_and_all_that_it_reads(built: Path) -> None:
    tops = {name.partition("/")[0] for name in names(built)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {PACKAGE}
    inside = {name.removeprefix(f"{PACKAGE}/") for name in names(built)}
    needed = ["py.typed", *(f"models/{name}" for name in ("cpu_lstm.cpp", "vectors.h")), "protos/hints.proto"]
    pretrained = (ROOT / "models" / "pretrained").rglob("*")
    needed += [path.relative_to(ROOT).as_posix() for path in pretrained if path.is_file()]
    assert set(needed) <= inside
    rooms = [path.name for path in (ROOT / PACKAGE).iterdir() if path.is_symlink()]
    modules = {path.relative_to(ROOT).as_posix() for room in rooms for path in (ROOT / room).rglob("*.py")}
    assert modules <= inside


def test_both_carry_the_licences_and_no_tests(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        source = [name.partition("/")[2] for name in archive.getnames()]
    for licence in LICENCES:
        assert licence in source
        assert any(name.endswith(f".dist-info/licenses/{licence}") for name in names(built))
    assert not [name for name in (*source, *names(built)) if name.startswith("tests/") and name.endswith(".py")]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_commands_work_in_a_folder_that_has_modules_of_the_rooms_names(
    command: str, built: Path, tmp_path: Path
) -> None:
    site, here = tmp_path / "site", tmp_path / "here"
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for room in ("common", "device_client", "models", "protos", "remote_server", "training"):
        (here / room).mkdir(parents=True)
        (here / room / "__init__.py").write_text("raise RuntimeError('somebody else\\'s')\n")
    script = (
        f"import sys, {PACKAGE}; sys.argv[0] = {command!r}; assert {PACKAGE}.__file__.startswith({str(site)!r})\n"
        f"from {PACKAGE}.common import start; start.{command.replace('-', '_')}()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, "--help"],
        cwd=here,
        env=environment() | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert f"Usage: {command}" in result.stdout
