"""Tests for long recordings: constant memory, and the same samples as with the whole signal at once."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from knowledge_boosting.device_client.audio.files import OutputStream, open_audio
from knowledge_boosting.device_client.boosted_stream import BoostedStream, split_frames
from knowledge_boosting.device_client.replay.plot import Spectrogram
from knowledge_boosting.device_client.replay.tally import Tally
from knowledge_boosting.models.arrivals import Hint
from knowledge_boosting.models.checkpoint import build
from knowledge_boosting.models.config import Alone, Framing, NetworkSize
from knowledge_boosting.models.networks import write_bundle
from knowledge_boosting.protos.codec import Samples
from tests.processes import command, environment

TINY = Alone(task="ss", framing=Framing(), network=NetworkSize(channels=4, hidden=4, blocks=1))


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a very fast network."""
    path = tmp_path_factory.mktemp("tiny") / "tiny"
    write_bundle(path, build(TINY), TINY, untrained=True, source="random", configuration="test")
    return path


def write_noise(path: Path, seconds: float, rate: int = 48000) -> Path:
    rng = np.random.default_rng(0)
    with soundfile.SoundFile(path, "w", rate, 2, "PCM_16") as file:
        for first in range(0, round(seconds * rate), 10 * rate):
            file.write(rng.uniform(-0.3, 0.3, (min(10 * rate, round(seconds * rate) - first), 2)))
    return path


def replay(source: Path, bundle: Path, *flags: object) -> float:
    """Run a replay, and return its peak memory in MiB."""
    target = source.with_name(f"{source.stem}-out.wav")
    call = command("kb-client", "replay", source, "-o", target, "--bundle", bundle, *flags)
    # A process inherits the peak of its parent, so it is started by a small process.
    measure = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", measure, *call], env=environment(), stdout=subprocess.PIPE, check=True
    )
    return int(result.stdout) / 1024


class Three:
    """A network with three outputs that are multiples of the input."""

    overflows = 0

    def step(self, window: Samples, hints: Sequence[Hint] = ()) -> Samples:
        estimate: Samples = np.stack([window, 2 * window, -window])[..., :128]
        return estimate


@pytest.mark.parametrize(
    ("rate", "length"), [(16000, 30011), (44100, 50021), (8000, 9973), (48000, 3), (192_000, 11), (16000, 1)]
)
def test_blocks_give_the_same_samples_as_a_whole_signal(rate: int, length: int, tmp_path: Path) -> None:
    """Resampling in both directions block by block is compared with one call of the resampler for each direction."""
    samples = np.random.default_rng(2).uniform(-0.9, 0.9, (length, 2)).astype(np.float32)
    soundfile.write(tmp_path / "in.wav", samples, rate, subtype="FLOAT")
    whole = soxr.resample(samples, rate, 16000, quality="VHQ") if rate != 16000 else samples
    if not len(whole):
        whole = np.zeros((1, 2), np.float32)
    frames = -(-len(whole) // 128)
    padded = np.pad(whole, ((0, 128 * frames + 64 - len(whole)), (0, 0)))
    with open_audio(tmp_path / "in.wav") as file:
        stream, out, count = OutputStream((3, 2), 16000, file), list[Samples](), 0
        loop = BoostedStream(Three(), TINY)
        for fresh, valid in split_frames(file.resampled_blocks(2, 16000), Framing()):
            loop.fresh[:] = fresh
            frame = loop.step(0)
            np.testing.assert_array_equal(frame.window, padded[128 * frame.number :][:192].T)
            out += stream.add(frame.estimate[..., :valid])
            count += 1
        out += stream.finish()
    assert count == frames
    result = np.concatenate(out, axis=-1)
    estimate = np.concatenate([whole, 2 * whole, -whole], axis=1)
    resampled = soxr.resample(estimate, 16000, rate, quality="VHQ") if rate != 16000 else estimate
    expected = np.zeros((length, 6), np.float32)
    expected[: len(resampled)] = resampled[:length]
    np.testing.assert_array_equal(result.reshape(6, -1).T, expected)


def test_memory_does_not_grow_with_the_recording(tiny_bundle: Path, tmp_path: Path) -> None:
    short, long = (
        replay(write_noise(tmp_path / f"{s}.wav", s), tiny_bundle, "--report", tmp_path / "r") for s in (2, 60)
    )
    # 60 seconds at 48 kHz are 22 MiB of samples.
    assert long < short + 4


@pytest.mark.long
def test_an_hour_takes_at_most_300_mb_and_begins_like_a_shorter_recording(tiny_bundle: Path, tmp_path: Path) -> None:
    hour, minutes = write_noise(tmp_path / "hour.wav", 3600), write_noise(tmp_path / "minutes.wav", 600)
    peak = replay(hour, tiny_bundle, "--report", tmp_path / "report.json")
    print(f"an hour: {peak:.0f} MiB")
    assert peak * 2**20 <= 300e6
    replay(minutes, tiny_bundle)
    for number in (1, 2):
        names = [tmp_path / f"{name}-out-speaker{number}.wav" for name in ("hour", "minutes")]
        assert [soundfile.info(name).frames for name in names] == [3600 * 48000, 600 * 48000]
        with soundfile.SoundFile(names[0]) as first, soundfile.SoundFile(names[1]) as second:
            # At the end of the ten minutes the inputs differ, and both resamplers look ahead.
            for _ in range(599):
                np.testing.assert_array_equal(first.read(48000, dtype="int16"), second.read(48000, dtype="int16"))
            overlap = [file.read(48000 - 4800, dtype="int16") for file in (first, second)]
            np.testing.assert_array_equal(*overlap)


def pieces(signal: Samples) -> Iterator[Samples]:
    rng, first = np.random.default_rng(3), 0
    while first < len(signal):
        last = first + int(rng.integers(1, 5000))
        yield signal[first:last]
        first = last


@pytest.mark.parametrize("seconds", [0.01, 1.0, 30.0])
def test_a_spectrogram_does_not_depend_on_the_block_size(seconds: float) -> None:
    rate = 16000
    tone = np.sin(2 * np.pi * 2000 * np.arange(round(seconds * rate)) / rate).astype(np.float32)
    whole, pieced = Spectrogram(rate, len(tone)), Spectrogram(rate, len(tone))
    whole.add(tone)
    for piece in pieces(tone):
        pieced.add(piece)
    level, extent = whole.levels()
    np.testing.assert_allclose(pieced.levels()[0], level, atol=1e-4)
    assert level.shape[1] <= 1200
    assert extent == (0.0, max(seconds, 0.032), 0.0, 8.0)
    assert (level[64] > level[80] + 60).all() or seconds < 0.032  # 2 kHz and 2.5 kHz
    assert level[64].max() == pytest.approx(0, abs=0.1) or seconds < 0.032


def test_a_tally_has_the_percentiles_of_its_values() -> None:
    values = np.random.default_rng(4).integers(0, 5000, 1000)
    one_by_one, at_once = Tally(), Tally()
    for value in values.tolist():
        one_by_one.add(value)
    at_once.add_all(values)
    for q in (0, 50, 95, 99, 100):
        expected = float(np.percentile(values, q)) / 1e3
        assert one_by_one.percentile_ms(q) == pytest.approx(expected)
        assert at_once.percentile_ms(q) == pytest.approx(expected)
    assert (len(at_once), at_once.total) == (1000, values.sum())
