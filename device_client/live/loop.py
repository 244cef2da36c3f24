"""The frame loop of a live session, from audio input to audio output."""

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from knowledge_boosting.device_client.audio.live_audio import LiveAudio
from knowledge_boosting.device_client.audio.mixer import Mixer, Play
from knowledge_boosting.device_client.boosted_stream import BoostedStream
from knowledge_boosting.device_client.engines.engine import Engine
from knowledge_boosting.device_client.hints.reconnecting import LiveHints
from knowledge_boosting.models.arrivals import Hint
from knowledge_boosting.models.config import ModelConfig
from knowledge_boosting.protos.codec import Samples

RECENT_FRAMES = 1250  # ten seconds of 8 ms frames
FRAME_RECORD = np.dtype(
    [
        ("hints", np.uint8),  # number of hints that were used from this frame on
        # From the capture of the (first) hint's frame to the arrival of the hint; NaN without a hint.
        ("age_ms", np.float32),
        ("compute_ms", np.float32),  # time of the small network
        ("input_peak", np.float32),
        ("output_peak", np.float32),
    ]
)


class FrameRecorder(Protocol):
    """The interface of a recorder that stores every frame."""

    def put(self, fresh: Samples, played: Samples, hints: Sequence[Hint], record: np.void, play: Play) -> None:
        """Store the next frame without waiting.

        Args:
            fresh: The new input samples, ``[M, n]``.
            played: The output samples, ``[M, chunk]``.
            hints: The hints that were used from this frame on.
            record: A record of type :data:`FRAME_RECORD`.
            play: The mix that was played.
        """
        ...


class LiveLoop:
    """The frame loop of one live stream.

    :meth:`run` is called on the real-time thread. Other threads can read the figures, and set ``play`` and
    ``stream.hints_on``.
    """

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
        # The figures below are read by other threads. A frame is counted only when its record is complete.
        self.recent = np.zeros(RECENT_FRAMES, FRAME_RECORD)
        self.frames = 0
        self.compute_ms = 0.0  # sum over all frames
        self.slowest_ms = 0.0  # maximum over all frames

    def run(self) -> None:
        """Process frames until the audio ends."""
        stream, chunk, hints = self.stream, self._model.framing.chunk, self._hints
        while self._audio.read(stream.fresh):
            frame = stream.step(time.perf_counter_ns())
            play, compute_ms = self.play, frame.compute_ns / 1e6
            played = self._mixer.mix(play, frame.window[:, :chunk], frame.estimate)
            self._audio.write(played)

            used, age = len(frame.hints), np.nan
            if used and hints is not None:
                age = hints.age_ms(frame.number - frame.hints[0].age)
            self.compute_ms += compute_ms
            self.slowest_ms = max(self.slowest_ms, compute_ms)
            record = (used, age, compute_ms, np.abs(frame.fresh).max(), np.abs(played).max())
            self.recent[frame.number % RECENT_FRAMES] = record
            if self._recorder is not None:
                record_copy = self.recent[frame.number % RECENT_FRAMES].copy()
                self._recorder.put(frame.fresh.copy(), played, frame.hints, record_copy, play)
            self.frames = stream.frames
