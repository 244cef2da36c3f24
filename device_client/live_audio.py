"""Where live audio comes from and goes to: a recording's file here, a sound card in ``device_audio``."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import soundfile

from common.errors import InputError, reason
from common.files import atomic_file
from device_client import audio
from models.config import Framing
from protos.codec import Samples


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
    """A recording as if it were captured now, in real time; what would be played goes to a file."""

    def __init__(self, samples: Samples, framing: Framing, file: soundfile.SoundFile) -> None:
        """Audio of the samples ``[M, N]``, padded with zeros to whole frames."""
        length = framing.frames(samples.shape[1]) * framing.chunk + framing.lookahead
        self._samples, self._framing, self._file = audio.fit_length(samples, length), framing, file
        self._captured = self._played = self._started_at = 0
        self._stopped = False
        self.underruns = 0
        self.overruns = 0

    def start(self) -> None:
        self._started_at = time.perf_counter_ns()

    def read(self, samples: Samples) -> bool:
        end = self._captured + samples.shape[1]
        if self._stopped or end > self._samples.shape[1]:
            return False
        while (left := end / self._framing.sample_rate - self._elapsed()) > 0:
            time.sleep(left)
        samples[:] = self._samples[:, self._captured : end]
        self._captured = end
        return True

    def write(self, samples: Samples) -> None:
        # A sound card would begin to play this when the next chunk has been captured.
        due = (self._played + samples.shape[1] + self._framing.n_fft) / self._framing.sample_rate
        self.underruns += self._elapsed() > due
        self._played += samples.shape[1]
        self._file.write(samples.T)

    def stop(self) -> None:
        self._stopped = True

    def _elapsed(self) -> float:
        return (time.perf_counter_ns() - self._started_at) / 1e9


@contextmanager
def open_file_audio(source: Path, target: Path, framing: Framing, microphones: int) -> Iterator[FileAudio]:
    """A recording as live audio. The output file appears, with float samples, when the block ends without an error.

    Raises:
        InputError: a file cannot be used.
    """
    audio.check_output(target, "float")
    recording = audio.read_audio(source)
    samples, _ = audio.to_microphones(recording, microphones, source)
    samples = audio.resample(samples, recording.rate, framing.sample_rate)
    with atomic_file(target) as temporary:
        try:
            with soundfile.SoundFile(temporary, "w", framing.sample_rate, microphones, "FLOAT", format="WAV") as file:
                yield FileAudio(np.ascontiguousarray(samples), framing, file)
            audio.erase_time(temporary)
        except soundfile.LibsndfileError as error:
            raise InputError(f"{target}: cannot write ({reason(error)})") from None
