"""A command whose extra is not installed says which one it needs."""

import functools
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest

from tests.processes import COMMANDS

ROOT = Path(__file__).parent.parent
# As if these were not there, before anything is imported; then the entry point that is installed.
WITHOUT = (
    "import importlib, sys\n"
    "class Missing:\n"
    "    names = set(sys.argv.pop(1).split(','))\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name.partition('.')[0] in self.names:\n"
    "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
    "sys.meta_path.insert(0, Missing())\n"
    "importlib.import_module(sys.argv.pop(1)).main()\n"
)


def distributions(extra: str | None) -> set[str]:
    """The distributions that come without any extra, or with one."""
    found, left = set[str](), ["knowledge-boosting"]
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found:
            continue
        found.add(name)
        try:
            needed = requires(name) or []
        except PackageNotFoundError:  # for another system or version of Python
            continue
        own = [need for need in needed if name == "knowledge-boosting" and f'extra == "{extra}"' in need]
        own += [need for need in needed if "extra ==" not in need]
        left += [re.split(r"[\s;<>=!~\[(]", need)[0] for need in own]
    return found


@functools.cache
def missing(extra: str | None) -> str:
    """Every module that is installed here and not part of the base or of one extra, with commas between."""
    own = distributions(extra)
    modules = {
        module
        for module, names in packages_distributions().items()
        if module not in sys.stdlib_module_names and not {re.sub(r"[-_.]+", "-", name).lower() for name in names} & own
    }
    assert {"torch", "lightning", "pyworld"} <= modules
    assert ("soundfile" in modules) == (extra is None)
    assert not {"typer", "grpc", "numpy", "rich", "google", "pydantic"} & modules
    return ",".join(sorted(modules))


CALLS = {
    "kb-client replay samples/mixture.flac -o made.wav": "client",
    "kb-client bench": "client",
    "kb-server --port 0": "server",
    "kb-server status localhost:1": "server",
    "kb-export --untrained --config configs/demo/ss-48ms.json -o made": "server",
    "kb-train --config configs/demo/train-ss-large.json --run_dir made": "train",
    "kb-evaluate ss-alone --data samples -o made": "train",
    "kb-make-dataset --speech samples/speech/valid --sofa samples/hrtf/mit_kemar_normal_pinna.sofa --task ss --val 2 "
    "-o made": "train",
    "kb-make-voices --speech samples/speech/valid --output made": "train",
    "kb-store-hints --config configs/demo/train-ss-joint.json --items 1 --output made": "train",
}


def test_every_command_is_tried() -> None:
    assert {call.split()[0] for call in CALLS} == set(COMMANDS)


@pytest.mark.parametrize(("call", "extra"), CALLS.items(), ids=[" ".join(call.split()[:2]) for call in CALLS])
def test_a_command_says_which_extra_it_needs(call: str, extra: str, tmp_path: Path) -> None:
    """Without any extra, and where only a device's is installed."""
    name, *arguments = call.split()
    arguments = [str(ROOT / argument) if (ROOT / argument).exists() else argument for argument in arguments]
    settings = {"PYTHONPATH": str(ROOT)}
    device_can = extra == "client" or "status" in call
    for installed in (None,) if device_can else (None, "client"):
        script = [sys.executable, "-c", WITHOUT, missing(installed), COMMANDS[name], *arguments]
        result = subprocess.run(script, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False)
        assert result.returncode == 1, result.stderr
        line = rf"{name}: error: the package \w+ is not installed; run pip install 'knowledge-boosting\[{extra}\]'\n"
        assert re.fullmatch(line, result.stderr), result.stderr
        assert not list(tmp_path.iterdir())
