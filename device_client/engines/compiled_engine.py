"""The small network in C++, compiled for this processor when it is first used. This engine does not need torch."""

import time

import numpy as np
from safetensors.numpy import load_file

from knowledge_boosting.common.cli import warn
from knowledge_boosting.common.errors import Failure, InputError, reason
from knowledge_boosting.device_client.engines.engine import CheckedEngine, Engine, Model
from knowledge_boosting.models.arrivals import Hint
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.config import SPEAKER_EMBEDDING_SIZE
from knowledge_boosting.models.cpu_step import MAX_ERROR, MAX_RELATIVE_TIME, SmallNetwork, SmallStep, supports
from knowledge_boosting.protos.codec import Samples

_CHECKED_FRAMES = 24


class CompiledModel:
    """The small network of a bundle, which creates sessions."""

    engine = "compiled"

    def __init__(self, bundle: Bundle) -> None:
        """Load the weights of a bundle.

        Raises:
            InputError: The bundle cannot be used.
            Failure: The network cannot be compiled.
        """
        self.manifest = bundle.manifest
        if not supports(self.manifest.model.on_device, quiet=True):
            text = "the C++ library for this network cannot be compiled here; install a C++ compiler"
            raise Failure(f"--engine compiled: {text}, or use --engine onnx")
        path = bundle.weights("small")
        try:
            self._network = SmallNetwork(self.manifest.model, load_file(path))
        except Exception as error:  # safetensors raises its own exceptions
            text = f"does not contain the weights of this network ({reason(error)}); export the bundle again"
            raise InputError(f"{path}: {text}") from None

    def session(self, speaker_embedding: Samples | None) -> Engine:
        """Start a session. ``speaker_embedding`` is ``[256]`` for TSE, otherwise None."""
        return CheckedEngine(SmallStep(self._network, speaker_embedding))


def faster_model(model: Model, bundle: Bundle) -> Model:
    """Return the compiled network if it gives the samples of ``model`` in much less time, otherwise ``model``."""
    try:
        compiled = CompiledModel(bundle)
    except (InputError, Failure):
        return model
    error, loudest, relative_time = _compare(compiled, model)
    if not error <= MAX_ERROR * max(loudest, 1):
        warn(f"the compiled network differs by {error:.2g} (loudest sample {loudest:.2g}), so ONNX Runtime is used")
        return model
    return compiled if relative_time < MAX_RELATIVE_TIME else model


def _compare(one: Model, other: Model) -> tuple[float, float, float]:
    """Run both on noise. Return the largest difference, the loudest sample, and the relative time of ``one``."""
    config, rng = one.manifest.model, np.random.default_rng(0)
    speaker = rng.normal(0, 1 / 16, SPEAKER_EMBEDDING_SIZE).astype(np.float32) if config.needs_speaker else None
    sessions = [model.session(speaker) for model in (one, other)]
    estimates: list[list[Samples]] = [[], []]
    seconds = np.zeros((2, _CHECKED_FRAMES))
    age = max(config.delay, 1) if config.on_arrival else config.delay
    for frame in range(_CHECKED_FRAMES):
        window = rng.normal(0, 0.1, (config.microphones, config.framing.n_fft)).astype(np.float32)
        values = rng.normal(0, 1, (config.hint_channels, config.framing.bins)).astype(np.float32)
        hints = [Hint(age, values)] if config.hint_channels and frame >= age else []
        for index, session in enumerate(sessions):
            began = time.perf_counter()
            estimates[index].append(session.step(window, hints))
            seconds[index, frame] = time.perf_counter() - began
    actual, expected = (np.stack(own) for own in estimates)
    fastest = seconds.min(axis=1)
    return float(np.abs(actual - expected).max()), float(np.abs(expected).max()), float(fastest[0] / fastest[1])
