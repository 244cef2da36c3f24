"""The speakers and utterances in folders of speech, and the segments that are drawn from them."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.models.speaker_encoder import NoSpeech
from knowledge_boosting.training.data.corpus import (
    SAMPLE_RATE,
    BrokenFile,
    Segment,
    Utterance,
    find_noise,
    find_speech,
    read_segment,
    read_speech,
)
from knowledge_boosting.training.data.speakers import (
    Speaker,
    draw_segments,
    draw_sources,
    select_speakers,
    split_speakers,
)
from tests.sounds import wav


def write_noise(path: Path, seconds: float = 2, rate: int = SAMPLE_RATE, channels: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, (round(seconds * rate), channels))
    soundfile.write(path, noise, rate)
    return path


def speaker(name: str, *seconds: float) -> Speaker:
    utterances = tuple(
        Utterance(Path(f"{name}{i}.wav"), f"{name}{i}.wav", round(length * SAMPLE_RATE))
        for i, length in enumerate(seconds)
    )
    return Speaker(name, utterances, utterances)


@pytest.mark.parametrize(
    ("files", "speakers"),
    [
        (["84/121123/84-121123-0000.flac", "174/50561/174-50561-0000.flac"], ["174", "84"]),
        (["train-clean-100/84/121123/84-121123-0000.flac", "dev-other/174/1/174-1-0000.flac"], ["174", "84"]),
        (["ann/one.wav", "ann/deep/two.wav", "bob/one.mp3"], ["ann", "bob"]),
        (["ann-1.ogg", "bob-red-2.wav", "ann-2.wav"], ["ann", "bob"]),
        (["84-1-1.ogg", "valid/174-1-1.ogg", "valid/174-1-1.txt", "valid/.x-1.wav"], ["174", "84"]),
    ],
)
def test_the_speakers_of_every_layout_are_found(files: list[str], speakers: list[str], tmp_path: Path) -> None:
    for file in files:
        if file.endswith(".txt") or "/." in file:
            (tmp_path / file).write_text("a transcript")
        else:
            write_noise(tmp_path / file)
    corpus = find_speech(tmp_path, skip_broken=False)
    assert list(corpus.speakers) == speakers
    assert all(utterance.length == 2 * SAMPLE_RATE for own in corpus.speakers.values() for utterance in own)


def test_folders_that_are_links_are_part_of_a_corpus(tmp_path: Path) -> None:
    write_noise(tmp_path / "elsewhere" / "one.wav")
    write_noise(tmp_path / "corpus" / "bob" / "one.wav")
    (tmp_path / "corpus" / "ann").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "bob" / "loop").symlink_to(tmp_path / "corpus")
    for folder in ("corpus", "link"):
        if folder == "link":
            (tmp_path / folder).symlink_to(tmp_path / "corpus")
        speakers = find_speech(tmp_path / folder, skip_broken=False).speakers
        assert {name: [each.name for each in own] for name, own in speakers.items()} == {
            "ann": ["ann/one.wav"],
            "bob": ["bob/one.wav"],
        }
    assert [noise.name for noise in find_noise(tmp_path / "corpus")] == ["ann/one.wav", "bob/one.wav"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_noise(tmp_path / "ann" / "one.wav")
    write_noise(tmp_path / "bob" / "one.wav")
    scandir = os.scandir

    def guarded(path: str) -> object:  # root may read every folder
        if Path(path).name == "bob":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    for find in (lambda: find_speech(tmp_path, skip_broken=True), lambda: find_noise(tmp_path)):
        with pytest.raises(InputError, match=r"bob: cannot be read \(Permission denied\)"):
            find()


def test_a_corpus_is_the_same_wherever_it_lies(tmp_path: Path) -> None:
    digests = set()
    for folder in ("a", "b"):
        write_noise(tmp_path / folder / "ann-1.wav")
        write_noise(tmp_path / folder / "bob-1.wav")
        digests.add(find_speech(tmp_path / folder, skip_broken=False).digest)
    write_noise(tmp_path / "b" / "bob-1.wav", seconds=3)
    digests.add(find_speech(tmp_path / "b", skip_broken=False).digest)
    assert len(digests) == 2


def test_folders_without_speech_of_a_known_speaker_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        find_speech(tmp_path / "none", skip_broken=False)
    with pytest.raises(InputError, match="holds no usable speech"):
        find_speech(tmp_path, skip_broken=False)
    write_noise(tmp_path / "nobody.wav")
    with pytest.raises(InputError, match=r"nobody\.wav: the name does not say who speaks"):
        find_speech(tmp_path, skip_broken=False)


def test_broken_files_are_named_or_skipped(tmp_path: Path) -> None:
    write_noise(tmp_path / "good-1.wav")
    cases = {
        write_noise(tmp_path / "low-1.wav", rate=8000): "sampled at 8000 Hz; at least 16000",
        write_noise(tmp_path / "wide-1.wav", channels=2): "has 2 channels; speech must be mono",
        write_noise(tmp_path / "empty-1.wav", seconds=0): "holds no samples",
        tmp_path / "text-1.wav": "not readable as audio",
    }
    (tmp_path / "text-1.wav").write_text("no audio at all")
    corpus = find_speech(tmp_path, skip_broken=True)
    assert list(corpus.speakers) == ["good"]
    assert set(corpus.broken) == set(cases)
    for path, expected in cases.items():
        others = [other for other in cases if other != path and other.exists()]
        hidden = [other.rename(other.with_suffix(".away")) for other in others]
        with pytest.raises(BrokenFile, match=expected) as refused:
            find_speech(tmp_path, skip_broken=False)
        assert str(refused.value).startswith(f"{path}: ")
        assert "--skip-broken" in str(refused.value)
        for other in hidden:
            other.rename(other.with_suffix(".wav"))


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_a_segment_is_that_part_of_the_file(suffix: str, tmp_path: Path) -> None:
    path = write_noise(tmp_path / f"ann-1.{suffix}", 3)
    whole, _ = soundfile.read(path, dtype="float32")
    found = read_segment(Segment(Utterance(path, path.name, len(whole)), 12345, 20000))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, whole[12345:32345], atol=1e-6)


def test_higher_rates_are_resampled(tmp_path: Path) -> None:
    rate, start, length = 44100, 8000, 16000
    time = np.arange(2 * rate) / rate
    soundfile.write(tmp_path / "ann-1.wav", 0.5 * np.sin(2 * np.pi * 440 * time), rate)
    (utterance,) = find_speech(tmp_path, skip_broken=False).speakers["ann"]
    assert utterance.length == 2 * SAMPLE_RATE
    found = read_segment(Segment(utterance, start, length))
    expected = 0.5 * np.sin(2 * np.pi * 440 * (np.arange(length) + start) / SAMPLE_RATE)
    np.testing.assert_allclose(found[500:-500], expected[500:-500], atol=1e-3)
    # This segment includes the last sample of the file.
    assert read_segment(Segment(utterance, utterance.length - length, length)).shape == (length,)


def test_damage_within_a_file_is_noticed(tmp_path: Path) -> None:
    path = write_noise(tmp_path / "ann-1.flac", 4)
    path.write_bytes(path.read_bytes()[:40000])
    (utterance,) = find_speech(tmp_path, skip_broken=False).speakers["ann"]
    with pytest.raises(BrokenFile, match=r"ann-1\.flac: "):
        read_segment(Segment(utterance, 40000, 20000))
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), SAMPLE_RATE, subtype="FLOAT")
    with pytest.raises(BrokenFile, match="NaN or infinite"):
        read_segment(Segment(Utterance(tmp_path / "nan.wav", "nan.wav", 100), 0, 100))


def test_silence_is_no_speech_and_speech_is_faded(tmp_path: Path) -> None:
    samples = np.concatenate([np.zeros(16000), np.full(16000, 0.25)])
    soundfile.write(tmp_path / "ann-1.wav", samples, SAMPLE_RATE)
    utterance = Utterance(tmp_path / "ann-1.wav", "ann-1.wav", 32000)
    with pytest.raises(NoSpeech, match="silent from sample 0"):
        read_speech(Segment(utterance, 0, 16000))
    speech = read_speech(Segment(utterance, 16000, 16000))
    assert abs(speech[0]) < 1e-4
    assert abs(speech[-1]) < 1e-4
    np.testing.assert_allclose(speech[320:-320], 0.25)


def test_short_speech_is_left_out(tmp_path: Path) -> None:
    for name, seconds in (("ann-1", 5), ("bob-1", 3), ("bob-2", 2), ("cleo-1", 3), ("dan-1", 2), ("dan-2", 2)):
        write_noise(tmp_path / f"{name}.wav", seconds)
    corpus = find_speech(tmp_path, skip_broken=False)
    assert list(select_speakers(corpus, 3 * SAMPLE_RATE, 0)) == ["ann", "bob", "cleo"]
    found = select_speakers(corpus, 3 * SAMPLE_RATE, 2 * SAMPLE_RATE)
    assert list(found) == ["ann", "bob"]
    assert [utterance.name for utterance in found["bob"].mixable] == ["bob-1.wav"]
    assert [utterance.name for utterance in found["bob"].enrollable] == ["bob-1.wav", "bob-2.wav"]


@pytest.mark.parametrize("utterances", [(9.0,), (6.0,), (5.0, 9.0), (4.0, 2.0)])
def test_enrollment_is_never_the_segment_that_is_mixed(utterances: tuple[float, ...]) -> None:
    everything = speaker("ann", *utterances)
    length, enrollment = 4 * SAMPLE_RATE, 2 * SAMPLE_RATE
    own = Speaker("ann", tuple(u for u in everything.mixable if u.length >= length), everything.enrollable)
    rng = np.random.default_rng(0)
    orders = set()
    for _ in range(200):
        mixed, other = draw_segments(rng, own, length, enrollment)
        assert (mixed.length, other.length) == (length, enrollment)
        for segment in (mixed, other):
            assert 0 <= segment.start <= segment.utterance.length - segment.length
        if len(utterances) > 1:
            assert mixed.utterance != other.utterance
        else:
            assert mixed.start + length <= other.start or other.start + enrollment <= mixed.start
            orders.add(mixed.start < other.start)
    assert len(orders) == (2 if len(utterances) == 1 else 0)


def test_splits_share_no_speaker() -> None:
    speakers = {name: speaker(name, 9) for name in map(str, range(41))}
    for splits, sizes in (
        (["train", "val", "test"], [33, 4, 4]),
        (["train", "test"], [37, 4]),
        (["val", "test"], [21, 20]),
        (["test"], [41]),
        ([], []),
    ):
        divided = split_speakers(speakers, splits, seed=3)
        assert divided == split_speakers(dict(reversed(speakers.items())), splits, seed=3)
        assert [len(divided[split]) for split in splits] == sizes
        assert len({own.name for split in splits for own in divided[split]}) == sum(sizes)
    assert split_speakers(speakers, ["train", "val"], seed=3) != split_speakers(speakers, ["train", "val"], seed=4)
    with pytest.raises(ValueError, match="5 speakers for 3 splits"):
        split_speakers(dict(list(speakers.items())[:5]), ["train", "val", "test"], seed=3)


def test_broken_files_and_silence_are_drawn_again(tmp_path: Path) -> None:
    for name in ("ann", "bob"):
        write_noise(tmp_path / f"{name}-1.wav")
    (tmp_path / "cleo-1.wav").write_bytes((tmp_path / "ann-1.wav").read_bytes())
    soundfile.write(tmp_path / "dan-1.wav", np.zeros(2 * SAMPLE_RATE), SAMPLE_RATE)
    speakers = list(select_speakers(find_speech(tmp_path, skip_broken=False), SAMPLE_RATE, 0).values())
    (tmp_path / "cleo-1.wav").write_text("gone bad since")
    broken: dict[Path, str] = {}
    for seed in range(20):
        sources, left_out = draw_sources(np.random.default_rng(seed), speakers, SAMPLE_RATE, 0, skip_broken=True)
        assert {source.speaker for source in sources} == {"ann", "bob"}
        assert all(source.embedding is None and source.speech.shape == (SAMPLE_RATE,) for source in sources)
        broken |= left_out
    assert list(broken) == [tmp_path / "cleo-1.wav"]
    with pytest.raises(BrokenFile, match="cleo"):
        for seed in range(20):
            draw_sources(np.random.default_rng(seed), speakers, SAMPLE_RATE, 0, skip_broken=False)
    with pytest.raises(InputError, match="no usable speech in 20 draws"):
        draw_sources(np.random.default_rng(0), speakers[2:], SAMPLE_RATE, 0, skip_broken=True)


@pytest.mark.parametrize(
    ("container", "suffix"), [("RF64", ".wav"), ("WAV", ".wav"), ("AIFF", ".aiff"), ("OGG", ".ogg")]
)
def test_a_corpus_has_no_files_that_are_cut_short(container: str, suffix: str, tmp_path: Path) -> None:
    for name in ("ann", "bob"):
        path = tmp_path / f"{name}-1{suffix}"
        soundfile.write(
            path, np.random.default_rng(0).uniform(-0.3, 0.3, 2 * SAMPLE_RATE), SAMPLE_RATE, format=container
        )
    assert len(find_speech(tmp_path, skip_broken=False).speakers) == 2
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BrokenFile, match="cut short"):
        find_speech(tmp_path, skip_broken=False)
    assert list(find_speech(tmp_path, skip_broken=True).broken) == [path]


def test_speech_whose_length_was_left_open_is_used(tmp_path: Path) -> None:
    pcm = np.random.default_rng(0).integers(-9000, 9000, (2 * SAMPLE_RATE, 1)).astype(np.int16)
    for number, sizes in enumerate([(0x7FFFF024, 0x7FFFF000), (0, 0)]):
        (tmp_path / f"ann-{number}.wav").write_bytes(wav(pcm, SAMPLE_RATE, sizes))
    utterances = find_speech(tmp_path, skip_broken=False).speakers["ann"]
    for utterance in utterances:
        segment = read_segment(Segment(utterance, 1000, SAMPLE_RATE))
        np.testing.assert_array_equal(segment, pcm[1000 : 1000 + SAMPLE_RATE, 0] / np.float32(32768))
