"""The live frame loop: microphone to loudspeaker, frame by frame, with the hints that are there in time."""

import time
from typing import Protocol

import numpy as np

from knowledge_boosting.device_client.audio.live_audio import LiveAudio
from knowledge_boosting.device_client.audio.mixer import Mixer, Play
from knowledge_boosting.device_client.boosted_stream import BoostedStream
from knowledge_boosting.device_client.engines.engine import Engine
from knowledge_boosting.device_client.hints.reconnecting import LiveHints
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
        self._model, self._audio, self._hints, self._recorder = model, audio, hints, recorder
        self.stream = BoostedStream(engine, model, hints, ramp=True)
        self._mixer = Mixer(model.sources, model.microphones, play)
        self.choices = self._mixer.choices
        self.play = play
        # Figures. A frame's record is complete before it is counted.
        self.recent = np.zeros(RECENT, FRAME)
        self.frames = 0
        self.compute_ms = 0.0  # sum over all frames
        self.slowest_ms = 0.0

    def run(self) -> None:
        """Run until the audio ends."""
        stream, delay, chunk, hints = self.stream, self._model.delay, self._model.framing.chunk, self._hints
        while self._audio.read(stream.fresh):
            frame = stream.step(time.perf_counter_ns())
            play, compute_ms = self.play, frame.compute_ns / 1e6
            played = self._mixer.mix(play, frame.window[:, :chunk], frame.estimate)
            self._audio.write(played)

            used, age = frame.hint is not None, np.nan
            if used and hints is not None:
                age = hints.age_ms(frame.number - delay)
            self.compute_ms += compute_ms
            self.slowest_ms = max(self.slowest_ms, compute_ms)
            record = (used, age, compute_ms, np.abs(frame.fresh).max(), np.abs(played).max())
            self.recent[frame.number % RECENT] = record
            if self._recorder is not None:
                kept = self.recent[frame.number % RECENT].copy()
                self._recorder.put(frame.fresh.copy(), played, frame.hint, kept, play)
            self.frames = stream.frames
