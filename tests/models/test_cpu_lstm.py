"""The LSTM for training on a CPU against torch's own, forward and back."""

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import cpu_lstm
from models.compiled import library

needs_compiler = pytest.mark.skipif(library() is None, reason="no C++ compiler that serves, torch's own LSTM is used")


def builds() -> dict[str, str]:
    """Instruction sets that this processor has, and the compiler's name for what has them."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {"NEON": "native"}
    capability = torch.backends.cpu.get_cpu_capability()
    found = {"SSE": "x86-64"}
    if capability in ("AVX2", "AVX512"):
        found["AVX2"] = "x86-64-v3"
    if capability == "AVX512":
        found["AVX-512"] = "x86-64-v4"
    return found


@pytest.fixture(params=builds())
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled part as another processor would have it."""
    monkeypatch.setenv("CXXFLAGS", f"-march={builds()[request.param]}")
    compiled = library()
    assert compiled is not None
    assert compiled.instructions().decode() == request.param


def outcome(outputs: tuple[Tensor, Tensor, Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs, and the gradients of a random weighting of all of them."""
    generator = torch.Generator().manual_seed(1)
    total = sum((torch.randn(output.shape, generator=generator) * output).sum() for output in outputs)
    assert isinstance(total, Tensor)
    return [*(output.detach() for output in outputs), *torch.autograd.grad(total, inputs)]


@needs_compiler
@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("steps", "sequences", "size", "units", "bidirectional"),
    [
        (97, 25, 16, 16, True),
        (1, 97, 32, 32, False),
        (30, 13, 64, 64, True),
        (20, 7, 16, 48, False),
        (5, 1, 48, 16, True),
    ],
)
def test_outputs_states_and_gradients_equal_torch_s(
    steps: int, sequences: int, size: int, units: int, bidirectional: bool, threads: int
) -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(size, units, bidirectional=bidirectional)
    for weight in lstm.parameters():
        nn.init.normal_(weight, std=0.3)  # gates that open and close
    directions = 1 + bidirectional
    x = torch.randn(steps, sequences, size, requires_grad=True)
    hidden, cell = (torch.randn(directions, sequences, units, requires_grad=True) for _ in range(2))
    inputs = (x, hidden, cell, *lstm.parameters())
    y, (last_hidden, last_cell) = lstm(x, (hidden, cell))
    expected = outcome((y, last_hidden, last_cell), inputs)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = outcome(cpu_lstm.lstm(x, hidden, cell, lstm.all_weights), inputs)
    finally:
        torch.set_num_threads(before)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1.0, float(other.abs().max())))


@needs_compiler
def test_inputs_that_are_no_numbers_come_out_as_such() -> None:
    lstm = nn.LSTM(16, 16)
    x = torch.zeros(3, 2, 16)
    x[1, 0, 0] = torch.nan
    y, _, _ = cpu_lstm.lstm(x, torch.zeros(1, 2, 16), torch.zeros(1, 2, 16), lstm.all_weights)
    assert y[0].isfinite().all()
    assert y[1:, 0].isnan().all()
    assert y[:, 1].isfinite().all()


@needs_compiler
def test_sums_of_any_size_saturate() -> None:
    lstm = nn.LSTM(16, 16)
    for scale in (1e3, -1e3, 1e30, -1e30):
        x = torch.full((2, 1, 16), scale)
        y, _, cell = cpu_lstm.lstm(x, torch.zeros(1, 1, 16), torch.zeros(1, 1, 16), lstm.all_weights)
        expected, (_, expected_cell) = lstm(x)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(cell, expected_cell, rtol=0, atol=1e-6)


@needs_compiler
def test_gradients_are_computed_once() -> None:
    lstm = nn.LSTM(16, 16)
    zeros = torch.zeros(1, 2, 16)
    y, _, _ = cpu_lstm.lstm(torch.randn(3, 2, 16), zeros, zeros, lstm.all_weights)
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="computed already"):
        y.sum().backward()


def test_sizes_it_is_not_made_for_are_left_to_torch() -> None:
    assert not cpu_lstm.fits(torch.zeros(2, 2, 12), 16)
    assert not cpu_lstm.fits(torch.zeros(2, 2, 16), 8)
    assert not cpu_lstm.fits(torch.zeros(2, 2, 16, dtype=torch.float64), 16)


def test_without_a_compiler_training_goes_on_and_says_that_it_is_slower(tmp_path: Path) -> None:
    script = (
        "import torch\n"
        "from models.config import NetworkSize\n"
        "from models.layers import window_of\n"
        "from models.tfgridnet import GridNetBlock\n"
        "block = GridNetBlock(NetworkSize(channels=16, hidden=16), 97)\n"
        "for _ in range(2):\n"
        "    y, _ = block(torch.randn(1, 4, 97, 16), block.initial_state(1, 97), window_of(torch.zeros(1), 4, 50))\n"
        "    y.sum().backward()\n"
        "assert block.intra_lstm.weight_ih_l0.grad.abs().sum() > 0\n"
    )
    environment = {"CXX": str(tmp_path / "none"), "PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("training on this CPU takes two to four times as long") == 1
    assert "install one, or name it in CXX" in result.stderr


@needs_compiler
def test_the_faster_one_is_taken() -> None:
    def slow(lstm: cpu_lstm.Lstm) -> cpu_lstm.Lstm:
        """One that computes everything twenty times."""

        def run(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
            results = [lstm(*arguments) for _ in range(20)]
            y, hidden, cell = (torch.stack(each).mean(0) for each in zip(*results, strict=True))
            return y, hidden, cell

        return run

    assert cpu_lstm.measure_speedup(slow(cpu_lstm.lstm), cpu_lstm.torch_lstm, 16, 16) < 0.5
    assert cpu_lstm.measure_speedup(cpu_lstm.lstm, slow(cpu_lstm.torch_lstm), 16, 16) > 2
