"""A device that knows a bundle by its document alone gives what ours gives."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.processes import environment

EXAMPLES = Path(__file__).parent.parent / "examples"
PRETRAINED = Path(__file__).parent.parent / "models" / "pretrained"
BUNDLES = sorted(path.name for path in (EXAMPLES / "vectors").iterdir())


def device(bundle: Path, vectors: Path) -> "subprocess.CompletedProcess[str]":
    """The example, which must do without this project."""
    script = (
        "import runpy, sys; sys.modules['knowledge_boosting'] = None\n"
        f"sys.argv = ['device.py', {str(bundle)!r}, {str(vectors)!r}]\n"
        f"runpy.run_path({str(EXAMPLES / 'device.py')!r}, run_name='__main__')\n"
    )
    call = [sys.executable, "-c", script]
    return subprocess.run(call, env=environment(), capture_output=True, text=True, check=False)


def test_there_are_vectors_of_both_tasks() -> None:
    assert BUNDLES == ["ss-compact", "tse-48ms-compact"]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_device_in_the_example_reproduces_the_vectors(bundle: str, tmp_path: Path) -> None:
    result = device(PRETRAINED / bundle, EXAMPLES / "vectors" / bundle)
    assert result.returncode == 0, result.stderr
    assert "over 60 frames" in result.stdout

    other = tmp_path / "other"
    shutil.copytree(EXAMPLES / "vectors" / bundle, other)
    output = np.fromfile(other / "output.f32", "<f4")
    output[len(output) // 2] += 1e-3
    output.tofile(other / "output.f32")
    assert device(PRETRAINED / bundle, other).returncode == 1


@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_vectors_are_what_our_device_gives(bundle: str, tmp_path: Path) -> None:
    call = [sys.executable, str(EXAMPLES / "make_vectors.py"), bundle, str(tmp_path)]
    subprocess.run(call, env=environment(), check=True)
    kept = json.loads((EXAMPLES / "vectors" / bundle / "vectors.json").read_text())
    assert json.loads((tmp_path / "vectors.json").read_text()) == kept
    assert 0 < len(kept["hints_at_and_age"]) < 54  # some are missing
    for name in kept["shapes"]:
        made, there = (
            np.fromfile(folder / f"{name}.f32", "<f4") for folder in (tmp_path, EXAMPLES / "vectors" / bundle)
        )
        np.testing.assert_allclose(made, there, atol=1e-5)
