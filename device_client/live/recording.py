"""Record a live session, and repeat a recorded session with bit-identical output.

A recording is a folder with these files:

- ``input.wav`` and ``output.wav``: the network's input and the played output, as float samples at the bundle's rate.
- ``frames.csv``: one line for each frame. Its column ``ages`` has the ages of the hints that were used, in frames.
- ``hints.f32``: these hints, in order.
- ``session.json``: the bundle, the initial mix and the speaker embedding.
"""

import csv
import os
import queue
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, get_args

import numpy as np
import soundfile
from pydantic import ValidationError

from knowledge_boosting.common import sound_files
from knowledge_boosting.common.errors import InputError, existing_file, reason
from knowledge_boosting.common.files import check_files, check_new_folder
from knowledge_boosting.device_client.audio.files import LARGEST_WAV, check_output, open_audio, write_sound
from knowledge_boosting.device_client.audio.mixer import Mixer, Play
from knowledge_boosting.device_client.boosted_stream import BoostedStream, split_frames
from knowledge_boosting.device_client.engines.engine import Model
from knowledge_boosting.device_client.speakers import is_embedding
from knowledge_boosting.models.arrivals import MERGES, Hint
from knowledge_boosting.models.config import ModelConfig, Strict
from knowledge_boosting.models.manifest import Manifest, read_json
from knowledge_boosting.protos.codec import Samples

_MAX_PENDING = 1250  # frames that wait for the disk
FILES = ("input.wav", "output.wav", "frames.csv", "hints.f32", "session.json")
_COLUMNS = ("frame", "hint", "age_ms", "compute_ms", "play", "ages")  # hint is the number of hints


class Session(Strict):
    """The content of ``session.json``."""

    schema_version: Literal[1] = 1
    bundle_name: str
    bundle_id: str
    play: Play
    speaker_embedding: list[float] | None


