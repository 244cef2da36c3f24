"""Simulates when hints arrive, for training and evaluation.

Links, losses and the order in which hints are used are those of ``kb-client replay`` and of a live session.
"""

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from knowledge_boosting.common.links import NetworkConditions, make_links
from knowledge_boosting.models.arrival_fusion import NEVER
from knowledge_boosting.models.arrivals import MergeQueue
from knowledge_boosting.models.config import ModelConfig

_SERVER_NS = 4_000_000  # time of the server for a frame

# What training draws.
_DELAY_FRAMES = 1.0, 16.0  # of the round trip; every ratio is equally likely
_JITTER_MS = 40.0  # upper limit of the mean jitter; small values are more likely
_LOSS = 0.05  # upper limit; small values are more likely
_EVERY_SECOND = 0.25  # share of examples in which only every second frame has a hint
_OUTAGES = 0.3  # share of examples with an outage
_OUTAGE_SECONDS = 0.2, 2.0


def draw_arrivals(rng: np.random.Generator, frames: int, model: ModelConfig) -> Tensor:
    """Draw a network, and return the frame at which the hint of each frame is ready for use, ``[T]``."""
    frames_per_second = 1 / model.framing.chunk_seconds
    shortest, longest = np.log(_DELAY_FRAMES)
    conditions = NetworkConditions(
        delay_ms=1e3 / frames_per_second * float(np.exp(rng.uniform(shortest, longest))),
        jitter_ms=_JITTER_MS * float(rng.random()) ** 3,
        loss=_LOSS * float(rng.random()) ** 3,
    )
    outage = range(0)
    if rng.random() < _OUTAGES:
        first = int(rng.integers(-round(frames_per_second), frames))
        outage = range(first, first + round(float(rng.uniform(*_OUTAGE_SECONDS)) * frames_per_second))
    unheard = set(outage) | set(range(1, frames, 2) if rng.random() < _EVERY_SECOND else ())
    return simulate_arrivals(conditions, int(rng.integers(2**31)), frames, model, unheard)


def simulate_arrivals(
    conditions: NetworkConditions, seed: int, frames: int, model: ModelConfig, unheard: Collection[int] = ()
) -> Tensor:
    """Return the frame at which the hint of each frame is ready for use, ``[T]``; NEVER for hints that are not used.

    Args:
        conditions: the network.
        seed: the seed of jitter and loss.
        frames: T.
        model: the pair.
        unheard: the frames that have no hint, for example because their audio does not reach a server.
    """
    chunk_ns = round(1e9 * model.framing.chunk_seconds)
    uplink, downlink = make_links(conditions, spacing_ns=chunk_ns, seed=seed)
    queue, ready_at = MergeQueue(model.max_age), [NEVER] * frames
    arriving: list[tuple[int, int]] = []  # time and frame of each hint, in this order
    arrived, idle_at = 0, 0
    for frame in range(frames):
        now = round(1e9 * model.framing.complete_at(frame))
        while arrived < len(arriving) and arriving[arrived][0] <= now:
            queue.put(arriving[arrived][1])
            if not model.on_arrival:
                ready_at[arriving[arrived][1]] = frame
            arrived += 1
        for hint in queue.take(frame) if model.on_arrival else ():
            ready_at[hint] = frame
        if frame not in unheard:
            # The sizes of the payloads are left out. They matter only if the bandwidth is limited.
            idle_at = max(uplink.arrival(now, 0), idle_at) + _SERVER_NS
            arriving.append((downlink.arrival(idle_at, 0), frame))
    return torch.tensor(ready_at)
