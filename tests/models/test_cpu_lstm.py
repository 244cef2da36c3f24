"""The forward and backward pass of the LSTM for training on a CPU equal those of torch."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from knowledge_boosting.models import compiled, cpu_lstm
from knowledge_boosting.models.compiled import required_library
from knowledge_boosting.models.config import FixedDelay, NetworkSize, Pair
from knowledge_boosting.models.cpu_lstm import FREQUENCY, TIME
from knowledge_boosting.models.pair import BoostedPair
from knowledge_boosting.models.tfgridnet import torch_residual_lstm
from tests.models.compiled import assert_near, builds, needs_compiler, outcome, set_build, torch_threads

pytestmark = needs_compiler


def layers(channels: int, units: int, *, bidirectional: bool) -> tuple[nn.LayerNorm, nn.LSTM, nn.Linear]:
    norm, lstm = nn.LayerNorm(channels), nn.LSTM(channels, units, bidirectional=bidirectional)
    return norm, lstm, nn.Linear(units * (1 + bidirectional), channels)


def by_torch(
    x: Tensor, axis: int, norm: nn.LayerNorm, lstm: nn.LSTM, linear: nn.Linear, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the formula for one sequence of features ``[B, T, F, D]`` after another."""
    others = x.unbind(3 - axis)
    parts = x.shape[0], len(others)
    columns = []
    states: list[list[Tensor]] = [[], []]
    for index, sequence in enumerate(others):
        own = (state.unflatten(1, parts)[:, :, index].contiguous() for state in (hidden, cell))
        y, (last_hidden, last_cell) = lstm(norm(sequence).transpose(0, 1), tuple(own))
        columns.append(sequence + linear(y).transpose(0, 1))
        states[0].append(last_hidden)
        states[1].append(last_cell)
    last = [torch.stack(each, dim=2).flatten(1, 2) for each in states]
    return torch.stack(columns, dim=3 - axis), last[0], last[1]


