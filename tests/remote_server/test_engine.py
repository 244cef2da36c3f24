"""Tests for the engine: sessions that share steps get the same hints as separate sessions."""

import asyncio
import random
from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
import torch

from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.networks import load_large
from knowledge_boosting.models.pair import LargeModel
from knowledge_boosting.models.slots import CompiledStep
from knowledge_boosting.protos.codec import Samples
from knowledge_boosting.remote_server.core.engine import EngineSession, HintEngine, Hints, Step
from tests.golden_cases import TOLERANCE, Golden, worst


@pytest.fixture(scope="module", params=["ss_delay6_compression2", "tse_delay6"])
def large(request: pytest.FixtureRequest, golden: Callable[[str], Golden]) -> LargeModel:
    return golden(request.param).pair.large


NewEngine = Callable[..., HintEngine]


@pytest.fixture(params=["compiled", "torch"])
def new_engine(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> NewEngine:
    """Make an engine for a copy of a model, on the device of this test run, with compiled steps and without."""
    if request.param == "torch":
        monkeypatch.setattr(CompiledStep, "supports", lambda _: False)
    return lambda model, **options: HintEngine(deepcopy(model), device, **options)


def noise(model: LargeModel, frames: int, seed: int) -> tuple[Samples, Samples | None]:
    """Return random samples ``[M, chunk T + lookahead]``, and a speaker embedding for TSE."""
    framing, rng = model.config.framing, np.random.default_rng(seed)
    shape = model.config.microphones, framing.chunk * frames + framing.lookahead
    speaker = rng.normal(0, 1 / 16, 256).astype(np.float32) if model.config.task == "tse" else None
    return rng.normal(0, 0.1, shape).astype(np.float32), speaker


@torch.inference_mode()
def offline(model: LargeModel, samples: Samples, speaker: Samples | None) -> Samples:
    """Compute the hints ``[T, channels, F]`` of a whole stream with one call of the model."""
    state = model.initial_state(1, None if speaker is None else torch.from_numpy(speaker)[None])
    hints: Samples = model(torch.from_numpy(samples)[None], state)[0][0].numpy()
    return hints


class Stream:
    """A session with random samples, and its hints."""

    def __init__(self, engine: HintEngine, model: LargeModel, frames: int, seed: int) -> None:
        self._engine, self._framing = engine, model.config.framing
        self._frames = frames
        self.samples, self.speaker = noise(model, frames, seed)
        self.hints: list[Samples] = []
        self._done = asyncio.Event()
        self._sent = 0
        self._session: EngineSession | None = None

    async def open(self, **options: bool) -> None:
        self._session = await self._engine.open(self._receive, self.speaker, **options)

    def send(self, frames: int) -> None:
        assert self._session is not None
        chunk, lookahead, first = self._framing.chunk, self._framing.lookahead, self._sent
        start = first * chunk + (lookahead if first else 0)
        self._sent += frames
        self._session.send(self.samples[:, start : self._sent * chunk + lookahead], frames)

    async def end(self) -> None:
        """Wait for the hints of all sent frames, and close the session."""
        assert self._session is not None
        while len(self.hints) < self._sent:
            self._done.clear()
            await asyncio.wait_for(self._done.wait(), 60)
        self._session.close()

    @property
    def remaining(self) -> int:
        return self._frames - self._sent

    def _receive(self, result: Hints | Exception) -> None:
        assert isinstance(result, Hints), result
        assert len(result.arrived_at) == len(result.values)
        self.hints.extend(result.values)
        self._done.set()


def test_thirty_two_sessions_get_the_hints_of_separate_sessions(large: LargeModel, new_engine: NewEngine) -> None:
    rng = random.Random(7)
    steps: list[Step] = []
    # There are more streams than slots, so that later streams use slots again.
    lengths = [rng.randint(2, 70) for _ in range(48)]

    async def run(stream: Stream, free_slots: asyncio.Semaphore) -> None:
        async with free_slots:
            await asyncio.sleep(rng.uniform(0, 0.1))
            await live(stream)

    async def live(stream: Stream) -> None:
        await stream.open()
        backlog = rng.randint(0, 62)
        if backlog:
            stream.send(min(backlog, stream.remaining))
        while stream.remaining:
            # The stream sends single frames, and sometimes several frames after a gap.
            await asyncio.sleep(rng.choice([0.0, 0.02, 0.05, 0.1]))
            stream.send(min(rng.choice([1, 1, 1, 1, 2, 5, 20]), stream.remaining))
        await stream.end()

    async def run_all() -> list[Stream]:
        engine = new_engine(large, slots=32, max_wait=0.01, observe=steps.append)
        free_slots = asyncio.Semaphore(32)
        streams = [Stream(engine, large, length, seed) for seed, length in enumerate(lengths)]
        await asyncio.gather(*(run(stream, free_slots) for stream in streams))
        engine.close()
        return streams

    for stream in asyncio.run(run_all()):
        expected = offline(large, stream.samples, stream.speaker)
        assert worst(np.stack(stream.hints), expected) < TOLERANCE
    assert max(step.frames // step.sessions for step in steps) == 8
    assert sum(step.frames for step in steps) == sum(lengths)


def test_frames_that_arrive_together_share_a_step(large: LargeModel, new_engine: NewEngine) -> None:
    steps: list[Step] = []

    async def all_at_once() -> list[Stream]:
        engine = new_engine(large, slots=9, max_wait=10.0, observe=steps.append)
        streams = [Stream(engine, large, 3, seed) for seed in range(9)]
        for stream in streams:
            await stream.open()
        for _ in range(3):
            for stream in streams:
                stream.send(1)
            await asyncio.sleep(0.1)
        await asyncio.gather(*(stream.end() for stream in streams))
        engine.close()
        return streams

    for stream in asyncio.run(all_at_once()):
        assert worst(np.stack(stream.hints), offline(large, stream.samples, stream.speaker)) < TOLERANCE
    assert steps[0].sessions == 9


def test_a_reproducible_session_gets_bit_identical_hints_under_load(large: LargeModel, new_engine: NewEngine) -> None:
    """The hints of single frames in an idle engine equal those of bursts in a busy one with other such sessions."""
    frames = 70

    async def idle() -> Stream:
        engine = new_engine(large, slots=1)
        stream = Stream(engine, large, frames, seed=1)
        await stream.open(reproducible=True)
        for count in range(1, frames + 1):
            stream.send(1)
            while len(stream.hints) < count:
                await asyncio.sleep(0.0001)
        await stream.end()
        engine.close()
        return stream

    async def busy() -> list[Stream]:
        engine = new_engine(large, slots=4)
        others = [Stream(engine, large, frames, seed=seed) for seed in (2, 3)]
        reproducible = [Stream(engine, large, frames, seed=1) for _ in range(2)]
        for stream in others:
            await stream.open()
        for stream in reproducible:
            await stream.open(reproducible=True)
        reproducible[0].send(frames)
        for _ in range(frames // 5):
            for stream in (*others, reproducible[1]):
                stream.send(5)
            await asyncio.sleep(0)
        await asyncio.gather(*(stream.end() for stream in (*others, *reproducible)))
        engine.close()
        return reproducible

    expected = np.stack(asyncio.run(idle()).hints)
    for stream in asyncio.run(busy()):
        assert np.stack(stream.hints).tobytes() == expected.tobytes()


def test_a_slot_has_no_state_of_its_last_session(large: LargeModel, new_engine: NewEngine) -> None:
    async def reuse() -> Stream:
        engine = new_engine(large, slots=1)
        overflowing = Stream(engine, large, 3, seed=1)
        overflowing.samples[:] = 3e38  # all of its state becomes infinite or NaN
        await overflowing.open()
        overflowing.send(3)
        await overflowing.end()
        assert not np.isfinite(np.stack(overflowing.hints)).all()
        after = Stream(engine, large, 60, seed=2)
        await after.open()
        after.send(60)
        await after.end()
        engine.close()
        return after

    stream = asyncio.run(reuse())
    assert worst(np.stack(stream.hints), offline(large, stream.samples, stream.speaker)) < TOLERANCE


def test_an_engine_continues_after_a_session_that_cannot_be_opened(large: LargeModel, new_engine: NewEngine) -> None:
    async def one_too_many() -> Stream:
        engine = new_engine(large, slots=1)
        first, second = Stream(engine, large, 20, seed=1), Stream(engine, large, 20, seed=2)
        await first.open()
        with pytest.raises(IndexError):
            await asyncio.wait_for(second.open(), 20)
        first.send(20)
        await first.end()
        assert engine.alive
        await engine.check_health()
        engine.close()
        return first

    stream = asyncio.run(one_too_many())
    assert worst(np.stack(stream.hints), offline(large, stream.samples, stream.speaker)) < TOLERANCE


def test_a_session_that_overflows_does_not_affect_others_in_its_step(large: LargeModel, new_engine: NewEngine) -> None:
    async def together() -> Stream:
        engine = new_engine(large, slots=2, max_wait=1.0)
        overflowing, normal = Stream(engine, large, 20, seed=1), Stream(engine, large, 20, seed=2)
        overflowing.samples[:] = 3e38
        for stream in (overflowing, normal):
            await stream.open()
        for _ in range(20):
            overflowing.send(1)
            normal.send(1)
            await asyncio.sleep(0)
        await asyncio.gather(overflowing.end(), normal.end())
        engine.close()
        return normal

    stream = asyncio.run(together())
    assert worst(np.stack(stream.hints), offline(large, stream.samples, stream.speaker)) < TOLERANCE


def test_an_overflow_of_the_level_reaches_the_hints(new_engine: NewEngine) -> None:
    """Otherwise the level would stay infinite, and all later hints would be finite and wrong."""
    large = load_large(Bundle("ss-compact"))

    async def overflow() -> Stream:
        engine = new_engine(large, slots=1)
        stream = Stream(engine, large, 10, seed=1)
        stream.samples[0, 5 * large.config.framing.chunk + 100] = 1e20
        await stream.open()
        stream.send(10)
        await stream.end()
        engine.close()
        return stream

    assert not np.isfinite(np.stack(asyncio.run(overflow()).hints)).all()


def test_a_backlog_does_not_delay_a_live_session(large: LargeModel, new_engine: NewEngine) -> None:
    """Between two frames of the live session, the long backlog of the other session gets only one step."""
    order: list[int] = []

    async def side_by_side() -> None:
        engine = new_engine(large, slots=2, observe=lambda step: order.append(step.frames))
        behind, live = Stream(engine, large, 480, seed=1), Stream(engine, large, 4, seed=2)
        await behind.open()
        await live.open()
        behind.send(480)
        for count in range(1, 5):
            live.send(1)
            while len(live.hints) < count:
                await asyncio.sleep(0.0005)
        assert len(behind.hints) < 480
        await asyncio.gather(behind.end(), live.end())
        engine.close()

    asyncio.run(side_by_side())
    assert sum(order) == 484
