"""The networks on the device of ``pytest --device``, and the parts of a GPU's steps that a CPU can run too."""

import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.models.device import pick_precision
from knowledge_boosting.models.pair import LargeModel, PairOutput
from knowledge_boosting.models.slots import GraphedStep, StateSlots
from tests.golden_cases import NAMES, TOLERANCE, Golden, worst

STREAMS, FRAMES = 5, 70


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_a_device_gives_the_published_computation(
    name: str, golden: Callable[[str], Golden], device: torch.device
) -> None:
    case = golden(name)
    pair, speaker = deepcopy(case.pair).to(device), case.speaker_embedding
    output = pair(case.mixture.to(device), None if speaker is None else speaker.to(device))
    computed = PairOutput(**{field.name: getattr(output, field.name).cpu() for field in fields(output)})
    assert worst(computed.large, case.large_output) < TOLERANCE
    assert worst(computed.embedding, case.large_embedding) < TOLERANCE
    assert worst(computed.hints, case.hint) < TOLERANCE
    assert worst(computed.small, case.small_output) < TOLERANCE


@pytest.fixture(scope="module")
def large(golden: Callable[[str], Golden], device: torch.device) -> LargeModel:
    return deepcopy(golden("ss_delay6_compression2").pair.large).to(device)


@pytest.fixture(scope="module")
def streams(large: LargeModel) -> Tensor:
    """Noise ``[B, M, N]``."""
    framing = large.config.framing
    length = FRAMES * framing.chunk + framing.lookahead
    return 0.1 * torch.randn(STREAMS, 2, length, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def hints_of_slots(model: LargeModel, streams: Tensor) -> Tensor:
    """Compute hints ``[B, T, channels, F]`` in steps of changing streams and numbers of frames."""
    slots, framing = StateSlots(model, STREAMS + 2), model.config.framing
    slots.prepare([1, 2])
    for slot in range(STREAMS):
        slots.put(slot, model.initial_state(1))
    rng, done = random.Random(2), [0] * STREAMS
    hints: list[list[Tensor]] = [[] for _ in range(STREAMS)]
    while min(done) < FRAMES:
        unfinished = [stream for stream in range(STREAMS) if done[stream] < FRAMES]
        chosen = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        # No step of 3 frames is prepared.
        frames = min(rng.randint(1, 3), *(FRAMES - done[stream] for stream in chosen))
        windows = [
            streams[
                stream, :, done[stream] * framing.chunk : (done[stream] + frames) * framing.chunk + framing.lookahead
            ]
            for stream in chosen
        ]
        values = slots.step(torch.stack(windows), torch.tensor(chosen))
        assert values.device.type == "cpu"
        for stream, own in zip(chosen, values, strict=True):
            hints[stream].append(own.clone())
            done[stream] += frames
    return torch.stack([torch.cat(own) for own in hints])


@torch.inference_mode()
def test_steps_of_any_streams_give_the_hints_of_whole_signals(large: LargeModel, streams: Tensor) -> None:
    on_device = streams.to(next(large.parameters()).device)
    expected = large(on_device, large.initial_state(STREAMS))[0].cpu()
    assert worst(hints_of_slots(large, streams), expected) < TOLERANCE


def test_a_step_with_its_own_buffers_fills_up_with_the_spare_slot(device: torch.device) -> None:
    totals = torch.zeros(4, device=device)

    def step(samples: Tensor, slots: Tensor) -> Tensor:
        totals.index_add_(0, slots, samples[:, 0, 0])
        return totals[slots]

    graphed = GraphedStep(step, torch.zeros(3, 1, 1, device=device), spare_slot=3)
    totals.zero_()
    assert graphed(torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1), torch.tensor([2, 0, 1])).tolist() == [1, 2, 4]
    assert graphed(torch.tensor([8.0]).view(1, 1, 1), torch.tensor([1])).tolist() == [12]
    assert totals[:3].tolist() == [2, 12, 1]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 0.02), (torch.bfloat16, 0.1)])
@torch.inference_mode()
def test_a_lower_precision_gives_similar_hints(
    dtype: torch.dtype, error: float, large: LargeModel, streams: Tensor
) -> None:
    lower = deepcopy(large)
    lower.network.to(dtype)
    hints = hints_of_slots(lower, streams)
    assert hints.dtype == torch.float32
    expected = hints_of_slots(large, streams)
    difference = float((hints - expected).norm() / expected.norm())
    assert 1e-5 < difference < error


def test_the_precision_must_fit_the_device() -> None:
    cpu = torch.device("cpu")
    assert pick_precision("float32", cpu) == torch.float32
    with pytest.raises(InputError, match="--precision float16: is for a GPU; leave it out"):
        pick_precision("float16", cpu)
    with pytest.raises(InputError, match="--precision half: must be one of float32, tf32, float16, bfloat16"):
        pick_precision("half", cpu)
