"""benchmarks/on_gpu.sh, in a rehearsal on the CPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import on_gpu
from knowledge_boosting.common.errors import Failure
from knowledge_boosting.training.data.responses import write_bank

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*arguments: object, module: str | None = None) -> "subprocess.CompletedProcess[str]":
    call = [sys.executable, "-m", module] if module else [ROOT / "benchmarks/on_gpu.sh"]
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.run(
        [*map(str, call), *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )


def results(out: Path, part: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / f"{part}.json").read_text())
    return content


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training data in a small folder."""
    folder = tmp_path_factory.mktemp("packed")
    rng = np.random.default_rng(0)
    responses = rng.normal(0, 1, (8, 2, 2, 400)) * np.exp(-np.arange(400) / 60)
    write_bank(folder / "bank.safetensors", responses.astype(np.float32), ["head"] * 8)
    (folder / "noise").mkdir()
    speech = ROOT / "tests/training/speech"
    shutil.copy(next(speech.glob("*.ogg")), folder / "noise")
    result = run(
        *("pack", folder / "data", "--speech", speech, "--noise", folder / "noise"),
        *("--responses", folder / "bank.safetensors"),
        module="benchmarks.gpu_data",
    )
    assert result.returncode == 0, result.stderr
    return folder / "data"


def test_the_check(tmp_path: Path) -> None:
    result = run("check", tmp_path / "out", "--device", "cpu", "--minutes", 10, "--small")
    assert result.returncode == 0, result.stderr
    written = results(tmp_path / "out", "check")
    assert written["tests"] == "passed"
    assert 7 < written["si_sdri_db"]["float32"] < 9


def test_the_measurement_of_the_server(tmp_path: Path) -> None:
    result = run("serve", tmp_path / "out", "--device", "cpu", "--minutes", 5, "--small")
    assert result.returncode == 0, result.stderr
    written = results(tmp_path / "out", "serve")
    assert list(written["steps"]["float32"]) == ["1", "2", "4"]
    assert any("lstm" in line for line in written["profile"])
    assert written["sessions"] == "sessions.json"
    assert json.loads((tmp_path / "out/sessions.json").read_text())["steps"]


def test_training_continues_from_its_own_checkpoint(packed: Path, tmp_path: Path) -> None:
    before = 0
    for _ in range(2):
        result = run("train", tmp_path / "out", "--device", "cpu", "--minutes", 1, "--small", "--data", packed)
        assert result.returncode == 0, (result.stderr, (tmp_path / "out/train.log").read_text())
        written = results(tmp_path / "out", "train")
        assert written["updates"]["before"] == before
        assert written["updates"]["now"] > before
        steps = [step for step, _ in written["curve"]["validation/si_sdri"]]
        assert steps == sorted(set(steps))
        assert steps[-1] >= before
        assert not before or steps[0] < before  # the curve of the first call is still there
        before = written["updates"]["now"]
    assert torch.load(tmp_path / "out/last.ckpt", weights_only=True)["global_step"] == before
    size = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*"))
    assert len(list((tmp_path / "out").rglob("*"))) <= 8
    assert size < 16 * 2**20


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    result = run("serve", tmp_path / "out")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "warning: --device cuda: this machine has 0 CUDA devices; try --device cpu\n"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run("check", tmp_path / "file/out", "--device", "cpu")
    assert result.returncode == 2
    assert "cannot write there" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_what_was_measured_before_the_memory_was_full_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = on_gpu.step_times

    def too_many(model: Any, sessions: int, steps: int) -> dict[str, float]:
        if sessions > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return measure(model, sessions, steps)

    monkeypatch.setattr(on_gpu, "step_times", too_many)
    on_gpu.serve(on_gpu.Part("serve", tmp_path, "cpu", 2, small=True))
    steps = results(tmp_path, "serve")["steps"]["float32"]
    assert list(steps) == ["1", "2", "4"]
    assert steps["4"] == "not enough memory"


def test_packed_corpora_stay_apart_and_lack_all_voices_of_excluded_speakers(packed: Path, tmp_path: Path) -> None:
    utterance = next((ROOT / "tests/training/speech").glob("*.ogg"))
    for voice in ("one/anna", "one/anna~1", "one/bert", "other/cleo"):
        (tmp_path / voice).mkdir(parents=True)
        shutil.copy(utterance, tmp_path / voice / "speech.ogg")
    (tmp_path / "excluded.txt").write_text("anna\n")
    speech = ["--speech", tmp_path / "one", "--speech", tmp_path / "other", "--excluded", tmp_path / "excluded.txt"]
    room = ["--noise", packed / "noise", "--responses", packed.parent / "bank.safetensors"]
    result = run("pack", tmp_path / "packed", *speech, *room, module="benchmarks.gpu_data")
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "packed/speech"
    assert {path.parent.relative_to(folder).as_posix() for path in folder.rglob("*.opus")} == {"0/bert", "1/cleo"}


def test_extraction_cannot_be_trained_on_packed_data(packed: Path, tmp_path: Path) -> None:
    stage = ["--stage", "tse-large"]
    result = run("train", tmp_path / "out", "--device", "cpu", "--minutes", 1, "--small", "--data", packed, *stage)
    assert result.returncode == 2
    assert result.stderr == "warning: --stage tse-large: needs speaker embeddings, which the packed data do not have\n"


@pytest.mark.parametrize("damage", ["no such folder", "another folder", "damaged responses"])
def test_a_folder_without_packed_data_is_named(packed: Path, tmp_path: Path, damage: str) -> None:
    data = tmp_path / "data"
    if damage == "another folder":
        data.mkdir()
    elif damage == "damaged responses":
        shutil.copytree(packed, data)
        content = bytearray((data / "responses.npz").read_bytes())
        content[len(content) // 2] ^= 255
        (data / "responses.npz").write_bytes(content)
    for arguments, module in (
        (("train", tmp_path / "out", "--device", "cpu", "--data", data), None),
        (("unpack", data, tmp_path / "unpacked"), "benchmarks.gpu_data"),
    ):
        result = run(*arguments, module=module)
        assert result.returncode == 2
        assert result.stderr.startswith(f"warning: {data}: not a folder that")
        assert len(result.stderr.splitlines()) == 1


def test_without_time_for_an_update_training_says_so(packed: Path, tmp_path: Path) -> None:
    part = on_gpu.Part("train", tmp_path, "cpu", 0, small=True)
    with pytest.raises(Failure, match="no update was made"):
        on_gpu.train(part, packed, on_gpu.STAGE)