@pytest.mark.parametrize("build", builds())
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("shape", "units", "axis", "bidirectional"),
    [
        ((2, 7, 97, 16), 16, FREQUENCY, True),
        ((1, 97, 9, 32), 32, TIME, False),
        ((2, 3, 5, 64), 64, FREQUENCY, True),
        ((3, 20, 2, 16), 48, TIME, False),
        ((1, 1, 5, 48), 16, TIME, True),
    ],
)
def test_outputs_states_and_gradients_equal_those_of_torch(
    shape: tuple[int, int, int, int],
    units: int,
    axis: int,
    bidirectional: bool,
    threads: int,
    build: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_build(build, monkeypatch)
    torch.manual_seed(0)
    modules = layers(shape[3], units, bidirectional=bidirectional)
    weights = [weight for module in modules for weight in module.parameters()]
    for weight in weights:
        nn.init.normal_(weight, std=0.3)  # large enough for gates to open and close
    x = torch.randn(shape, requires_grad=True)
    sequences = shape[0] * shape[3 - axis]
    states = [torch.randn(1 + bidirectional, sequences, units, requires_grad=True) for _ in range(2)]
    inputs = (x, *states, *weights)
    expected = outcome(by_torch(x, axis, *modules, *states), inputs)
    with torch_threads(threads):
        actual = outcome(cpu_lstm.residual_lstm(x, axis, *modules, *states), inputs)
    assert_near(actual, expected)


def test_nan_inputs_give_nan_outputs() -> None:
    x = torch.zeros(1, 3, 2, 16)
    x[0, 1, 0, 0] = torch.nan
    zeros = torch.zeros(1, 2, 16)
    y, _, _ = cpu_lstm.residual_lstm(x, TIME, *layers(16, 16, bidirectional=False), zeros, zeros)
    assert y[0, 0].isfinite().all()
    assert y[0, 1:, 0].isnan().all()
    assert y[0, :, 1].isfinite().all()


@pytest.mark.parametrize("build", builds())
@pytest.mark.parametrize("scale", [1e3, -1e3, 1e30, -1e30])
def test_sums_of_any_size_saturate(scale: float, build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_build(build, monkeypatch)
    modules = layers(16, 16, bidirectional=False)
    nn.init.constant_(modules[0].bias, scale)
    x, zeros = torch.randn(1, 2, 1, 16), torch.zeros(1, 1, 16)
    actual = cpu_lstm.residual_lstm(x, TIME, *modules, zeros, zeros)
    for one, other in zip(actual, by_torch(x, TIME, *modules, zeros, zeros), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_gradients_of_some_outputs_can_be_computed_repeatedly() -> None:
    modules = layers(16, 16, bidirectional=False)
    x, zeros = torch.randn(1, 3, 2, 16, requires_grad=True), torch.zeros(1, 2, 16)
    y, _, cell = cpu_lstm.residual_lstm(x, TIME, *modules, zeros, zeros)
    expected_y, _, expected_cell = by_torch(x, TIME, *modules, zeros, zeros)
    for output, expected in ((y, expected_y), (y, expected_y), (cell, expected_cell)):
        gradients = torch.autograd.grad(output.sum(), x, retain_graph=True)
        assert_near([*gradients], [*torch.autograd.grad(expected.sum(), x, retain_graph=True)])


def test_unsupported_inputs_are_left_to_torch() -> None:
    assert not cpu_lstm.fits(torch.zeros(1, 2, 2, 12), nn.LSTM(12, 16))
    assert not cpu_lstm.fits(torch.zeros(1, 2, 2, 16), nn.LSTM(16, 8))
    assert not cpu_lstm.fits(torch.zeros(1, 2, 2, 16, dtype=torch.float64), nn.LSTM(16, 16))
    with torch.autocast("cpu"):
        assert not cpu_lstm.fits(torch.zeros(1, 2, 2, 16), nn.LSTM(16, 16))


def instructions() -> str:
    return str(required_library().instructions().decode())


class Counted:
    """An implementation that counts its calls, and computes everything ``times`` times."""

    def __init__(self, way: cpu_lstm.ResidualLstm, times: int = 1) -> None:
        self.calls = 0
        self._way, self._times = way, times

    def __call__(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.calls += 1
        results = [self._way(*arguments) for _ in range(self._times)]
        y, hidden, cell = (torch.stack(each).mean(0) for each in zip(*results, strict=True))
        return y, hidden, cell


@pytest.mark.parametrize("slow", ["ours", "torch"])
def test_the_faster_implementation_is_used(slow: str) -> None:
    ours = Counted(cpu_lstm.residual_lstm, 20 if slow == "ours" else 1)
    torchs = Counted(torch_residual_lstm, 20 if slow == "torch" else 1)
    faster = cpu_lstm.FasterLstm(ours, torchs)
    modules, x, zeros = layers(16, 16, bidirectional=False), torch.randn(1, 4, 2, 16), torch.zeros(1, 2, 16)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    faster(x, TIME, *modules, zeros, zeros)
    assert torch.equal(torch.rand(1), expected)  # the measurement does not affect the random numbers
    before = ours.calls, torchs.calls
    for _ in range(3):
        faster(x, TIME, *modules, zeros, zeros)
    assert (ours.calls - before[0], torchs.calls - before[1]) == ((0, 3) if slow == "ours" else (3, 0))
    description = faster.describe(modules[1])
    assert description.startswith("torch, " if slow == "ours" else "the C++ library with ")
    assert description.endswith(
        "times as fast as the C++ library with " + instructions() if slow == "ours" else "torch"
    )


def test_without_gradients_torch_is_used_unless_whole_signals_are_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_for_whole_signals", False)
    zeros = torch.zeros(1, 2, 16)
    modules = layers(16, 16, bidirectional=False)

    def calls(frames: int) -> tuple[int, int]:
        """Return how often ours and torch's are called after the measurement, where torch's is slow."""
        ours, torchs = Counted(cpu_lstm.residual_lstm), Counted(torch_residual_lstm, 20)
        faster = cpu_lstm.FasterLstm(ours, torchs)
        with torch.no_grad():
            faster(torch.zeros(1, frames, 2, 16), TIME, *modules, zeros, zeros)
            before = ours.calls, torchs.calls
            faster(torch.zeros(1, frames, 2, 16), TIME, *modules, zeros, zeros)
        return ours.calls - before[0], torchs.calls - before[1]

    assert calls(100) == (0, 1)
    compiled.use_for_whole_signals()
    assert calls(100) == (1, 0)
    assert calls(1) == (0, 1)  # one frame of a stream


def test_whole_signals_give_the_same_with_and_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    size = NetworkSize(channels=16, hidden=16, blocks=1, self_attention=True)
    config = Pair(task="ss", small=size, large=size, boosting=FixedDelay(delay=6))
    pair = BoostedPair(config).eval()
    mixture = 0.1 * torch.randn(1, 2, 16000)
    outputs = []
    for wanted in (False, True):
        monkeypatch.setattr(compiled, "_for_whole_signals", wanted)
        with torch.inference_mode():
            outputs.append(pair(mixture))
    assert (outputs[0].small - outputs[1].small).abs().max() < 1e-5
    assert (outputs[0].large - outputs[1].large).abs().max() < 1e-5
    assert not torch.equal(outputs[0].large, outputs[1].large)  # they were computed in two ways
