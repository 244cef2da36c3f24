"""Hints that are used on arrival: every way to compute them gives the same samples, whatever their times."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from knowledge_boosting.models.arrival_fusion import NEVER, ArrivalFusion, ArrivedHints, plan_arrivals
from knowledge_boosting.models.arrivals import MERGES, RAMP, Hint, MergeQueue
from knowledge_boosting.models.config import Alone, NetworkSize, OnArrival, Pair
from knowledge_boosting.models.onnx_graph import check_graph, frame_graph
from knowledge_boosting.models.onnx_stream import OnnxStream, load_graph
from knowledge_boosting.models.pair import BoostedPair, SmallModel, part_of, small_hints, torch_hints
from tests.arrivals import arrival_pair
from tests.golden_cases import TOLERANCE, worst

WINDOW, FRAMES, STREAMS = 13, 60, 3


@pytest.fixture(params=[False, True], ids=["", "running level"])
def pair(request: pytest.FixtureRequest) -> BoostedPair:
    return arrival_pair(WINDOW, running_level=request.param)


def noise(*shape: int) -> Tensor:
    return 0.1 * torch.randn(*shape)


def drawn_times(seed: int) -> Tensor:
    """Return times at which hints are merged: in any order, in bursts, some too late and some never."""
    rng = np.random.default_rng(seed)
    times = np.arange(FRAMES) + rng.integers(1, 2 * WINDOW, (STREAMS, FRAMES))
    burst = rng.integers(0, FRAMES - 20, (STREAMS, 1))
    times = np.where(np.abs(np.arange(FRAMES) - burst - 10) < 10, burst + 20, times)
    times[rng.random((STREAMS, FRAMES)) < 0.2] = NEVER
    times[np.arange(FRAMES) >= times] = NEVER
    return torch.from_numpy(times)


@pytest.mark.parametrize("seed", range(2))
@torch.inference_mode()
def test_any_division_into_calls_gives_the_same_samples(pair: BoostedPair, seed: int) -> None:
    torch.manual_seed(seed)
    config, times = pair.config, drawn_times(seed)
    mixture, hints = noise(STREAMS, 2, 128 * FRAMES + 64), torch.randn(STREAMS, FRAMES, config.hint_channels, 97)
    whole, _ = pair.small(mixture, pair.small.initial_state(STREAMS), small_hints(config, hints, times))
    for step in (1, 7, WINDOW, 30):
        state, parts = pair.small.initial_state(STREAMS), []
        for first, end in pairwise([*range(0, FRAMES, step), FRAMES]):
            samples = mixture[..., 128 * first : 128 * end + 64]
            estimate, state = pair.small(samples, state, part_of(small_hints(config, hints, times), first, end))
            parts.append(estimate)
        assert worst(torch.cat(parts, dim=-1), whole) < TOLERANCE
    other, _ = pair.small(mixture, pair.small.initial_state(STREAMS), small_hints(config, hints, times + 1))
    assert worst(other, whole) > 100 * TOLERANCE


@torch.inference_mode()
def test_without_hints_it_is_exactly_the_small_network_alone(pair: BoostedPair) -> None:
    config, mixture = pair.config, noise(STREAMS, 2, 128 * FRAMES + 64)
    alone = SmallModel(Alone(task="ss", network=config.small, running_level=config.running_level)).eval()
    alone.load_state_dict({name: value for name, value in pair.small.state_dict().items() if "fusion" not in name})
    never = torch.full((FRAMES,), NEVER)
    hints = torch.randn(STREAMS, FRAMES, config.hint_channels, 97)
    boosted, _ = pair.small(mixture, pair.small.initial_state(STREAMS), small_hints(config, hints, never))
    assert torch.equal(boosted, alone(mixture, alone.initial_state(STREAMS))[0])


@torch.inference_mode()
def test_the_graph_gives_the_samples_of_torch(pair: BoostedPair) -> None:
    config, small, rng = pair.config, pair.small, np.random.default_rng(0)
    graph = frame_graph(small)
    check_graph(graph, small)
    stream = OnnxStream(load_graph(graph), config)
    for _ in range(2):  # the second time after a reset, which must clear the rings
        state, queue = small.initial_state(1), MergeQueue(config.max_age)
        for frame in range(FRAMES):
            window = rng.normal(0, 0.1, (2, 192)).astype(np.float32)
            for number in range(max(0, frame - WINDOW - 3), frame):
                if rng.random() < (0.5 if frame % 20 == 0 else 0.05):
                    queue.put(number)
            hints = [
                Hint(frame - number, rng.normal(0, 1, (config.hint_channels, 97)).astype(np.float32))
                for number in queue.take(frame)
            ]
            expected, state = small(torch.from_numpy(window)[None], state, torch_hints(config, hints))
            assert worst(stream.step(window, hints), expected[0]) < TOLERANCE
        stream.reset()


@torch.inference_mode()
def test_after_a_reset_the_graph_ignores_hints_of_frames_before_it(pair: BoostedPair) -> None:
    config, stream = pair.config, OnnxStream(load_graph(frame_graph(pair.small)), pair.config)
    window = np.full((2, 192), 0.1, np.float32)
    for _ in range(5):
        undisturbed = stream.step(window)
    stream.reset()
    for _ in range(5):
        estimate = stream.step(window, [Hint(WINDOW, np.ones((config.hint_channels, 97), np.float32))])
    np.testing.assert_array_equal(estimate, undisturbed)


@torch.inference_mode()
def test_before_training_the_youngest_hints_count_most() -> None:
    """Otherwise attention is a mean over the window, and training takes long to find the hints that matter."""
    size = NetworkSize(channels=8, hidden=8, window=60)
    torch.manual_seed(0)
    pair = BoostedPair(Pair(task="ss", small=size, large=size, boosting=OnArrival(policy="arrival"))).eval()
    for fusion in pair.small.network.fusion:
        fusion.get_parameter("norm_merge.weight").fill_(1)
    frames = 60
    mixture = noise(1, 2, 128 * frames + 64)
    hints = pair(mixture).hints[:, :frames]
    ready_at = torch.arange(frames) + 1

    def last_chunk(changed: int | None) -> Tensor:
        given = hints.clone()
        if changed is not None:
            given[:, changed] += 10 * torch.randn(given[:, changed].shape, generator=torch.Generator().manual_seed(1))
        return pair.estimate_small(mixture[..., : 128 * frames], given, None, ready_at)[..., -128:]

    young, old = (float((last_chunk(frame) - last_chunk(None)).norm()) for frame in (frames - 4, frames - 40))
    assert young > 5 * old


@torch.inference_mode()
def test_a_frame_attends_to_the_merged_frames_of_its_window() -> None:
    """The attention of every frame, computed from its definition."""
    torch.manual_seed(0)
    fusion = ArrivalFusion(8, 97, 4, WINDOW, 4).eval()
    for weight in fusion.parameters():
        weight.normal_()
    x, hints, times = torch.randn(1, FRAMES, 97, 8), torch.randn(1, FRAMES, 97, 4), drawn_times(4)[:1]
    plan = plan_arrivals(
        ArrivedHints(hints, times), torch.zeros(1, WINDOW, dtype=torch.bool), torch.zeros(1, dtype=torch.long), FRAMES
    )
    fused, _ = fusion(x, plan, fusion.initial_state(1))
    keys, values = fusion.merged(x, hints)
    queries = fusion.queries(x)
    strengths = set()
    for frame in range(FRAMES):
        seen = [number for number in range(max(0, frame - WINDOW), frame) if times[0, number] <= frame]
        if not seen:
            assert torch.equal(fused[:, frame], x[:, frame])
            continue
        ages = frame - torch.tensor(seen)
        scores = (queries[0, :, frame : frame + 1] * keys[0][:, seen]).sum(-1) / keys.shape[-1] ** 0.5
        weights = (scores + fusion.age_bias[:, ages - 1]).softmax(-1)  # [heads, seen]
        attended = (weights[:, :, None] * values[0][:, seen]).sum(1)  # [heads, F * size]
        merged = fusion.merge(attended.unflatten(-1, (97, -1)).transpose(0, 1).flatten(1))
        merged = torch.where(merged > 0, merged, merged * fusion.slope_merge)
        strength = min(1, len(seen) / RAMP) * fusion.age_scale[ages.min() - 1]
        strengths.add(len(seen))
        expected = x[0, frame] + strength * fusion.norm_merge(merged)
        assert worst(fused[0, frame], expected) < TOLERANCE
    assert min(strengths) < RAMP < max(strengths)


def test_gradients_reach_all_weights() -> None:
    pair = arrival_pair(WINDOW)
    times = drawn_times(0)
    hints = torch.randn(STREAMS, FRAMES, pair.config.hint_channels, 97)
    pair.estimate_small(noise(STREAMS, 2, 128 * FRAMES), hints, None, times).square().mean().backward()
    for name, weight in pair.small.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        # The bias of a key shifts all scores of a query equally.
        assert weight.grad.any() or name.endswith("norm_key.bias"), name


@pytest.mark.parametrize("seed", range(5))
def test_the_queue_merges_every_hint_once_and_the_newest_first(seed: int) -> None:
    rng, max_age = np.random.default_rng(seed), 20
    queue, waiting, merged = MergeQueue(max_age), set[int](), list[int]()
    for frame in range(300):
        for number in rng.permutation(np.arange(max(0, frame - 30), frame + 1)):
            if rng.random() < (0.9 if rng.random() < 0.02 else 0.03):
                queue.put(int(number))
                waiting.add(int(number))
        usable = sorted(number for number in waiting - set(merged) if frame - max_age <= number < frame)
        taken = queue.take(frame)
        assert taken == usable[::-1][:MERGES]
        merged += taken
    assert len(merged) == len(set(merged)) > 100


def test_configurations_of_both_policies_are_distinguished() -> None:
    size = NetworkSize(channels=8, hidden=8, window=WINDOW)
    arrival = Pair(task="ss", small=size, large=size, boosting=OnArrival(policy="arrival", compression=2))
    assert Pair.model_validate_json(arrival.model_dump_json()) == arrival
    assert (arrival.on_arrival, arrival.delay, arrival.max_age) == (True, 1, WINDOW)
    assert arrival.max_age_ms == 8 * WINDOW
