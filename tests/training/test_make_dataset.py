"""kb-make-dataset makes reproducible bytes and data that match their metadata, and refuses bad calls clearly."""

import contextlib
import csv
import functools
import io
import json
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import torch

from knowledge_boosting.training.commands import make_dataset
from knowledge_boosting.training.data.corpus import find_speech
from knowledge_boosting.training.data.items import MixtureMaker, mixture_bytes
from knowledge_boosting.training.data.responses import RESPONSE_LENGTH, Renderer, read_bank
from knowledge_boosting.training.data.rooms import RoomRanges, draw_room
from knowledge_boosting.training.data.speakers import select_speakers, split_speakers
from tests.processes import PATIENCE, call_here, command

ROOT = Path(__file__).parents[2]
SOFA = ROOT / "samples" / "hrtf" / "mit_kemar_normal_pinna.sofa"
SPEECH = Path(__file__).parent / "speech"  # six speakers, two utterances each
SECONDS = 2
TSE_COUNTS = {"train": 6, "val": 2, "test": 2}
SS_COUNTS = {"train": 12, "val": 3, "test": 3}
TSE = [
    *("--speech", SPEECH, "--sofa", SOFA, "--task", "tse", "--seed", 5),
    *("--seconds", SECONDS, "--enrollment-seconds", SECONDS),
    *(value for split, count in TSE_COUNTS.items() for value in (f"--{split}", count)),
]
Row = dict[str, str]
Item = tuple[Row, list[npt.NDArray[np.int64]]]


@functools.cache
def _read(*sofa: Path) -> Renderer:
    return Renderer(sofa)


def renderer(sofa: Sequence[Path]) -> Renderer:
    """Return a cached renderer, because making one takes seconds."""
    return _read(*sofa)


def make(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_dataset, "Renderer", renderer)
        return call_here("kb-make-dataset", *arguments)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the one line of a refused call."""
    capsys.readouterr()
    assert make(*arguments) == 2
    printed = capsys.readouterr()
    assert not printed.out
    (line,) = printed.err.splitlines()
    return line.removeprefix("kb-make-dataset: error: ")


def write_speech(folder: Path, *names: str, rate: int = 16000, channels: int = 1, seconds: float = 3) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        noise = np.random.default_rng(0).uniform(-0.3, 0.3, (round(seconds * rate), channels))
        soundfile.write(folder / name, noise, rate)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(folder: Path) -> list[Row]:
    with (folder / "metadata.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def sources(item: Path) -> list[npt.NDArray[np.int64]]:
    """Read both sources, ``[2, N]``, as 16-bit integers."""
    found = []
    for number in ("00", "01"):
        header = soundfile.info(item / f"source{number}.wav")
        assert (header.samplerate, header.channels, header.subtype) == (16000, 2, "PCM_16")
        found.append(soundfile.read(item / f"source{number}.wav", dtype="int16")[0].T.astype(np.int64))
    return found


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TSE dataset made by one worker."""
    root = tmp_path_factory.mktemp("one-worker") / "data"
    assert make(*TSE, "-o", root, "--workers", 1) == 0
    return root


@pytest.fixture(scope="module")
def valid_dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[object], Path, str]:
    """An SS dataset of two corpora with a broken file each: its flags without the folder, the folder, the warnings."""
    folder = tmp_path_factory.mktemp("two-corpora")
    for corpus, names in (("speech", ("1034", "1088")), ("valid", ("2989", "3168", "4340", "7278"))):
        (folder / corpus).mkdir()
        for path in (path for name in names for path in SPEECH.glob(f"{name}-*")):
            shutil.copy(path, folder / corpus)
    write_speech(folder / "speech", "8-cut.flac")
    (folder / "speech" / "8-cut.flac").write_bytes((folder / "speech" / "8-cut.flac").read_bytes()[:5000])
    (folder / "valid" / "9-text.wav").write_text("no audio")
    flags = ["--speech", folder / "speech", "--valid-speech", folder / "valid", "--sofa", SOFA, "--task", "ss"]
    flags += ["--seconds", SECONDS, "--skip-broken"]
    flags += [value for split, count in SS_COUNTS.items() for value in (f"--{split}", count)]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert make(*flags, "-o", folder / "data", "--workers", 1) == 0
    return flags, folder / "data", said.getvalue()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    """The records and the sources of 36 SS items with the default ranges."""
    folder = tmp_path_factory.mktemp("many")
    speakers = split_speakers(select_speakers(find_speech(SPEECH, skip_broken=False), SECONDS * 16000, 0), ["train"], 0)
    mixtures = MixtureMaker(
        renderer=renderer([SOFA]),
        rooms=RoomRanges(),
        seed=1,
        speakers=speakers,
        length=SECONDS * 16000,
        enrollment=0,
        difference=(-5, 5),
        level=(-35, -20),
        noise=(),
        noise_ratio=(15, 40),
        skip_broken=False,
    )
    items = []
    for index in range(36):
        assert mixtures.make("train", index, folder) == {}
        items.append((json.loads((folder / "metadata.json").read_text()), sources(folder)))
    return items


