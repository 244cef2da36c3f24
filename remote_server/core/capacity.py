"""How many sessions a machine carries: measured at start, for ``--max-sessions auto``."""

import time

import torch

from knowledge_boosting.models.config import SPEAKER_EMBEDDING_SIZE
from knowledge_boosting.models.pair import LargeModel
from knowledge_boosting.models.slots import StateSlots, step_size

_SHARE = 0.75  # of the time between two frames that steps may take; the rest is for backlogs and for whatever comes
_TRANSPORT = 0.00012  # seconds of a frame's way in and out, which gRPC and the event loop spend beside the steps
_STEPS = 15


@torch.inference_mode()
def measure_capacity(model: LargeModel, device: torch.device) -> int:
    """The most sessions, at least one, that one step can serve in its share of the time between two frames."""
    model = model.to(device)
    budget = _SHARE * model.config.framing.chunk_seconds
    size = most = 1
    while True:
        # Fewer sessions take a step of this size as well.
        fit = int((budget - _step_seconds(model, device, size)) / _TRANSPORT)
        most = max(most, min(fit, size))
        if fit < size:
            return most
        size = step_size(size + 1)


def _step_seconds(model: LargeModel, device: torch.device, sessions: int) -> float:
    framing = model.config.framing
    speaker = torch.zeros(1, SPEAKER_EMBEDDING_SIZE, device=device) if model.config.needs_speaker else None
    states = StateSlots(model, sessions, speaker)
    slots = torch.arange(sessions, device=device)
    for slot in range(sessions):
        states.put(slot, model.initial_state(1, speaker))
    states.prepare([1])
    windows = torch.randn(sessions, model.config.microphones, framing.n_fft)
    times = []
    for _ in range(_STEPS):
        started = time.perf_counter()
        states.step(windows.to(device), slots).cpu()
        times.append(time.perf_counter() - started)
    # The shortest: what else the machine did in this moment says nothing of the hours to come.
    return min(times)
