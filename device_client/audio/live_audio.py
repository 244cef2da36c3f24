"""The interface of live audio, and its implementation with sound files. ``devices`` has the one with a sound card."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from knowledge_boosting.common.cli import warn
from knowledge_boosting.common.errors import Failure, InputError
from knowledge_boosting.device_client.audio.files import (
    AudioFile,
    OutputStream,
    SampleFormat,
    SoundWriter,
    check_channels,
    holds_floats,
    open_audio,
    write_sound,
)
from knowledge_boosting.models.config import Framing
from knowledge_boosting.protos.codec import Samples


class LiveAudio(Protocol):
    """Audio input and output at the bundle's sample rate."""

    underruns: int  # number of times that samples for playback came too late
    overruns: int  # number of times that captured samples were lost

    @property
    def latency_ms(self) -> float | None:
        """The latency from microphone to loudspeaker, or None if there are no devices."""
        ...

    def start(self) -> None:
        """Start capture and playback."""
        ...

    def read(self, samples: Samples) -> bool:
        """Wait for the next captured samples and store them in ``samples`` ``[M, n]``. Return False at the end."""
        ...

    def write(self, samples: Samples) -> None:
        """Add samples ``[M, n]`` to the end of the playback."""
        ...

    def stop(self) -> None:
        """End the audio, so that :meth:`read` returns False. This can be called from any thread."""
        ...


class FileAudio:
    """Live audio from a recording, paced in real time. The played samples are written to a file."""

    def __init__(self, source: AudioFile, framing: Framing, microphones: int, target: SoundWriter) -> None:
        """Prepare the audio of ``source``, which is padded with zeros to whole frames. ``target`` gets the output."""
        self._framing, self._target = framing, target
        self._blocks = source.resampled_blocks(microphones, framing.sample_rate)
        self._pending = np.zeros((microphones, 0), np.float32)
        self._output = OutputStream((microphones,), framing.sample_rate, source)
        self._captured = self._played = self._started_at = 0
        self._length: int | None = None  # samples of the recording; None until its end is reached
        self._stopped = False
        self.underruns = 0
        self.overruns = 0
        self.error: str | None = None

    @property
    def latency_ms(self) -> float | None:
        return None

    def start(self) -> None:
        self._started_at = time.perf_counter_ns()

    def read(self, samples: Samples) -> bool:
        count = samples.shape[1]
        if self._stopped or not self._fetch(count):
            return False
        while (left := (self._captured + count) / self._framing.sample_rate - self._elapsed()) > 0:
            time.sleep(left)
        samples[:] = self._pending[:, :count]
        self._pending = self._pending[:, count:]
        self._captured += count
        return True

    def _fetch(self, count: int) -> bool:
        """Read until ``count`` samples are pending. Return False if there are not as many, including the padding."""
        while self._pending.shape[1] < count and self._length is None:
            block = next(self._blocks, None)
            if block is not None:
                self._pending = np.concatenate([self._pending, block], axis=1)
                continue
            self._length = self._captured + self._pending.shape[1]
            padded_length = self._framing.frames(self._length) * self._framing.chunk + self._framing.lookahead
            self._pending = np.pad(self._pending, ((0, 0), (0, padded_length - self._length)))
        return self._pending.shape[1] >= count

    def write(self, samples: Samples) -> None:
        # A sound card would start to play these samples when the next chunk has been captured.
        due = (self._played + samples.shape[1] + self._framing.n_fft) / self._framing.sample_rate
        self.underruns += self._elapsed() > due
        if self._length is not None:
            samples = samples[:, : self._length - self._played]
        self._played += samples.shape[1]
        try:
            for converted in self._output.add(samples):
                self._target.write(converted)
        except InputError as error:
            self._stop_writing(error)

    def finish(self) -> None:
        """Write the last samples. If the recording was played to its end, the output has the same length."""
        if self.error is None:
            try:
                for converted in self._output.finish(whole=not self._stopped):
                    self._target.write(converted)
            except InputError as error:
                self._stop_writing(error)

    def stop(self) -> None:
        self._stopped = True

    def _stop_writing(self, error: InputError) -> None:
        # A live session cannot be repeated, so the part that was written is kept.
        self.error = f"{error}; the part that was played before is kept"
        self._stopped = True

    def _elapsed(self) -> float:
        return (time.perf_counter_ns() - self._started_at) / 1e9


@contextmanager
def open_file_audio(source: Path, target: Path, framing: Framing, microphones: int) -> Iterator[FileAudio]:
    """Open a recording as live audio. The output file appears when the block ends without an error.

    The output has the rate of the recording. Its samples are floating point if those of the recording are and the
    format of the file supports it, otherwise 16 bits.

    Raises:
        InputError: A file cannot be used.
        Failure: The output could not be written to its end. The file contains the part before.
    """
    with open_audio(source) as recording:
        if (warning := check_channels(recording, microphones)) is not None:
            warn(warning)
        sample_format: SampleFormat = "float" if recording.floating and holds_floats(target) else "s16"
        with write_sound(target, recording.rate, microphones, recording.length, sample_format) as file:
            audio = FileAudio(recording, framing, microphones, file)
            yield audio
            audio.finish()
    if file.clipped:
        warn(f"{file.clipped} samples exceed full scale and were clipped; use an input with float samples to keep them")
    if audio.error is not None:
        raise Failure(audio.error)
