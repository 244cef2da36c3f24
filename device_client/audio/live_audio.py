"""Where live audio comes from and goes to: sound files here, a sound card in ``device_audio``."""

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
    """Audio in both directions, at the bundle's rate."""

    underruns: int  # how often there was nothing to play in time
    overruns: int  # how often samples were lost that had been captured

    def start(self) -> None:
        """Begin to capture and play."""
        ...

    def read(self, samples: Samples) -> bool:
        """Wait for the next ``n`` samples and put them into ``[M, n]``; False when no more come."""
        ...

    def write(self, samples: Samples) -> None:
        """Play the samples ``[M, n]`` next."""
        ...

    def stop(self) -> None:
        """End the waiting; may be called from another thread."""
        ...


class FileAudio:
    """A recording as if it were captured now, in real time; what would be played goes to a file of its rate."""

    def __init__(self, source: AudioFile, framing: Framing, microphones: int, target: SoundWriter) -> None:
        """Audio of a recording, padded with zeros to whole frames."""
        self._framing, self._target = framing, target
        self._blocks = source.heard(microphones, framing.sample_rate)
        self._waiting = np.zeros((microphones, 0), np.float32)
        self._output = OutputStream((microphones,), framing.sample_rate, source)
        self._captured = self._played = self._started_at = 0
        self._length: int | None = None  # samples of the recording, once that is known
        self._stopped = False
        self.underruns = 0
        self.overruns = 0
        self.trouble: str | None = None

    def start(self) -> None:
        self._started_at = time.perf_counter_ns()

    def read(self, samples: Samples) -> bool:
        count = samples.shape[1]
        if self._stopped or not self._fetch(count):
            return False
        while (left := (self._captured + count) / self._framing.sample_rate - self._elapsed()) > 0:
            time.sleep(left)
        samples[:] = self._waiting[:, :count]
        self._waiting = self._waiting[:, count:]
        self._captured += count
        return True

    def _fetch(self, count: int) -> bool:
        """Whether there are as many samples, zeros after the last ones included."""
        while self._waiting.shape[1] < count and self._length is None:
            block = next(self._blocks, None)
            if block is not None:
                self._waiting = np.concatenate([self._waiting, block], axis=1)
                continue
            self._length = self._captured + self._waiting.shape[1]
            whole = self._framing.frames(self._length) * self._framing.chunk + self._framing.lookahead
            self._waiting = np.pad(self._waiting, ((0, 0), (0, whole - self._length)))
        return self._waiting.shape[1] >= count

    def write(self, samples: Samples) -> None:
        # A sound card would begin to play this when the next chunk has been captured.
        due = (self._played + samples.shape[1] + self._framing.n_fft) / self._framing.sample_rate
        self.underruns += self._elapsed() > due
        if self._length is not None:
            samples = samples[:, : self._length - self._played]
        self._played += samples.shape[1]
        try:
            for converted in self._output.add(samples):
                self._target.write(converted)
        except InputError as error:
            self._give_up(error)

    def finish(self) -> None:
        """Write what is left; the whole recording's length if it was run to its end."""
        if self.trouble is None:
            try:
                for converted in self._output.finish(whole=not self._stopped):
                    self._target.write(converted)
            except InputError as error:
                self._give_up(error)

    def stop(self) -> None:
        self._stopped = True

    def _give_up(self, error: InputError) -> None:
        # A session cannot be had again: what was written of it stays.
        self.trouble = f"{error}; what was played before is kept"
        self._stopped = True

    def _elapsed(self) -> float:
        return (time.perf_counter_ns() - self._started_at) / 1e9


@contextmanager
def open_file_audio(source: Path, target: Path, framing: Framing, microphones: int) -> Iterator[FileAudio]:
    """A recording as live audio. The output appears, at the recording's rate, when the block ends without an error.

    Its samples are floating point if the recording's are and the file can hold them, else 16 bits.

    Raises:
        InputError: a file cannot be used.
        Failure: the output could not be written to its end; what could is there.
    """
    with open_audio(source) as recording:
        if (warning := check_channels(recording, microphones)) is not None:
            warn(warning)
        sample_format: SampleFormat = "float" if recording.floating and holds_floats(target) else "s16"
        with write_sound(target, recording.rate, microphones, sample_format) as file:
            opened = FileAudio(recording, framing, microphones, file)
            yield opened
            opened.finish()
    if file.clipped:
        warn(f"{file.clipped} samples exceed full scale and were clipped; an input with float samples keeps them")
    if opened.trouble is not None:
        raise Failure(opened.trouble)
