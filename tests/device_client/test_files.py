"""Tests for input and output files: rates, channels, formats and alignment."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray
from scipy.signal import correlate

from knowledge_boosting.device_client.audio import files
from knowledge_boosting.models.checkpoint import build
from knowledge_boosting.models.config import Alone, Framing, NetworkSize
from knowledge_boosting.models.networks import write_bundle
from tests.golden_cases import TOLERANCE, Golden, worst
from tests.processes import EXACT, run

ALONE = Alone(task="tse", framing=Framing(), network=NetworkSize(channels=8, hidden=8, blocks=2))


@pytest.fixture(scope="module")
def identity_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of one network alone whose output is its input, to test only the handling of files."""
    model = build(ALONE)
    network = model.get_submodule("small.network")
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if not name.startswith(("input_norm", "speaker")):
                weight.zero_()
        # Channels 0 to 3 are the scaled spectrum, and 4 to 7 its negative. With a mean of zero, the norm only scales.
        for channel in range(4):
            for sign, target in ((1.0, channel), (-1.0, channel + 4)):
                network.get_parameter("input_conv.conv.weight")[target, channel, 2, 1] = sign
        for layer in (network.get_submodule("speaker.0"),):
            layer.get_parameter("weight").zero_()
            layer.get_parameter("bias").view(2, -1)[0] = 1.0
            layer.get_parameter("bias").view(2, -1)[1] = 0.0
        # Output channels are (mic, real or imaginary), input channels (real or imaginary, mic).
        for out, channel in enumerate((0, 2, 1, 3)):
            network.get_parameter("output_conv.conv.weight")[out, channel, 2, 1] = 0.01
    path = tmp_path_factory.mktemp("identity") / "identity"
    write_bundle(path, model, ALONE, untrained=False, source="made by hand", configuration="test")
    return path


def replay(bundle: Path, folder: Path, name: str, *flags: object) -> tuple[NDArray[np.float64], int, str]:
    """Replay a file of the folder. Return the output samples ``[N, M]``, their rate, and the standard error."""
    np.save(folder / "speaker.npy", np.ones(256))
    out = folder / f"out{Path(name).suffix}"
    result = run(
        "kb-client",
        "replay",
        folder / name,
        "-o",
        out,
        "--bundle",
        bundle,
        "--enrollment",
        folder / "speaker.npy",
        *flags,
    )
    assert result.returncode == 0, result.stderr
    samples, rate = soundfile.read(out, always_2d=True)
    return samples, rate, result.stderr


@pytest.mark.parametrize(("rate", "suffix"), [(16000, ".wav"), (44100, ".flac"), (48000, ".wav"), (8000, ".wav")])
def test_output_has_rate_length_and_alignment_of_the_input(
    rate: int, suffix: str, identity_bundle: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    length = rate // 2 + 37
    # The position of a click in weak noise shows the alignment with an accuracy of one sample.
    signal = 0.001 * rng.standard_normal((length, 2))
    click = round(0.2 * rate)
    signal[click] = 0.5
    soundfile.write(tmp_path / f"in{suffix}", signal, rate, subtype="PCM_16")
    samples, out_rate, errors = replay(identity_bundle, tmp_path, f"in{suffix}")
    assert (out_rate, samples.shape) == (rate, signal.shape)
    assert not errors
    lag = np.argmax(np.abs(correlate(samples[:, 0], signal[:, 0], "full"))) - (length - 1)
    assert lag == 0


def test_a_mono_file_is_used_for_both_microphones(identity_bundle: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "in.wav", np.random.default_rng(0).uniform(-0.3, 0.3, 4000), 16000)
    samples, _, errors = replay(identity_bundle, tmp_path, "in.wav")
    assert samples.shape == (4000, 2)
    assert np.abs(samples).max() > 0.005
    assert np.allclose(samples[:, 0], samples[:, 1], atol=2 / 32768)
    assert errors == f"warning: {tmp_path / 'in.wav'}: is mono; its channel is used for all 2 microphones\n"


def test_samples_beyond_full_scale_are_clipped_in_16_bit_and_kept_in_float(
    golden: Callable[[str], Golden], golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    case = golden("tse_delay3")
    folder = tmp_path
    assert case.speaker_embedding is not None
    np.save(folder / "speaker.npy", case.speaker_embedding[0].numpy())
    soundfile.write(folder / "in.wav", case.mixture[0].numpy().T, 16000, subtype="FLOAT")
    for sample_format, subtype in (("s16", "PCM_16"), ("float", "FLOAT")):
        out = folder / f"{sample_format}.wav"
        result = run(
            *("kb-client", "replay", folder / "in.wav", "-o", out, "--bundle", golden_bundle("tse_delay3")),
            *("--enrollment", folder / "speaker.npy", "--output-format", sample_format, *EXACT),
        )
        assert result.returncode == 0, result.stderr
        assert soundfile.info(out).subtype == subtype
        samples = torch.from_numpy(soundfile.read(out, dtype="float32")[0].T)
        clipped = case.small_output[0, 0].clamp(-1, 1) if sample_format == "s16" else case.small_output[0, 0]
        assert worst(samples, clipped) < TOLERANCE
        over = int((case.small_output[0, 0].abs() > 1).sum())
        assert over > 0
        assert (f"{over} samples exceed full scale" in result.stderr) == (sample_format == "s16")


def test_a_file_beyond_4_gib_has_a_header_that_can_hold_its_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the limit is lower. The header of a WAV file would hold a wrong length, and readers would miss the end."""
    monkeypatch.setattr(files, "LARGEST_WAV", 8 * 1000)
    samples = np.random.default_rng(0).uniform(-1, 1, (2, 1001)).astype(np.float32)
    for length, header in ((1000, b"RIFF"), (1001, b"RF64")):
        path = tmp_path / f"{length}.wav"
        files.write_audio(path, samples[:, :length], 16000, "float")
        assert path.read_bytes()[:4] == header
        np.testing.assert_array_equal(soundfile.read(path, dtype="float32")[0].T, samples[:, :length])


def test_a_fault_while_a_file_is_written_is_not_taken_for_one_of_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="no thread"),
        files.write_sound(tmp_path / "out.wav", 16000, 1, 100, "s16") as writer,
    ):
        writer.write(np.zeros((1, 50), np.float32))
        raise RuntimeError("no thread")
    assert not list(tmp_path.iterdir())
