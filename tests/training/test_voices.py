"""kb-make-voices changes pitch and formants as requested, and its output is a normal corpus."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import soundfile

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.training.data.corpus import SAMPLE_RATE, Samples, find_speech
from knowledge_boosting.training.data.layout import refuse_shared_speakers
from knowledge_boosting.training.data.voices import VoiceTransformation, transform_voice
from tests.processes import call_here

SPEECH = Path(__file__).parent / "speech"
SPEAKERS = ("1034", "2989")  # two utterances each
PITCH, FORMANT = 120.0, 900.0  # Hz


def vowel() -> Samples:
    """Return a second of pulses, filtered by one resonance."""
    pulses = np.zeros(SAMPLE_RATE)
    pulses[np.round(np.arange(0, SAMPLE_RATE - 1, SAMPLE_RATE / PITCH)).astype(int)] = 1
    pole = 0.97 * np.exp(2j * np.pi * FORMANT / SAMPLE_RATE)
    sound = scipy.signal.lfilter([1], [1, -2 * pole.real, abs(pole) ** 2], pulses)
    scaled: Samples = (0.1 * sound / np.abs(sound).max()).astype(np.float32)
    return scaled


def changed(pitch: float, formants: float) -> Samples:
    return transform_voice(vowel(), [VoiceTransformation("one", pitch, formants)])[0]


def pitch_of(sound: Samples) -> float:
    """Return the pitch from the first peak of the autocorrelation, Hz."""
    middle = sound[SAMPLE_RATE // 4 : -SAMPLE_RATE // 4].astype(np.float64)
    correlation = np.correlate(middle, middle, "full")[len(middle) - 1 :]
    shortest = SAMPLE_RATE // 400
    return SAMPLE_RATE / (shortest + int(correlation[shortest : SAMPLE_RATE // 60].argmax()))


def formant_of(sound: Samples) -> float:
    """Return the frequency of the resonance from the centre of the power around it, Hz."""
    frequencies, power = scipy.signal.welch(sound, SAMPLE_RATE, nperseg=1024)
    near = (frequencies > FORMANT / 2) & (frequencies < FORMANT * 2)
    near &= power > power[near].max() / 30
    return float((frequencies * power)[near].sum() / power[near].sum())


def make(*arguments: object) -> int:
    return call_here("kb-make-voices", *arguments)


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech")
    for path in SPEECH.glob("*.ogg"):
        if path.name.startswith(SPEAKERS):
            shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def voices(speech: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("voices") / "voices"
    assert make("--speech", speech, "--output", output, "--voices", 2, "--seed", 3, "--workers", 2) == 0
    return output


@pytest.mark.parametrize(("pitch", "formants"), [(1.0, 1.0), (1.25, 1.0), (0.8, 1.0), (1.0, 1.15), (1.3, 0.88)])
def test_pitch_and_formants_change_independently(pitch: float, formants: float) -> None:
    sound = changed(pitch, formants)
    assert pitch_of(sound) == pytest.approx(pitch * PITCH, rel=0.02)
    assert formant_of(sound) == pytest.approx(formants * formant_of(vowel()), rel=0.04)


def test_a_voice_has_the_length_and_level_of_its_original() -> None:
    sound = changed(1.3, 1.1)
    assert sound.shape == vowel().shape
    assert np.square(sound).mean() == pytest.approx(np.square(vowel()).mean(), rel=0.01)
    loud = transform_voice(9 * vowel(), [VoiceTransformation("loud", 0.8, 0.9)])[0]
    assert np.abs(loud).max() < 1


def test_every_speaker_is_there_as_recorded_and_in_other_voices(speech: Path, voices: Path) -> None:
    recorded, made = find_speech(speech, skip_broken=False), find_speech(voices, skip_broken=False)
    assert set(made.speakers) == {name + mark for name in recorded.speakers for mark in ("", "~1", "~2")}
    for name, own in recorded.speakers.items():
        for mark in ("", "~1", "~2"):
            assert [each.length for each in made.speakers[name + mark]] == [each.length for each in own]
        first, _ = soundfile.read(own[0].path)
        again, _ = soundfile.read(made.speakers[name][0].path)
        other, _ = soundfile.read(made.speakers[f"{name}~1"][0].path)
        np.testing.assert_allclose(again, first, atol=1e-4)
        assert np.abs(other - first).max() > 0.01
    factors = json.loads((voices / "voices.json").read_text())["voices"]
    assert len({(each["pitch"], each["formants"]) for each in factors}) == 2 * len(recorded.speakers)


def test_a_derived_voice_counts_as_its_speaker_in_training_and_evaluation(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("speaker00,speaker01\n1034,2989\n")
    refuse_shared_speakers(["103~1", "10~34"], tmp_path)
    with pytest.raises(InputError, match="speaker 2989"):
        refuse_shared_speakers(["103~1", "2989~2"], tmp_path)
    (tmp_path / "metadata.csv").write_text("speaker00,speaker01\n1034~1,anna~b\n")
    refuse_shared_speakers(["103", "b"], tmp_path)
    for trained in ("1034", "1034~2", "anna~b"):
        with pytest.raises(InputError, match="was in the training data too"):
            refuse_shared_speakers([trained], tmp_path)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--pitch", 1.2, 0.8], "--pitch: is 1.2 0.8; give a lower and a higher factor from 0.5 to 2.0"),
        (["--formants", 0.1, 0.8], "--formants: is 0.1 0.8"),
        (["--formants", "nan", 1], "--formants: is nan 1.0"),
        (["--speech", "nowhere"], "nowhere: no such folder"),
        (["--output", SPEECH], "exists already"),
        (["--voices", 0], "--voices"),
    ],
)
def test_unusable_calls_are_refused_in_a_line(
    arguments: list[object], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "voices"
    assert make("--speech", SPEECH, "--output", output, *arguments) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith("kb-make-voices: error: ")
    assert why in line
    assert not list(tmp_path.iterdir())


def test_broken_files_are_reported_or_skipped_and_the_seed_decides_the_voices(
    speech: Path, voices: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(speech, tmp_path / "speech")
    (tmp_path / "speech" / "9-9-9.wav").write_bytes(b"RIFF")
    output = tmp_path / "voices"
    call = ["--speech", tmp_path / "speech", "--output", output, "--voices", 2, "--seed", 3, "--workers", 1]
    assert make(*call) == 2
    assert "9-9-9.wav" in capsys.readouterr().err
    assert not output.exists()
    assert make(*call, "--skip-broken") == 0
    made = {path.relative_to(output): path.read_bytes() for path in output.rglob("*.*")}
    assert made == {path.relative_to(voices): path.read_bytes() for path in voices.rglob("*.*")}
