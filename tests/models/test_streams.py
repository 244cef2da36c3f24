"""The states of several streams can be stacked in one batch."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from knowledge_boosting.models.framing import pad_to_frames
from tests.golden_cases import TOLERANCE, Golden, load, worst


def tensors(state: Any) -> list[Tensor]:
    """Return all tensors in a state."""
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, tuple):
        return [tensor for part in state for tensor in tensors(part)]
    if is_dataclass(state):
        return [tensor for field in fields(state) for tensor in tensors(getattr(state, field.name))]
    assert state is None
    return []


def stack(first: Any, second: Any) -> Any:
    """Stack two states."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    if isinstance(first, tuple):
        return tuple(stack(a, b) for a, b in zip(first, second, strict=True))
    if first is None:
        return None
    return type(first)(**{f.name: stack(getattr(first, f.name), getattr(second, f.name)) for f in fields(first)})


def test_every_state_tensor_has_the_batch_axis_first(golden: Callable[[str], Golden]) -> None:
    for name in ("tse_delay6", "ss_delay0"):
        pair = golden(name).pair
        speakers = torch.randn(5, 256) if pair.config.task == "tse" else None
        with torch.inference_mode():
            for model in (pair.small, pair.large):
                found = tensors(model.initial_state(5, speakers))
                assert len(found) > 10
                assert {len(tensor) for tensor in found} == {5}


@torch.inference_mode()
def test_streams_at_different_frames_share_a_batch(golden: Callable[[str], Golden]) -> None:
    """A stream past its attention window and one at its start give the same results together as alone."""
    case = golden("ss_delay6_compression2")
    pair, framing = case.pair, case.pair.config.framing
    samples = pad_to_frames(case.mixture, framing)
    ahead = 63

    def stretch(stream: int, first: int, frames: int) -> Tensor:
        return samples[
            stream : stream + 1, :, first * framing.chunk : (first + frames) * framing.chunk + framing.lookahead
        ]

    _, _, old = pair.large(stretch(0, 0, ahead), pair.large.initial_state(1))
    state = stack(old, pair.large.initial_state(1))
    hints, first = [], 0
    for frames in (1, 1, 7, 1, 50):
        both = torch.cat([stretch(0, ahead + first, frames), stretch(1, first, frames)])
        hint, _, state = pair.large(both, state)
        hints.append(hint)
        first += frames
    together = torch.cat(hints, dim=1)
    assert worst(together[0], case.hint[0, ahead : ahead + first]) < TOLERANCE
    assert worst(together[1], case.hint[1, :first]) < TOLERANCE


@torch.inference_mode()
def test_a_step_writes_one_row_of_each_attention_cache(golden: Callable[[str], Golden]) -> None:
    case = golden("ss_delay6_compression2")
    pair, framing = case.pair, case.pair.config.framing
    samples = pad_to_frames(case.mixture, framing)
    _, _, state = pair.large(samples[..., : 60 * framing.chunk + framing.lookahead], pair.large.initial_state(2))
    cache = state.network.blocks[0].attention
    assert cache is not None
    keys, before = cache.keys, cache.keys.clone()
    _, _, after = pair.large(samples[..., 60 * framing.chunk :][..., : framing.n_fft], state)
    assert after.network.blocks[0].attention is not None
    assert after.network.blocks[0].attention.keys.data_ptr() == keys.data_ptr()
    changed = (keys != before).any(dim=(0, 1, 3)).nonzero().flatten().tolist()
    assert changed == [60 % 50]


@torch.inference_mode()
def test_the_speaker_layers_run_once_a_session() -> None:
    case = load("tse_delay6")  # a separate copy, because the test changes it
    small, framing = case.pair.small, case.pair.config.framing
    state = small.initial_state(2, case.speaker_embedding)
    for weight in small.network.speaker.parameters():
        weight.fill_(float("nan"))
    samples = pad_to_frames(case.mixture, framing)
    no_hints = torch.zeros_like(case.hint)
    estimate, _ = small(samples, state, no_hints)
    assert worst(estimate[..., : case.mixture.shape[-1]], case.small_output_without_hints) < TOLERANCE


def test_a_state_is_not_overwritten_under_autograd(golden: Callable[[str], Golden]) -> None:
    case = golden("ss_delay1_compression4")
    pair, framing = case.pair, case.pair.config.framing
    samples = pad_to_frames(case.mixture, framing)
    _, _, state = pair.large(samples[..., : 3 * framing.chunk + framing.lookahead], pair.large.initial_state(1))
    window = samples[..., 3 * framing.chunk :][..., : framing.n_fft]
    first, _, _ = pair.large(window, state)
    second, _, _ = pair.large(window, state)
    assert torch.equal(first, second)
