"""Measure how many sessions a device can serve, for ``--max-sessions auto``."""

import time

import torch

from knowledge_boosting.models.config import SPEAKER_EMBEDDING_SIZE
from knowledge_boosting.models.pair import LargeModel
from knowledge_boosting.models.slots import StateSlots, step_size

_MAX_LOAD = 0.75  # part of the time between two frames that steps can use; the rest is for backlogs and other work
_TRANSPORT_SECONDS = 0.00012  # time of gRPC and the event loop for each frame, in addition to the steps
_STEPS = 15


@torch.inference_mode()
def measure_capacity(model: LargeModel, device: torch.device) -> int:
    """Return the maximum number of sessions that one step can serve in its part of the time between two frames.

    The result is at least one.
    """
    model = model.to(device)
    available = _MAX_LOAD * model.config.framing.chunk_seconds
    size = capacity = 1
    while True:
        # A step with fewer sessions is padded to this size, so it takes the same time.
        fitting = int((available - _step_seconds(model, device, size)) / _TRANSPORT_SECONDS)
        capacity = max(capacity, min(fitting, size))
        if fitting < size:
            return capacity
        # Every size of a step on a GPU needs its own graphs.
        size = 2 * size if device.type == "cuda" else step_size(size + 1)


def _step_seconds(model: LargeModel, device: torch.device, sessions: int) -> float:
    framing = model.config.framing
    speaker = torch.zeros(1, SPEAKER_EMBEDDING_SIZE, device=device) if model.config.needs_speaker else None
    states = StateSlots(model, sessions, speaker)
    slots = torch.arange(sessions)
    for slot in range(sessions):
        states.put(slot, model.initial_state(1, speaker))
    states.prepare([1])
    windows = torch.randn(sessions, model.config.microphones, framing.n_fft)
    times = []
    for _ in range(_STEPS):
        started = time.perf_counter()
        states.step(windows, slots)
        times.append(time.perf_counter() - started)
    # The minimum is the time without other load, which is not typical of the hours to come.
    return min(times)
