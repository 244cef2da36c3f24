"""Runs the large network for many sessions without ever blocking the event loop."""

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.pair import LargeModel, LargeState
from protos.codec import Samples


@dataclass(frozen=True)
class Hints:
    """What one step computed, and how long it took."""

    values: Samples  # [T, hint channels, F]
    queue_us: int
    compute_us: int


class HintEngine:
    """The large network on one device. Steps of different sessions may run side by side on the CPU's cores."""

    def __init__(self, model: LargeModel, device: torch.device) -> None:
        self.model = model.to(device)
        self.device = device
        # One thread a step: a single frame's matrices are too small to share. Many steps share the cores instead.
        torch.set_num_threads(1)
        workers = (os.cpu_count() or 1) if device.type == "cpu" else 1
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="hint-engine")

    async def open(self, speaker_embedding: Samples | None) -> "EngineSession":
        """A new session; ``speaker_embedding`` is ``[256]`` for TSE."""
        loop = asyncio.get_running_loop()
        return EngineSession(self, await loop.run_in_executor(self._executor, self._initial_state, speaker_embedding))

    async def run(self, samples: Tensor, state: LargeState) -> tuple[Hints, LargeState]:
        """Run the frames of ``samples`` ``[M, chunk T + lookahead]`` from a state, which is used up."""
        queued = time.perf_counter_ns()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._step, samples, state, queued)

    def close(self) -> None:
        """Wait for the steps under way and end the threads."""
        self._executor.shutdown()

    @torch.inference_mode()
    def _initial_state(self, speaker_embedding: Samples | None) -> LargeState:
        embedding = None
        if speaker_embedding is not None:
            embedding = torch.from_numpy(speaker_embedding)[None].to(self.device)
        return self.model.initial_state(1, embedding)

    @torch.inference_mode()
    def _step(self, samples: Tensor, state: LargeState, queued: int) -> tuple[Hints, LargeState]:
        started = time.perf_counter_ns()
        hints, _, state = self.model(samples[None].to(self.device), state)
        values = hints[0].cpu().numpy()
        ended = time.perf_counter_ns()
        return Hints(values, (started - queued) // 1000, (ended - started) // 1000), state


class EngineSession:
    """One device's stream through the large network: its state, and the samples that two frames share."""

    def __init__(self, engine: HintEngine, state: LargeState) -> None:
        self._engine = engine
        self._state = state
        self._lead: Tensor | None = None

    async def step(self, samples: Samples) -> Hints:
        """Hints of the next frames.

        Args:
            samples: ``[M, chunk T]`` that complete T frames; the first call has ``lookahead`` samples more, before
                them.
        """
        tail = torch.from_numpy(np.ascontiguousarray(samples))
        if self._lead is not None:
            tail = torch.cat([self._lead, tail], dim=1)
        self._lead = tail[:, -self._engine.model.config.framing.lookahead :].clone()
        hints, self._state = await self._engine.run(tail, self._state)
        return hints