class Recorder:
    """Writes the frames of a session on its own thread, so that the frame loop never waits for the disk."""

    def __init__(self, folder: Path, manifest: Manifest, speaker_embedding: Samples | None, play: Play) -> None:
        """Create the folder and its files.

        Raises:
            InputError: The folder exists and is not empty, or it cannot be written.
        """
        check_folder(folder)
        framing, microphones = manifest.model.framing, manifest.model.microphones
        embedding = speaker_embedding.tolist() if speaker_embedding is not None else None
        session = Session(bundle_name=manifest.name, bundle_id=manifest.id, play=play, speaker_embedding=embedding)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "session.json").write_text(session.model_dump_json(indent=2) + "\n", encoding="utf-8")
            format_ = {"samplerate": framing.sample_rate, "channels": microphones, "format": "WAV", "subtype": "FLOAT"}
            self._input = soundfile.SoundFile(folder / "input.wav", "w", **format_)
            self._output = soundfile.SoundFile(folder / "output.wav", "w", **format_)
            self._hints = (folder / "hints.f32").open("wb")
            self._table = (folder / "frames.csv").open("w", newline="", encoding="utf-8")
        except (OSError, soundfile.LibsndfileError) as error:
            raise InputError(f"{folder}: cannot write there ({reason(error)}); choose another folder") from None
        self._rows = csv.writer(self._table)
        self._rows.writerow(_COLUMNS)
        self._folder = folder
        self._chunk, self._lookahead = framing.chunk, framing.lookahead
        self._hint_size = 4 * manifest.model.hint_channels * framing.bins
        self._frames: queue.SimpleQueue[tuple[Samples, Samples, Sequence[Hint], np.void, Play] | None]
        self._frames = queue.SimpleQueue()
        self.error: str | None = None
        self._thread = threading.Thread(target=self._write, name="kb-recorder", daemon=True)
        self._thread.start()

    def put(self, fresh: Samples, played: Samples, hints: Sequence[Hint], record: np.void, play: Play) -> None:
        """Store the next frame, as :meth:`FrameRecorder.put`."""
        if self.error is None and self._frames.qsize() >= _MAX_PENDING:
            self.error = "the disk is too slow"
        if self.error is None:
            self._frames.put((fresh, played, hints, record, play))

    def close(self) -> None:
        """Write the pending frames and close the files.

        If the recording could not be completed, ``error`` is set to a message, and the files are cut to whole frames.
        """
        self._frames.put(None)
        self._thread.join()
        for file in (self._input, self._output, self._hints, self._table):
            try:
                file.close()
            except (OSError, soundfile.LibsndfileError) as error:
                self.error = self.error or reason(error)
        if self.error is not None:
            frames = self._truncate()
            self.error = f"{self._folder}: the recording is cut short after {frames} frames ({self.error})"
        for name in ("input.wav", "output.wav"):
            with (self._folder / name).open("r+b", buffering=0) as file:
                sound_files.erase_timestamp(file)

    def _write(self) -> None:
        number = 0
        try:
            while (item := self._frames.get()) is not None:
                fresh, played, hints, record, play = item
                if (number + 2) * 4 * played.size > LARGEST_WAV:
                    raise OSError("a WAV file holds at most 4 GiB")
                self._input.write(fresh.T)
                self._output.write(played.T)
                for hint in hints:
                    self._hints.write(hint.values.astype("<f4").tobytes())
                age, ages = f"{record['age_ms']:.3f}" if hints else "", " ".join(str(hint.age) for hint in hints)
                self._rows.writerow([number, len(hints), age, f"{record['compute_ms']:.3f}", play, ages])
                number += 1
        except (OSError, soundfile.LibsndfileError, AssertionError) as error:
            self.error = self._system_error() or reason(error)

    def _system_error(self) -> str | None:
        """Write another file and return the error of the system, which libsndfile does not report. None if it works."""
        try:
            with tempfile.TemporaryFile(dir=self._folder) as probe:
                probe.write(bytes(1 << 20))
        except OSError as error:
            return reason(error)
        return None

    def _truncate(self) -> int:
        """Cut all files to the frames that are complete in each, so that they can be repeated. Return their number."""
        table = self._folder / "frames.csv"
        head, *rows = table.read_bytes().splitlines(keepends=True) or [b""]
        sounds = [
            (self._folder / name, lookahead) for name, lookahead in (("input.wav", self._lookahead), ("output.wav", 0))
        ]
        stored_hints = (self._folder / "hints.f32").stat().st_size // max(self._hint_size, 1)
        frames, hints = len(rows) - (not rows[-1].endswith(b"\n")) if rows else 0, 0
        for path, lookahead in sounds:
            frames = min(frames, max(0, soundfile.info(path).frames - lookahead) // self._chunk)
        for number, row in enumerate(rows[:frames]):
            used = int(row.split(b",")[1])
            if hints + used > stored_hints:
                frames = number
                break
            hints += used
        for path, lookahead in sounds:
            with soundfile.SoundFile(path, "r+") as file:
                file.truncate(frames * self._chunk + lookahead)
        os.truncate(self._folder / "hints.f32", hints * self._hint_size)
        os.truncate(table, len(head) + sum(map(len, rows[:frames])))
        return frames


def check_folder(folder: Path) -> None:
    """Check that a recording can be written to a folder.

    Raises:
        InputError: The folder exists and is not empty, or it cannot be written.
    """
    check_new_folder(folder)


class FrameLog:
    """The log of a recorded session, which can be repeated."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Read ``frames.csv`` and the other files in its folder.

        Raises:
            InputError: A file is missing or invalid, or the session was recorded with another bundle.
        """
        existing_file(path, "a frame log")
        document = read_json(existing_file(path.parent / "session.json", "the session of a frame log"))
        try:
            self.session = Session.model_validate(document)
            with path.open(newline="", encoding="utf-8") as file:
                rows = [(int(row["hint"]), row.get("ages"), row["play"]) for row in csv.DictReader(file)]
            play: dict[str, Play] = {name: name for name in get_args(Play)}
            self.play = [play[name] for _, _, name in rows]
            # Recordings of earlier versions have no ages. Their hints have the delay of the bundle.
            delay = manifest.model.delay
            self.ages = [[delay] * count if ages is None else list(map(int, ages.split())) for count, ages, _ in rows]
            if [len(ages) for ages in self.ages] != [count for count, _, _ in rows]:
                raise ValueError
        except (ValidationError, OSError, KeyError, TypeError, ValueError):
            text = f"{path}: is not a frame log; give the frames.csv that kb-client live --record writes"
            raise InputError(text) from None
        if self.session.bundle_id != manifest.id:
            name = self.session.bundle_name
            raise InputError(
                f"{path}: was recorded with the bundle {name} ({self.session.bundle_id}); give that bundle as --bundle"
            )
        model = manifest.model
        speaker = self.session.speaker_embedding
        self.speaker = np.array(speaker, np.float32) if speaker is not None else None
        if (self.speaker is not None) != model.needs_speaker or not (
            self.speaker is None or is_embedding(self.speaker)
        ):
            raise InputError(f"{path.parent / 'session.json'}: has no usable speaker embedding; copy the folder again")
        if not {self.session.play, *self.play} <= set(Mixer(model.sources, model.microphones, "bypass").choices):
            raise InputError(f"{path}: plays a speaker that the bundle does not have; copy the folder again")
        most = (MERGES if model.on_arrival else 1) if model.hint_channels else 0
        for frame, ages in enumerate(self.ages):
            if len(ages) > most or any(not model.delay <= age <= min(frame, model.max_age) for age in ages):
                raise InputError(f"{path}: lists hints at frames that cannot have one; it was changed, copy it again")
        count = sum(map(len, self.ages))
        size = 4 * model.hint_channels * model.framing.bins
        hints = existing_file(path.parent / "hints.f32", "the hints of a frame log")
        if hints.stat().st_size != size * count:
            text = f"{hints}: does not contain the {count} hints of {path.name}; copy both files again"
            raise InputError(text)
        self._hints = hints

    def run(self, model: Model, samples: Iterable[Samples]) -> Iterator[Samples]:
        """Repeat the session.

        Args:
            model: The small network of the session's bundle.
            samples: The recorded input, ``[M, n]`` at a time.

        Yields:
            The output that was played, ``[M, chunk]`` at a time.
        """
        config = model.manifest.model
        framing = config.framing
        mixer = Mixer(config.sources, config.microphones, self.session.play)
        with self._hints.open("rb") as file:
            hints = _RecordedHints(file, self.ages, config)
            stream = BoostedStream(model.session(self.speaker), config, hints)
            # The input is longer than the frames by the lookahead, which would give an additional frame.
            for play, (fresh, _) in zip(self.play, split_frames(samples, framing), strict=False):
                stream.fresh[:] = fresh
                frame = stream.step(0)
                yield mixer.mix(play, frame.window[:, : framing.chunk], frame.estimate)


class _RecordedHints:
    """A source of the recorded hints."""

    def __init__(self, file: BinaryIO, ages: Sequence[Sequence[int]], model: ModelConfig) -> None:
        self._file, self._ages = file, ages
        self._shape = model.hint_channels, model.framing.bins

    def send(self, frame: int, samples: Samples, now: int) -> None:
        """Discard the samples, because the hints are recorded already."""

    def take(self, frame: int, now: int) -> list[Hint]:
        size = self._shape[0] * self._shape[1]
        return [
            Hint(age, np.fromfile(self._file, "<f4", size).astype(np.float32).reshape(self._shape))
            for age in self._ages[frame]
        ]


def replay_recording(log_file: Path, source: Path, target: Path, model: Model) -> None:
    """Repeat a recorded session and write its output. The same hints at the same frames give the same samples.

    Args:
        log_file: The ``frames.csv`` of the session.
        source: The ``input.wav`` of the session.
        target: The file for the output.
        model: The small network of the session's bundle.

    Raises:
        InputError: A file cannot be used, or it does not belong to the frame log.
    """
    manifest = model.manifest
    framing, microphones = manifest.model.framing, manifest.model.microphones
    check_output(target, "float")
    check_files([source, *(log_file.parent / name for name in FILES)], [target])
    log = FrameLog(log_file, manifest)
    with open_audio(source) as file:
        length = framing.chunk * len(log.play) + framing.lookahead
        if (file.rate, file.channels, file.length) != (framing.sample_rate, microphones, length):
            raise InputError(f"{source}: is not the recording of {log_file}; give the input.wav from the same folder")
        with write_sound(target, framing.sample_rate, microphones, length, "float") as writer:
            for played in log.run(model, file.blocks()):
                writer.write(played)
