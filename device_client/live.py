"""The live frame loop: microphone to loudspeaker, frame by frame, with the hints that are there in time."""

import time
from typing import Protocol

import numpy as np

from knowledge_boosting.device_client.engine import Engine
from knowledge_boosting.device_client.live_audio import LiveAudio
from knowledge_boosting.device_client.live_hints import LiveHints
from knowledge_boosting.device_client.mixer import Mixer, Play
from knowledge_boosting.models.config import ModelConfig
from knowledge_boosting.protos.codec import Samples

RECENT = 1250  # frames that are remembered: ten seconds of 8 ms
FRAME = np.dtype(
    [
        ("hint", np.bool_),  # fused at this frame
        ("age_ms", np.float32),  # of that hint, from its frame's capture to its arrival; NaN without one
        ("compute_ms", np.float32),  # the small network's
        ("input_peak", np.float32),
        ("output_peak", np.float32),
    ]
)

# After so many frames without hints the network's attention holds none, and the next ones come in slowly.
_FORGOTTEN = 50
_RAMP = 8  # frames


class HintRamp:
    """Brings hints in slowly when they come back after a while, so that nothing changes with a click."""

    def __init__(self) -> None:
        self._absent, self._gain = 0, 1.0

    def scale(self, hint: Samples | None) -> Samples | None:
        """The hint to fuse at the next frame."""
        if hint is None:
            self._absent += 1
            return None
        if self._absent >= _FORGOTTEN:
            self._gain = 0.0
        self._absent = 0
        if self._gain < 1:
            self._gain += 1 / _RAMP
            hint = hint * np.float32(self._gain)
        return hint


class FrameRecorder(Protocol):
    """Takes down every frame."""

    def put(self, fresh: Samples, played: Samples, hint: Samples | None, record: np.void, play: Play) -> None:
        """A frame's new input samples ``[M, n]``, what was played ``[M, chunk]``, and the hint that was fused."""
        ...


class LiveLoop:
    """One live stream. :meth:`run` is the real-time thread; others may read its figures and set its controls."""

    def __init__(
        self,
        engine: Engine,
        model: ModelConfig,
        audio: LiveAudio,
        hints: LiveHints | None,
        play: Play,
        recorder: FrameRecorder | None = None,
    ) -> None:
        self._engine, self._model, self._audio, self._hints, self._recorder = engine, model, audio, hints, recorder
        self._mixer = Mixer(model.sources, model.microphones, play)
        self.choices = self._mixer.choices
        # Controls.
        self.play = play
        self.hints_on = True
        # Figures. A frame's record is complete before it is counted.
        self.recent = np.zeros(RECENT, FRAME)
        self.frames = 0
        self.hints_due = 0
        self.hints_used = 0
        self.compute_ms = 0.0  # sum over all frames
        self.slowest_ms = 0.0

    @property
    def overflows(self) -> int:
        """Frames at which the network gave no numbers, and the input was played."""
        return self._engine.overflows

    def run(self) -> None:
        """Run until the audio ends."""
        framing, delay, hints = self._model.framing, self._model.delay, self._hints
        chunk, lookahead = framing.chunk, framing.lookahead
        window = np.zeros((self._model.microphones, framing.n_fft), np.float32)
        fresh, ramp, frame = window, HintRamp(), 0
        while self._audio.read(fresh):
            now = time.perf_counter_ns()
            if not np.isfinite(fresh).all():
                fresh[:] = 0  # one such sample would stay in the network's state for good
            hint, age = None, np.nan
            if hints is not None:
                hints.send(frame, fresh, now)
                if frame >= delay:
                    hint = hints.take(frame - delay, now)
                    if not self.hints_on:
                        hint = None
                    elif hint is not None:
                        age = hints.age_ms(frame - delay)
                    self.hints_due += self.hints_on
                    self.hints_used += hint is not None
                    hint = ramp.scale(hint)
            play = self.play
            began = time.perf_counter_ns()
            estimate = self._engine.step(window, hint)
            compute_ms = (time.perf_counter_ns() - began) / 1e6
            played = self._mixer.mix(play, window[:, :chunk], estimate)
            self._audio.write(played)

            self.compute_ms += compute_ms
            self.slowest_ms = max(self.slowest_ms, compute_ms)
            record = (hint is not None, age, compute_ms, np.abs(fresh).max(), np.abs(played).max())
            self.recent[frame % RECENT] = record
            if self._recorder is not None:
                self._recorder.put(fresh.copy(), played, hint, self.recent[frame % RECENT].copy(), play)
            frame += 1
            self.frames = frame
            window[:, :lookahead] = window[:, chunk:].copy()
            fresh = window[:, lookahead:]
