"""Tests for sound files of every container: complete, cut short, and with a placeholder as the length."""

import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from knowledge_boosting.common.sound_files import UnusableSound, blocks, open_sound
from tests.sounds import wav

RATE = 16000


def speech(seconds: float = 1.5, channels: int = 2) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    noise = np.cumsum(np.random.default_rng(0).normal(0, 1, (round(RATE * seconds), channels)), axis=0)
    scaled: np.ndarray[tuple[int, int], np.dtype[np.float64]] = noise / np.abs(noise).max() / 1.1
    return scaled


def read(path: Path) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    with open_sound(path) as sound:
        return np.concatenate(list(blocks(sound)))


def fault(path: Path) -> str:
    with pytest.raises(UnusableSound) as caught:
        read(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("container", "encoding"),
    [
        *(("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "IMA_ADPCM"), ("WAVEX", "PCM_24"), ("RF64", "PCM_16")),
        *(
            ("RIFX", "PCM_16"),
            ("W64", "PCM_16"),
            ("AIFF", "PCM_16"),
            ("AIFF", "FLOAT"),
            ("AU", "PCM_16"),
            ("CAF", "PCM_16"),
        ),
        *(("NIST", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")),
    ],
)
def test_a_complete_file_is_read_and_a_truncated_one_is_refused(container: str, encoding: str, tmp_path: Path) -> None:
    path, cut = tmp_path / "whole", tmp_path / "cut"
    endian = "BIG" if container == "RIFX" else None
    container = {"RIFX": "WAV"}.get(container, container)
    soundfile.write(path, speech(), RATE, format=container, subtype=encoding, endian=endian)
    with soundfile.SoundFile(path) as sound:
        np.testing.assert_array_equal(read(path), sound.read(dtype="float32"))
    content = path.read_bytes()
    for share in (0.3, 0.5, 0.9, 0.99):
        cut.write_bytes(content[: int(share * len(content))])
        assert fault(cut).startswith("cut short"), share


@pytest.mark.parametrize("encoding", sorted(soundfile.available_subtypes("WAV")))
def test_every_encoding_of_wav_is_read_or_refused_in_a_line(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    for rate, channels in ((RATE, 2), (RATE, 1), (8000, 1)):
        try:
            soundfile.write(path, speech(channels=channels), rate, subtype=encoding)
        except soundfile.LibsndfileError:
            continue  # some encodings, such as GSM 6.10, allow only one channel or one rate
        try:
            samples = read(path)
        except UnusableSound as error:
            assert "\n" not in str(error)
        else:
            assert len(samples) >= RATE
        return
    pytest.skip("libsndfile cannot write this encoding")


@pytest.mark.parametrize(
    "sizes",
    [
        (0x7FFFF024, 0x7FFFF000),  # sox
        (0x7FFFF000 + 36 - 4, 0x7FFFF000 - 4),  # sox, rounded to another frame size
        (0x80000024, 0x80000000),  # arecord
        (0x7FFFFFFF, 0x7FFFFFFF - 36),
        (0xFFFFFFFF, 0xFFFFFFFF),  # ffmpeg
        (0xFFFFFFFF, 0xFFFFFFFF - 36),
        (0, 0),  # a program that was killed before it wrote the length
        (36, 0),
        (8, 0),
    ],
)
@pytest.mark.parametrize("extra", [b"", b"LIST" + struct.pack("<I", 5) + b"hello\0"])
def test_a_file_with_a_placeholder_as_length_is_read_to_the_end(
    sizes: tuple[int, int], extra: bytes, tmp_path: Path
) -> None:
    pcm = np.round(speech() * 32767).astype("<i2")
    path = tmp_path / "pipe.wav"
    path.write_bytes(wav(pcm, RATE, sizes, extra))
    np.testing.assert_array_equal(read(path), (pcm / 32768).astype(np.float32))


def test_an_empty_wav_is_reported_as_empty(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "empty.wav", np.zeros((0, 2)), RATE)
    assert fault(tmp_path / "empty.wav") == "holds no samples"
    # The length of the data chunk is 0, and the chunk that follows contains no sound.
    listed = wav(np.zeros((0, 2), "<i2"), RATE) + b"LIST" + struct.pack("<I", 4) + b"INFO"
    (tmp_path / "listed.wav").write_bytes(listed[:4] + struct.pack("<I", len(listed) - 8) + listed[8:])
    assert fault(tmp_path / "listed.wav") == "holds no samples"


def test_placeholders_in_other_containers_are_read_to_the_end(tmp_path: Path) -> None:
    for container, at, width in (("AU", 8, 4), ("FLAC", 21, 5)):
        path = tmp_path / container
        soundfile.write(path, speech(), RATE, format=container, subtype="PCM_16")
        expected, content = soundfile.read(path, dtype="float32")[0], bytearray(path.read_bytes())
        if container == "AU":
            content[at : at + width] = b"\xff" * 4
        else:
            content[at] &= 0xF0  # the length has 36 bits, and the first four are half a byte
            content[at + 1 : at + width] = bytes(4)
        path.write_bytes(content)
        np.testing.assert_array_equal(read(path), expected)


@pytest.mark.parametrize("rate", [1, 50, 999, 800_000, 2**31 - 1])
def test_absurd_rates_are_refused(rate: int, tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    path.write_bytes(wav(np.zeros((100, 2), "<i2"), rate))
    assert f"its sample rate is {rate} Hz" in fault(path)


@pytest.mark.parametrize("value", [1e38, -1e38, 3e9, np.nan, np.inf])
def test_samples_that_are_not_finite_or_too_large_are_refused(value: float, tmp_path: Path) -> None:
    samples = speech().astype(np.float32)
    samples[-1, 1] = value
    soundfile.write(tmp_path / "x.wav", samples, RATE, subtype="FLOAT")
    assert fault(tmp_path / "x.wav").startswith("has samples ")


def test_a_sound_file_can_have_any_name(tmp_path: Path) -> None:
    for name in ("no suffix", "headerless.raw", "\udcff\udcfe.wav", "[b]$x$.wav"):
        path = tmp_path / name
        path.write_bytes(wav(np.zeros((100, 2), "<i2"), RATE))
        assert len(read(path)) == 100


def test_damaged_headers_are_refused_with_one_line(tmp_path: Path) -> None:
    """A file with changed header bytes, or cut anywhere, is read or refused. It causes no other exception."""
    rng = np.random.default_rng(1)
    for container, encoding in (
        ("WAV", "PCM_16"),
        ("RF64", "PCM_16"),
        ("W64", "PCM_16"),
        ("AIFF", "PCM_16"),
    ):
        path = tmp_path / container
        soundfile.write(path, speech(0.1), RATE, format=container, subtype=encoding)
        content = path.read_bytes()
        for _ in range(150):
            broken = bytearray(content[: rng.integers(len(content)) if rng.random() < 0.3 else None])
            for place in rng.integers(0, min(150, max(1, len(broken))), 3):
                if place < len(broken):
                    broken[place] = rng.integers(256)
            path.write_bytes(broken)
            try:
                read(path)
            except UnusableSound as error:
                assert "\n" not in str(error)
