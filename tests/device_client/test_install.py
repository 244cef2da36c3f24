"""Test for the client's installation on a device without torch."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.golden_cases import TOLERANCE, Golden, worst
from tests.processes import EXACT, Server

ROOT = Path(__file__).parent.parent.parent
NAME = "tse_delay6"


@pytest.mark.slow
def test_a_device_without_torch_replays_with_a_server(
    golden: Callable[[str], Golden], golden_bundle: Callable[[str], Path], tse_server: Server, tmp_path: Path
) -> None:
    case, bundle = golden(NAME), tmp_path / "bundle"
    bundle.mkdir()
    for file in ("bundle.json", "small.onnx", "small.safetensors"):  # the files that a device needs
        (bundle / file).write_bytes((golden_bundle(NAME) / file).read_bytes())
    soundfile.write(tmp_path / "mixture.wav", case.mixture[0].numpy().T, 16000, subtype="FLOAT")
    assert case.speaker_embedding is not None
    np.save(tmp_path / "speaker.npy", case.speaker_embedding[0].numpy())

    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    programs = tmp_path / "venv" / "bin"
    install = [str(programs / "pip"), "install", "--quiet", "--constraint", "constraints.txt", ".[client]"]
    installed = subprocess.run(install, cwd=ROOT, capture_output=True, text=True, check=False)
    assert installed.returncode == 0, installed.stderr

    import_torch = [str(programs / "python"), "-c", "import torch"]
    assert subprocess.run(import_torch, cwd=tmp_path, capture_output=True, check=False).returncode == 1
    call = [programs / "kb-client", "replay", "mixture.wav", "-o", "out.wav", "--bundle", "bundle"]
    call += ["--server", tse_server.address, "--enrollment", "speaker.npy", "--output-format", "float", *EXACT]
    result = subprocess.run([*map(str, call)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    output = soundfile.read(tmp_path / "out.wav", dtype="float32", always_2d=True)[0].T
    assert worst(output[None], case.small_output[0]) < TOLERANCE