def test_the_layout_is_the_published_one(dataset: Path) -> None:
    assert sorted(path.name for path in dataset.iterdir()) == ["dataset.json", "test", "train", "val"]
    for split, count in TSE_COUNTS.items():
        items = sorted(path for path in (dataset / split).iterdir() if path.is_dir())
        assert [item.name for item in items] == [f"{index:06d}" for index in range(count)]
        for item in items:
            files = {"source00.wav", "source01.wav", "spk_id00.pt", "spk_id01.pt", "metadata.json"}
            assert {path.name for path in item.iterdir()} == files
            assert all(source.shape == (2, SECONDS * 16000) for source in sources(item))
            for number in ("00", "01"):
                embedding = torch.load(item / f"spk_id{number}.pt", weights_only=True)
                assert (embedding.shape, embedding.dtype) == ((1, 256), torch.float32)


def test_one_worker_or_two_make_the_same_bytes(dataset: Path, tmp_path: Path) -> None:
    assert make(*TSE, "-o", tmp_path / "data", "--workers", 2) == 0
    assert tree(tmp_path / "data") == tree(dataset)


def test_a_killed_run_can_be_continued_to_the_same_bytes(
    valid_dataset: tuple[list[object], Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, finished, _ = valid_dataset
    root = tmp_path / "data"
    call = command("kb-make-dataset", *flags, "-o", root, "--workers", "1")
    with subprocess.Popen(call, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and process.poll() is None and not (root / "train" / "000001").exists():
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        # The output ends when the worker, which shares the pipe, has ended too.
        process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL
    assert not list(root.rglob("metadata.csv"))
    made = {path: path.stat().st_mtime_ns for path in root.glob("*/0*/*.wav")}
    total = sum(SS_COUNTS.values())
    assert 4 <= len(made) < 2 * total
    # Incomplete files of a killed run.
    for leftover in (root / "train" / ".000011-x", root / ".dataset-x.json", root / "val" / ".metadata-x.csv"):
        leftover.parent.mkdir(exist_ok=True)
        leftover.mkdir() if leftover.suffix == "" else leftover.write_text("half")
    capsys.readouterr()
    assert make(*flags, "-o", root, "--workers", 1) == 0
    assert f"{total - len(made) // 2} of {total} to make" in capsys.readouterr().out
    assert tree(root) == tree(finished)
    assert all(path.stat().st_mtime_ns == before for path, before in made.items())
    assert not list(root.rglob(".*"))


def test_a_finished_run_has_nothing_to_do(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(dataset)
    assert make(*TSE, "-o", dataset, "--workers", 2, "--skip-broken") == 0
    assert f"0 of {sum(TSE_COUNTS.values())} to make; 0.0 MB to write" in capsys.readouterr().out
    assert tree(dataset) == before


def test_splits_share_no_speaker(dataset: Path) -> None:
    speakers = {}
    for split, count in TSE_COUNTS.items():
        table = rows(dataset / split)
        assert [row["item"] for row in table] == [f"{index:06d}" for index in range(count)]
        assert all(row["speaker00"] != row["speaker01"] for row in table)
        speakers[split] = {row[f"speaker{number}"] for row in table for number in ("00", "01")}
    assert all(speakers.values())
    assert sum(map(len, speakers.values())) == len(set.union(*speakers.values()))


@pytest.mark.filterwarnings("ignore")  # warnings of the packages that Resemblyzer uses
def test_embeddings_are_resemblyzers_of_another_segment(dataset: Path) -> None:
    import resemblyzer

    encoder = resemblyzer.VoiceEncoder("cpu", verbose=False)
    for row in rows(dataset / "val"):
        for number in ("00", "01"):
            enrollment, start = row[f"enrollment{number}"], int(row[f"enrollment_offset{number}_samples"])
            assert enrollment != row[f"utterance{number}"]
            assert enrollment.split("-")[0] == row[f"utterance{number}"].split("-")[0] == row[f"speaker{number}"]
            speech, _ = soundfile.read(SPEECH / enrollment, dtype="float32", start=start, frames=SECONDS * 16000)
            expected = encoder.embed_utterance(resemblyzer.preprocess_wav(speech, source_sr=16000))
            found = torch.load(dataset / "val" / row["item"] / f"spk_id{number}.pt", weights_only=True)
            np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_sources_are_the_utterances_they_say(many: list[Item]) -> None:
    for row, item_sources in many[:8]:
        for number, source in zip(("00", "01"), item_sources, strict=True):
            start = int(row[f"offset{number}_samples"])
            speech, _ = soundfile.read(SPEECH / row[f"utterance{number}"], start=start, frames=SECONDS * 16000)
            size = 4 * SECONDS * 16000
            spectra = np.fft.rfft(source.sum(0), size) * np.fft.rfft(speech, size).conj()
            lags = np.fft.irfft(spectra / (np.abs(spectra) + 1e-9), size)
            # The lag includes propagation, the filters of pyroomacoustics, and perhaps a louder reflection.
            lag = int(lags.argmax())
            direct = float(row[f"distance{number}_m"]) / 343 * 16000 + 35
            assert direct - 5 < lag < direct + 200


def test_ears_differ_as_the_azimuth_says(many: list[Item]) -> None:
    levels, times = [], []
    for row, item_sources in many:
        for number, source in zip(("00", "01"), item_sources, strict=True):
            left = np.sign(np.sin(np.radians(float(row[f"azimuth{number}_deg"]))))
            power = np.square(source).sum(-1)
            levels.append(np.sign(np.log(power[0] / power[1])) == left)
            size = 2 * source.shape[1]
            spectrum = np.fft.rfft(source[0], size) * np.fft.rfft(source[1], size).conj()
            correlation = np.fft.irfft(spectrum, size)
            lags = np.arange(-16, 17)  # 1 ms, more than for any head
            times.append(np.sign(-lags[correlation[lags].argmax()]) == left)
    assert len(levels) == 72
    assert np.mean(levels) >= 0.95
    assert np.mean(times) >= 0.95


def test_speakers_are_apart_and_levels_as_drawn(many: list[Item]) -> None:
    limited = 0
    for row, item_sources in many:
        separation = (float(row["azimuth00_deg"]) - float(row["azimuth01_deg"]) + 180) % 360 - 180
        assert abs(separation) >= 15
        decibels = [
            10 * np.log10(np.mean(np.square(signal / 32768)))
            for signal in (*item_sources, item_sources[0] + item_sources[1])
        ]
        assert -5 <= float(row["level_difference_db"]) <= 5
        assert decibels[0] - decibels[1] == pytest.approx(float(row["level_difference_db"]), abs=0.02)
        peak = max(np.abs(signal).max() for signal in (*item_sources, item_sources[0] + item_sources[1]))
        assert peak <= 0.99 * 32768 + 1
        wanted = float(row["mixture_level_dbfs"])
        assert -35 <= wanted <= -20
        if peak < 0.985 * 32768:
            assert decibels[2] == pytest.approx(wanted, abs=0.02)
        else:
            limited += 1
            assert decibels[2] < wanted
    assert limited < len(many) / 2
    assert len({row["facing_deg"] for row, _ in many}) == len(many)


def test_validation_speech_has_the_speakers_of_val_and_test(valid_dataset: tuple[list[object], Path, str]) -> None:
    _, root, _ = valid_dataset
    found = {
        split: {row[f"speaker{number}"] for row in rows(root / split) for number in ("00", "01")} for split in SS_COUNTS
    }
    assert found["train"] == {"1034", "1088"}
    assert len(found["val"]) == len(found["test"]) == 2
    assert found["val"] | found["test"] == {"2989", "3168", "4340", "7278"}


def test_no_speaker_is_in_both_corpora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(next(SPEECH.glob("1034-*")), tmp_path)
    call = ["--speech", SPEECH, "--valid-speech", tmp_path, "--sofa", SOFA, "--task", "ss", "--val", 1]
    assert "speaker 1034 is in --speech too" in refusal(capsys, *call, "-o", tmp_path.with_name("data"))


def test_broken_files_are_skipped_and_counted(
    valid_dataset: tuple[list[object], Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, _, warnings = valid_dataset
    first, second = warnings.splitlines()
    assert first.startswith("warning: broken files left out: 1, the first ")
    assert "9-text.wav: not readable" in first
    assert second.startswith("warning: broken files left out: 1, the first ")
    assert "8-cut.flac: " in second
    # The first fault is found before anything is made. The second is found when the file is drawn, and all items made
    # before are complete.
    strict = [flag for flag in flags if flag != "--skip-broken"]
    assert "9-text.wav: not readable" in refusal(capsys, *strict, "-o", tmp_path / "data")
    assert not (tmp_path / "data").exists()
    speech = strict[strict.index("--speech") + 1]
    call = ["--speech", speech, "--sofa", SOFA, "--task", "ss", "--seconds", SECONDS, "--train", 12]
    assert make(*call, "-o", tmp_path / "data", "--workers", 1) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"kb-make-dataset: error: {speech}/8-cut.flac: ")
    assert {path.name for path in (tmp_path / "data").iterdir()} <= {"dataset.json", "train"}
    whole = {"metadata.json", "source00.wav", "source01.wav"}
    assert all({path.name for path in item.iterdir()} == whole for item in tmp_path.glob("data/train/*"))


def test_every_condition_is_rendered_as_recorded(tmp_path: Path) -> None:
    noise = tmp_path / "noise" / "rain"
    noise.mkdir(parents=True)
    rng = np.random.default_rng(0)
    soundfile.write(noise / "short.wav", rng.normal(0, 0.05, 5000), 16000)
    soundfile.write(noise / "long.wav", rng.normal(0, 0.05, 80000), 16000)
    other = tmp_path / "other.sofa"
    other.write_bytes(SOFA.read_bytes())
    call = [
        *("--speech", SPEECH, "--sofa", SOFA, "--sofa", other, "--task", "ss", "--seed", 3, "--seconds", SECONDS),
        *("--val", 24, "--microphones", 0.3, "--mono", 0.3, "--unequal", 0.3, "--anechoic", 0.5, "--level", -60, -6),
        *("--noise", noise.parent, "--noise-ratio", 10, 20),
    ]
    root = tmp_path / "data"
    assert make(*call, "-o", root, "--workers", 2) == 0
    kinds = Counter(row["listener"] for row in rows(root / "val"))
    assert set(kinds) == {SOFA.stem, "other", "microphones", "mono"}
    weak: list[str] = []
    for row in rows(root / "val"):
        folder = root / "val" / row["item"]
        parts = [*sources(folder), soundfile.read(folder / "noise.wav", dtype="int16")[0].T.astype(np.int64)]
        voices, mixture = parts[0] + parts[1], sum(parts)
        assert np.abs(mixture).max() < 32768
        ratio = 10 * np.log10(np.mean(voices**2.0) / np.mean(parts[2] ** 2.0))
        # In the quietest mixtures, the noise has only a few 16-bit steps.
        assert ratio == pytest.approx(float(row["noise_ratio_db"]), abs=0.2 if np.std(parts[2]) > 3 else 3)
        assert row["noise"] in ("rain/short.wav", "rain/long.wav")
        if row["listener"] == "mono":
            assert all((left == right).all() for left, right in parts)
        difference = float(row["sensitivity_difference_db"])
        if abs(difference) > 6:
            assert abs(difference) == 20
            weak.append(row["listener"])
            # The room and the head also make the sides unequal.
            left, right = (10 * np.log10(np.mean(voices[side] ** 2.0)) for side in (0, 1))
            assert left - right == pytest.approx(difference, abs=12)
        if row["listener"] == "microphones":
            assert 0.03 <= float(row["spacing_m"]) <= 0.2
    assert len(set(weak)) > 1
    again = tmp_path / "again"
    assert make(*call, "-o", again, "--workers", 1) == 0
    assert tree(again) == tree(root)


def test_a_bank_of_responses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["--responses-only", "--rooms", 8, "--anechoic", 0.5, "--sofa", SOFA, "--seed", 2]
    root = tmp_path / "bank"
    assert make(*call, "-o", root, "--workers", 1) == 0
    files = tree(root)
    assert set(files) == {"dataset.json", "metadata.csv", "responses.safetensors"}
    responses = read_bank(root / "responses.safetensors").responses
    assert responses.shape == (8, 2, 2, RESPONSE_LENGTH)
    assert responses.dtype == np.float32
    for index, row in enumerate(rows(root)):
        room = draw_room(np.random.default_rng([2, 3, index]), RoomRanges(anechoic=0.5), [SOFA.stem])
        record = room.record()
        assert row["listener"] == record.pop("listener") == SOFA.stem
        assert {name: float(row[name]) for name in record} == pytest.approx(record, abs=1e-6)
        np.testing.assert_array_equal(responses[index], renderer([SOFA]).responses(room))
    assert 0 < sum(float(row["absorption"]) == 1 for row in rows(root)) < 8
    capsys.readouterr()
    assert make(*call, "-o", root) == 0
    assert "exists already" in capsys.readouterr().out
    assert tree(root) == files
    assert "was made with --rooms 8" in refusal(capsys, *call, "--rooms", 9, "-o", root)


def test_speech_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = {name: write_speech(tmp_path / name, "a-1.wav", "b-1.wav") for name in ("rate", "stereo", "corrupt")}
    write_speech(folders["rate"], "c-1.wav", rate=8000)
    write_speech(folders["stereo"], "c-1.wav", channels=2)
    (folders["corrupt"] / "c-1.flac").write_text("no audio")
    write_speech(tmp_path / "one", "a-1.wav", "a-2.wav")
    write_speech(tmp_path / "short", "a-1.wav", "b-1.wav", seconds=1.9)
    write_speech(tmp_path / "untold", "a1.wav")
    write_speech(tmp_path / "empty")
    cases = {
        "none": "no such folder",
        "empty": "holds no usable speech",
        "untold": "does not say who speaks",
        "rate": "sampled at 8000 Hz",
        "stereo": "has 2 channels",
        "corrupt": "not readable as audio",
        "one": "1 of its 1 speakers have 2 s of speech in one file; at least 2 are needed for train",
        "short": "0 of its 2 speakers",
    }
    for name, expected in cases.items():
        call = ["--speech", tmp_path / name, "--sofa", SOFA, "--task", "ss", "--seconds", 2, "--train", 1]
        line = refusal(capsys, *call, "-o", tmp_path / "data")
        assert line.startswith(f"{tmp_path / name}"), line
        assert expected in line, line
    assert not (tmp_path / "data").exists()


def test_flags_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--speech", SPEECH, "--sofa", SOFA, "--task", "ss", "--seconds", 2, "--train", 1]
    bank = ["--responses-only", "--rooms", 1, "--sofa", SOFA]
    (tmp_path / "text.sofa").write_text("no SOFA")
    (tmp_path / "file").touch()
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").touch()
    data = tmp_path / "data"
    cases: list[tuple[list[object], str]] = [
        ([*given], "Missing option '--output'"),
        ([*given, "-o", tmp_path / "file"], "file: exists already"),
        ([*given, "-o", other], "other: exists already and is no dataset"),
        ([*given, "-o", tmp_path / "file" / "data"], "cannot write there"),
        ([*given, "-o", SPEECH / "data"], "data: lies in the speech folder"),
        ([*given, "-o", data, "--valid-speech", tmp_path, "--val", 1, "-o", tmp_path / "x"], "lies in the speech"),
        ([*given, "-o", data, "--valid-speech", tmp_path / "none"], "--valid-speech is for val and test"),
        ([*given, "-o", data, "--valid-speech", tmp_path / "none", "--val", 1], "none: no such folder"),
        ([*given, "-o", data, "--train", 0], "nothing to make"),
        ([*given, "-o", data, "--test", -1], "--test"),
        ([*given, "-o", data, "--val", 1, "--test", 1, "--seconds", 5], "3 of its 6 speakers have 5 s"),
        ([*given, "-o", data, "--task", "tse", "--enrollment-seconds", 6], "and 6 s more to enroll with"),
        ([*given, "-o", data, "--task", "aec"], "--task"),
        ([*given, "-o", data, "--rooms", 3], "--rooms needs --responses-only"),
        ([*given, "-o", data, "--sofa", tmp_path / "none.sofa"], "none.sofa: no such file"),
        ([*given, "-o", data, "--sofa", tmp_path / "text.sofa"], "text.sofa: not usable as head-related responses"),
        ([*given, "-o", data, "--side", 5, 4], "--side 5 4: give LOW HIGH"),
        ([*given, "-o", data, "--absorption", 0, 1], "--absorption 0 1"),
        ([*given, "-o", data, "--height", "nan", 3], "--height nan 3"),
        ([*given, "-o", data, "--distance", 1.5, 2], "--distance 1.5 …: too far for a room with --side 3"),
        ([*given, "-o", data, "--azimuth", -5, 5], "--separation 15: does not fit into --azimuth"),
        ([*given, "-o", data, "--level", -20, 3], "--level -20 3"),
        ([*given, "-o", data, "--level-difference", "x", 3], "--level-difference"),
        ([*given, "-o", data, "--anechoic", 2], "--anechoic"),
        ([*given, "-o", data, "--seconds", "nan"], "--seconds"),
        ([*given, "-o", data, "--separation", "nan"], "--separation"),
        ([*given, "-o", data, "--workers", 0], "--workers"),
        (["--sofa", SOFA, "-o", data, "--task", "ss"], "give --speech DIR"),
        (["--sofa", SOFA, "-o", data, "--speech", SPEECH], "give --task ss or tse"),
        ([*bank, "-o", data, "--train", 1], "--responses-only takes no --speech"),
        ([*bank, "-o", data, "--rooms", 0], "--responses-only needs --rooms"),
        ([*bank, "-o", data, "--sofa", tmp_path / "text.sofa"], "text.sofa: not usable as head-related responses"),
        ([*bank, "-o", other], "other: exists already"),
    ]
    before = tree(tmp_path)
    speech = tree(SPEECH)
    for call, expected in cases:
        line = refusal(capsys, *call)
        assert expected in line, line
    assert tree(tmp_path) == before
    assert not data.exists()
    assert tree(SPEECH) == speech


def test_the_disk_estimate_is_about_right(dataset: Path) -> None:
    (item,) = dataset.glob("val/000000")
    taken = sum(-(-path.stat().st_size // 4096) * 4096 for path in (item, *item.iterdir()))
    assert mixture_bytes(SECONDS * 16000, embeddings=True, noise=False) == pytest.approx(taken, rel=0.05)


def test_a_disk_too_small(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=2_000_000))
    line = refusal(capsys, *TSE, "-o", tmp_path / "deep" / "data")
    assert "needs 2.8 MB and its disk has 2.0 MB free" in line
    line = refusal(capsys, "--responses-only", "--rooms", 100, "--sofa", SOFA, "-o", tmp_path / "bank")
    assert "needs 14.3 MB and its disk has 2.0 MB free" in line
    assert not list(tmp_path.iterdir())


def test_other_parameters_in_the_same_folder(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases: list[tuple[list[object], str]] = [
        (["--seed", 6], "was made with --seed 5;"),
        (["--train", 7], "was made with --train 6;"),
        (["--distance", 0.5, 1], "was made with --distance 0.5 2.0;"),
        (["--task", "ss"], "was made with --task tse;"),
        (["--valid-speech", SPEECH / "none"], "none: no such folder"),
        (["--sofa", SOFA.with_name("none")], "none: no such file"),
    ]
    before = tree(dataset)
    for flags, expected in cases:
        assert expected in refusal(capsys, *TSE, *flags, "-o", dataset)
    assert "was made without --rooms" in refusal(
        capsys, "--responses-only", "--rooms", 2, "--sofa", SOFA, "-o", dataset
    )
    assert tree(dataset) == before
