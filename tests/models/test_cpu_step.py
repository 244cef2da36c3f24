"""Compiled steps equal those of torch, for all sizes, streams, policies and instruction sets."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from knowledge_boosting.models import slots
from knowledge_boosting.models.arrivals import MERGES, Hint
from knowledge_boosting.models.compiled import STEP
from knowledge_boosting.models.config import MODEL, FixedDelay, ModelConfig, NetworkSize, Pair
from knowledge_boosting.models.cpu_step import SmallNetwork, SmallStep
from knowledge_boosting.models.pair import LargeModel, LargeState, SmallModel, torch_hints
from knowledge_boosting.models.slots import CompiledStep, StateSlots
from tests.models.compiled import builds, needs_compiler, set_build, torch_threads

pytestmark = needs_compiler
STREAMS, FRAMES = 8, 24
SIZES: dict[str, dict[str, Any]] = {
    "compact": {"channels": 32, "hidden": 32, "heads": 4, "self_attention": True},
    "odd": {"channels": 20, "hidden": 12, "heads": 4, "self_attention": True, "blocks": 2},
    "tiny": {"channels": 4, "hidden": 4, "blocks": 1},
}


def large_model(size: str, *, task: str = "ss", running_level: bool = False, window: int = 7) -> LargeModel:
    """Make a network of random weights, also where those of a new network are zeros and ones."""
    small = NetworkSize(channels=4, hidden=4, blocks=1)
    network = NetworkSize(**SIZES[size], window=window)
    config = Pair.model_validate(
        {
            "task": task,
            "small": small,
            "large": network,
            "boosting": FixedDelay(delay=6),
            "running_level": running_level,
        }
    )
    torch.manual_seed(0)
    model = LargeModel(config).eval()
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return model


def speakers(model: LargeModel, count: int) -> Tensor | None:
    return torch.randn(count, 256) / 16 if model.config.needs_speaker else None


@torch.inference_mode()
def states(model: LargeModel) -> LargeState:
    """Return the states of new streams, and of one more that must not be touched."""
    torch.manual_seed(1)
    initial = model.initial_state(STREAMS + 1, speakers(model, STREAMS + 1))
    return slots.map_state(initial, lambda tensor: tensor.clone(memory_format=torch.contiguous_format))


@torch.inference_mode()
def check_equal(model: LargeModel) -> None:
    """Compare streams in random groups with whole signals."""
    rng, stacked = random.Random(0), states(model)
    untouched = [tensor[STREAMS].clone() for tensor in slots.state_tensors(stacked)]
    framing = model.config.framing
    samples = 0.1 * torch.randn(STREAMS, 2, FRAMES * framing.chunk + framing.lookahead)
    samples[1] *= 1e-3
    samples[2, :, : 10 * framing.chunk] = 0
    torch.manual_seed(1)
    alone = model.initial_state(STREAMS + 1, speakers(model, STREAMS + 1))
    expected = model(torch.cat([samples, samples[:1]]), alone)[0][:STREAMS]
    step, done = CompiledStep(model, stacked), [0] * STREAMS
    hints: list[list[Tensor]] = [[] for _ in range(STREAMS)]
    while min(done) < FRAMES:
        unfinished = [stream for stream in range(STREAMS) if done[stream] < FRAMES]
        chosen = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        starts = [done[stream] * framing.chunk for stream in chosen]
        windows = [samples[one, :, at : at + framing.n_fft] for one, at in zip(chosen, starts, strict=True)]
        for stream, own in zip(chosen, step(torch.stack(windows), torch.tensor(chosen)), strict=True):
            hints[stream].append(own)
            done[stream] += 1
    actual = torch.stack([torch.cat(own) for own in hints])
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-5 * max(1.0, float(expected.abs().max())))
    for tensor, before in zip(slots.state_tensors(stacked), untouched, strict=True):
        assert torch.equal(tensor[STREAMS], before)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", [{}, {"running_level": True}, {"task": "tse", "window": 40}])
def test_any_streams_in_any_groups_get_the_hints_of_torch(size: str, options: dict[str, Any]) -> None:
    check_equal(large_model(size, **options))


SMALL: dict[str, dict[str, Any]] = {
    "delayed": {"boosting": {"delay": 3}},
    "at once": {"boosting": {"delay": 0, "compression": 4}},
    "on arrival": {"boosting": {"policy": "arrival"}},
    "extraction": {"task": "tse", "boosting": {"policy": "arrival"}, "running_level": True},
    "alone": {"running_level": True},
    "alone with self-attention": {"size": {"heads": 4, "self_attention": True}},
    "alone, extraction": {"task": "tse"},
}


def small_model(case: str, channels: int) -> SmallModel:
    options = {"task": "ss", **SMALL[case]}
    network = {"channels": channels, "hidden": channels - 4, "window": 9, **options.pop("size", {})}
    if "boosting" in options:
        options |= {"small": network, "large": SIZES["tiny"]}
    else:
        options["network"] = network
    model = SmallModel(MODEL.validate_python(options)).eval()
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return model


def random_hints(rng: random.Random, config: ModelConfig, frame: int, arrived: set[int]) -> list[Hint]:
    """Return the hints to use at a frame: often none, sometimes two, of any frame that had none yet."""
    if not config.hint_channels:
        return []
    values = np.random.default_rng(frame).normal(0, 1, (MERGES, config.hint_channels, config.framing.bins))
    ages = [config.delay] if frame >= config.delay and rng.random() < 0.7 else []
    if config.on_arrival:
        candidates = [age for age in range(1, config.max_age + 1) if age <= frame and frame - age not in arrived]
        ages = rng.sample(candidates, min(len(candidates), rng.choice((0, 0, 1, 2))))
        arrived |= {frame - age for age in ages}
    return [Hint(age, own.astype(np.float32)) for age, own in zip(ages, values, strict=False)]


@torch.inference_mode()
def check_small(case: str, channels: int = 16) -> None:
    """Compare a stream, and its repetition after a reset, with torch."""
    model = small_model(case, channels)
    config, rng = model.config, random.Random(1)
    speaker = torch.randn(1, 256) / 16 if config.needs_speaker else None
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    network = SmallNetwork(config, weights)
    stream, other = (SmallStep(network, None if speaker is None else speaker[0].numpy()) for _ in range(2))
    for _ in range(2):
        state, arrived = model.initial_state(1, speaker), set[int]()
        for frame in range(40):
            window = np.random.default_rng(frame).normal(0, 0.1, (2, config.framing.n_fft)).astype(np.float32)
            hints = random_hints(rng, config, frame, arrived)
            estimate, state = model(torch.from_numpy(window)[None], state, torch_hints(config, hints))
            actual = torch.from_numpy(stream.step(window, hints))
            other.step(window[::-1], [])  # another stream of the same network
            limit = 3e-5 * max(1.0, float(estimate.abs().max()))
            torch.testing.assert_close(actual, estimate[0], rtol=0, atol=limit)
        stream.reset()


@pytest.mark.parametrize("case", SMALL)
def test_the_network_of_the_device_equals_that_of_torch(case: str) -> None:
    check_small(case)


def test_hints_of_frames_before_a_reset_are_ignored() -> None:
    model = small_model("on arrival", 16)
    config, rng = model.config, np.random.default_rng(0)
    network = SmallNetwork(config, {name: weight.detach().numpy() for name, weight in model.state_dict().items()})
    with_hints, without = SmallStep(network), SmallStep(network)
    for frame in range(config.max_age):
        window = rng.normal(0, 0.1, (2, config.framing.n_fft)).astype(np.float32)
        values = rng.normal(0, 1, (config.hint_channels, config.framing.bins)).astype(np.float32)
        hints = [Hint(age, values) for age in {frame + 1, config.max_age}]
        np.testing.assert_array_equal(with_hints.step(window, hints), without.step(window))


@pytest.mark.slow
@pytest.mark.parametrize("instructions", builds())
def test_every_instruction_set_gives_the_same(instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_build(instructions, monkeypatch, STEP)
    for size in SIZES:
        check_equal(large_model(size, running_level=True))
    for case in SMALL:
        check_small(case, 20)


def test_several_threads_give_the_same() -> None:
    with torch_threads(3):
        check_equal(large_model("compact"))


def step_once(model: LargeModel) -> tuple[Tensor, Tensor]:
    """Prepare and run a step, and return its hints and those of torch."""
    with torch.inference_mode():
        prepared = StateSlots(model, 2)
        prepared.prepare([1])
        Counting.calls = 0
        prepared.put(0, model.initial_state(1))
        window = 0.1 * torch.randn(1, 2, 192, generator=torch.Generator().manual_seed(3))
        expected = model(window, model.initial_state(1))[0]
        return prepared.step(window, torch.tensor([0])), expected


class Counting(CompiledStep):
    """A step that counts its calls."""

    calls = 0

    def __call__(self, samples: Tensor, slots: Tensor) -> Tensor:
        Counting.calls += 1
        return super().__call__(samples, slots)


def test_a_faster_compiled_step_is_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(slots, "CompiledStep", Counting)
    hints, expected = step_once(large_model("compact"))
    assert Counting.calls == 1
    torch.testing.assert_close(hints, expected, rtol=0, atol=1e-4)
    assert not capsys.readouterr().err


def test_a_compiled_step_that_differs_is_not_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wrong(Counting):
        def __call__(self, samples: Tensor, slots: Tensor) -> Tensor:
            return super().__call__(samples, slots) * 1.01

    monkeypatch.setattr(slots, "CompiledStep", Wrong)
    hints, expected = step_once(large_model("compact"))
    assert Counting.calls == 0
    torch.testing.assert_close(hints, expected, rtol=0, atol=1e-4)
    line, *more = capsys.readouterr().err.splitlines()
    assert not more
    assert line.startswith("warning: the compiled step differs from torch by ")


def test_a_slower_compiled_step_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Counting):
        def __call__(self, samples: Tensor, slots: Tensor) -> Tensor:
            hints = super().__call__(samples, slots)
            for _ in range(300):
                torch.randn(10_000)
            return hints

    monkeypatch.setattr(slots, "CompiledStep", Slow)
    hints, expected = step_once(large_model("compact"))
    assert Counting.calls == 0
    torch.testing.assert_close(hints, expected, rtol=0, atol=1e-4)


def test_without_a_compiler_torch_is_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CXX", "/none")
    hints, expected = step_once(large_model("tiny"))
    torch.testing.assert_close(hints, expected, rtol=0, atol=1e-4)
    line, *more = capsys.readouterr().err.splitlines()
    assert not more
    assert line.startswith(
        "warning: the large network takes several times as long on this CPU without the C++ library: "
    )


@pytest.mark.parametrize("case", ["delayed", "on arrival", "extraction", "alone with self-attention"])
def test_weights_of_another_shape_are_refused(case: str) -> None:
    model = small_model(case, 16)
    weights = {name: weight.detach().numpy() for name, weight in model.state_dict().items()}
    used = [name for name in weights if not name.startswith("synthesis")]
    for name in used:
        with pytest.raises(ValueError, match=name):
            SmallNetwork(model.config, weights | {name: weights[name][..., :-1]})
        with pytest.raises(KeyError, match=name):
            SmallNetwork(model.config, {other: weight for other, weight in weights.items() if other != name})


def test_windows_and_hints_of_another_shape_are_refused() -> None:
    model = small_model("delayed", 16)
    stream = SmallStep(SmallNetwork(model.config, {k: v.detach().numpy() for k, v in model.state_dict().items()}))
    window = np.zeros((2, model.config.framing.n_fft), np.float32)
    hint = np.zeros((model.config.hint_channels, model.config.framing.bins), np.float32)
    with pytest.raises(ValueError, match="must be"):
        stream.step(window[:1])
    with pytest.raises(ValueError, match="must be"):
        stream.step(window, [Hint(model.config.delay, hint[:, :-1])])


def test_other_devices_and_types_are_left_to_torch() -> None:
    model = large_model("tiny")
    assert CompiledStep.supports(model)
    model.network.to(torch.bfloat16)
    assert not CompiledStep.supports(model)
