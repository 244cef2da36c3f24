"""The networks equal the published computation, for whole signals and in pieces."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from knowledge_boosting.models.arrival_fusion import NEVER
from knowledge_boosting.models.framing import pad_to_frames
from knowledge_boosting.models.pair import PairOutput, delay_hints
from tests.golden_cases import NAMES, TOLERANCE, Golden, worst


@torch.inference_mode()
def run_in_pieces(case: Golden, pieces: Sequence[int], *, hints: bool = True) -> PairOutput:
    """Run both networks on the mixture of a case, with ``pieces`` frames in the calls."""
    pair, framing = case.pair, case.pair.config.framing
    batch, _, length = case.mixture.shape
    samples = pad_to_frames(case.mixture, framing)
    large_state = pair.large.initial_state(batch, case.speaker_embedding)
    small_state = pair.small.initial_state(batch, case.speaker_embedding)
    embeddings, encoded, estimates, first = [], [], [], 0
    for frames in pieces:
        stretch = samples[..., first * framing.chunk : (first + frames) * framing.chunk + framing.lookahead]
        hint, embedding, large_state = pair.large(stretch, large_state)
        encoded.append(hint)
        embeddings.append(embedding)
        delayed = delay_hints(torch.cat(encoded, dim=1), pair.config.delay)[:, first:]
        estimate, small_state = pair.small(stretch, small_state, delayed if hints else torch.zeros_like(delayed))
        estimates.append(estimate)
        first += frames
    embedding = torch.cat(embeddings, dim=1)
    return PairOutput(
        small=torch.cat(estimates, dim=-1)[..., :length],
        large=pair.large.estimate(embedding)[..., :length],
        hints=torch.cat(encoded, dim=1),
        embedding=embedding,
    )


def assert_golden(output: PairOutput, case: Golden) -> None:
    assert worst(output.large, case.large_output) < TOLERANCE
    assert worst(output.embedding, case.large_embedding) < TOLERANCE
    assert worst(output.hints, case.hint) < TOLERANCE
    assert worst(output.small, case.small_output) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_offline_equals_the_published_computation(name: str, golden: Callable[[str], Golden]) -> None:
    case = golden(name)
    with torch.inference_mode():
        assert_golden(case.pair(case.mixture, case.speaker_embedding), case)
        alone = case.pair(case.mixture, case.speaker_embedding, torch.full(case.hint.shape[1:2], NEVER))
    assert worst(alone.small, case.small_output_without_hints) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_frame_by_frame_equals_the_published_computation(name: str, golden: Callable[[str], Golden]) -> None:
    case = golden(name)
    frames = [1] * case.hint.shape[1]
    assert_golden(run_in_pieces(case, frames), case)
    assert worst(run_in_pieces(case, frames, hints=False).small, case.small_output_without_hints) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_split_into_calls_gives_the_same(name: str, golden: Callable[[str], Golden], data: st.DataObject) -> None:
    case = golden(name)
    total = case.hint.shape[1]
    # The pieces can be short, or longer than the attention windows.
    cuts = data.draw(st.lists(st.integers(1, total - 1), max_size=12, unique=True).map(sorted))
    edges = [0, *cuts, total]
    pieces = [end - start for start, end in pairwise(edges)]
    assert_golden(run_in_pieces(case, pieces), case)
    assert worst(run_in_pieces(case, pieces, hints=False).small, case.small_output_without_hints) < TOLERANCE


def test_training_mode_gradients_reach_both_networks(golden: Callable[[str], Golden]) -> None:
    case = golden("ss_delay1_compression4")
    pair = case.pair
    pair(case.mixture[..., :4000]).small.square().mean().backward()
    missing = [name for name, weight in pair.named_parameters() if weight.grad is None]
    pair.zero_grad()
    assert not missing
