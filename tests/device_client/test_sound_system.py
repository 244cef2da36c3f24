"""Tests for the real audio path: PortAudio, ALSA and a PulseAudio daemon with virtual devices."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.device_client.audio.resampler import LowDelayResampler
from tests.processes import PATIENCE, command, environment, refusal, run

SS = "ss_delay6_compression2"
RATE = 16000
ATTEMPTS = 3  # another program can use the processor for longer than the duration of a buffer
MAX_INSERTED = RATE // 100  # samples
Samples = NDArray[np.float32]


@contextmanager
def running_sound_server(folder: Path, rate: int) -> Iterator[None]:
    """Run a daemon with two null sinks. The monitor of ``room`` is the microphone, and ``ears`` is the loudspeaker."""
    for program in ("pulseaudio", "pactl", "pacat", "parec"):
        if shutil.which(program) is None:
            pytest.skip(
                f"needs {program}: apt-get install pulseaudio pulseaudio-utils libasound2-plugins libportaudio2"
            )
    try:
        from knowledge_boosting.device_client.audio.devices import list_devices

        list_devices()
    except InputError as error:
        pytest.skip(str(error))
    sink = f"module-null-sink rate={rate} channels=2 format=float32le sink_name="
    modules = [f"module-native-protocol-unix auth-anonymous=1 socket={folder}/socket", f"{sink}room", f"{sink}ears"]
    with pytest.MonkeyPatch.context() as patch:
        # The session must not begin by compiling its network.
        patch.setenv("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")))
        for name in ("HOME", "XDG_RUNTIME_DIR", "PULSE_RUNTIME_PATH"):
            patch.setenv(name, str(folder))
        patch.setenv("PULSE_SERVER", f"unix:{folder}/socket")
        patch.setenv("PULSE_SOURCE", "room.monitor")
        patch.setenv("PULSE_SINK", "ears")
        call = ["pulseaudio", "-n", "--daemonize=no", "--exit-idle-time=-1", "--use-pid-file=no", "--disable-shm=yes"]
        for module in modules:
            call += ["-L", module]
        daemon = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + 20
            while subprocess.run(["pactl", "info"], capture_output=True, check=False).returncode:
                if daemon.poll() is not None or time.monotonic() > deadline:
                    pytest.skip("no PulseAudio daemon can run here")
                time.sleep(0.1)
            yield
        finally:
            daemon.kill()
            daemon.communicate()


@pytest.fixture(scope="module")
def sound_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A sound server at the rate of the bundles."""
    folder = tmp_path_factory.mktemp("pulse")
    with running_sound_server(folder, RATE):
        yield folder


def form(rate: int) -> list[str]:
    """Return the flags of pacat and parec for samples."""
    return ["--raw", "--rate", str(rate), "--channels", "2", "--format", "float32le"]


@contextmanager
def playing(samples: Samples, sink: str, folder: Path, rate: int = RATE) -> Iterator[None]:
    """Let another program play samples ``[N, 2]``, with silence before and after."""
    silence = np.zeros((60 * rate, 2), np.float32)
    (folder / "room.raw").write_bytes(np.concatenate([silence[: 6 * rate], samples, silence]).tobytes())
    call = ["pacat", "--playback", "--device", sink, *form(rate), "--latency-msec", "500", str(folder / "room.raw")]
    # A null sink works in blocks of two seconds unless another program asks for a lower latency.
    with recording(f"{sink}.monitor", Path(os.devnull), rate), subprocess.Popen(call) as player:
        try:
            yield
        finally:
            player.kill()


@contextmanager
def recording(source: str, target: Path, rate: int = RATE) -> Iterator[None]:
    """Let another program record from a source."""
    with subprocess.Popen(["parec", "--device", source, *form(rate), "--latency-msec", "8", str(target)]) as recorder:
        try:
            yield
        finally:
            recorder.send_signal(signal.SIGINT)


def read_raw(path: Path) -> Samples:
    content = path.read_bytes()
    return np.frombuffer(content[: len(content) // 8 * 8], "<f4").reshape(-1, 2)


def position(whole: Samples, part: Samples) -> int:
    """Return the position of a part in the whole signal."""
    size = 1 << (len(whole) + len(part)).bit_length()
    spectrum = np.fft.rfft(whole[:, 0], size) * np.conj(np.fft.rfft(part[:, 0], size))
    return int(np.fft.irfft(spectrum, size)[: len(whole)].argmax())


def noise(seconds: int, rate: int = RATE) -> Samples:
    """Return noise ``[N, 2]``, whose position in a recording is unambiguous."""
    return np.random.default_rng(0).normal(0, 0.1, (seconds * rate, 2)).astype(np.float32)


def live_until(seconds: float, *flags: object) -> tuple[dict[str, object], str]:
    """Run kb-client live for a number of seconds, and stop it with Ctrl-C. Return its last line and its stderr."""
    process = subprocess.Popen(
        command("kb-client", "live", "--json-lines", *flags),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    last: dict[str, object] = json.loads(output.splitlines()[-1])
    return last, errors


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("sound_server")
def test_the_enhanced_microphone_signal_is_played_completely(
    golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle, sound = golden_bundle(SS), noise(30)
    devices = ["--input", "pulse", "--output", "pulse", "--buffer-ms", 200]
    for attempt in range(ATTEMPTS):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        with recording("ears.monitor", folder / "ears.raw"), playing(sound, "room", folder):
            last, _ = live_until(44, "--bundle", bundle, *devices, "--record", folder / "recording")
        again = ["-o", folder / "again.wav", "--frame-log", folder / "recording" / "frames.csv", "--bundle", bundle]
        result = run("kb-client", "replay", folder / "recording" / "input.wav", *again)
        assert result.returncode == 0, result.stderr
        captured, _ = soundfile.read(folder / "recording" / "input.wav", dtype="float32")
        start = position(captured, sound)
        expected = soundfile.read(folder / "again.wav", dtype="float32")[0][start : start + len(sound)]
        ears = read_raw(folder / "ears.raw")
        complete = np.array_equal(captured[start : start + len(sound)], sound), inserted(ears, expected) <= MAX_INSERTED
        if all(complete) and last["underruns"] == last["overruns"] == 0:
            break
    assert complete == (True, True)
    assert (last["underruns"], last["overruns"]) == (0, 0)


def is_captured(captured: Samples, sound: Samples, rate: int) -> bool:
    """Return whether a recording at the bundle's rate holds all of a sound at the devices' rate.

    It is not known which sample of the devices the sound began with, so all near the likely one are tried.
    """
    start = position(captured, LowDelayResampler(rate, RATE, 2)(sound))
    for before in range(start * rate // RATE - 8, start * rate // RATE + 8):
        stream = np.concatenate([np.zeros((before, 2), np.float32), sound])
        expected = LowDelayResampler(rate, RATE, 2)(stream)[start : start + len(sound) * RATE // rate]
        if np.abs(captured[start : start + len(expected)] - expected).max() < 1e-5:
            return True
    return False


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("rate", [pytest.param(44100, marks=pytest.mark.long), 48000])
def test_nothing_is_lost_at_other_rates(rate: int, golden_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    bundle, sound = golden_bundle(SS), noise(5, rate)
    devices = ["--input", "pulse", "--output", "pulse", "--rate", rate, "--buffer-ms", 200]
    for attempt in range(ATTEMPTS):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        with (
            running_sound_server(folder, rate),
            recording("ears.monitor", folder / "ears.raw", rate),
            playing(sound, "room", folder, rate),
        ):
            last, _ = live_until(18, "--bundle", bundle, *devices, "--record", folder / "recording")
        captured = soundfile.read(folder / "recording" / "input.wav", dtype="float32")[0]
        played = soundfile.read(folder / "recording" / "output.wav", dtype="float32")[0]
        start = position(captured, LowDelayResampler(rate, RATE, 2)(sound)) * rate // RATE
        expected = LowDelayResampler(RATE, rate, 2)(played)[start : start + len(sound)]
        lost = inserted(read_raw(folder / "ears.raw"), expected)
        complete = is_captured(captured, sound, rate), lost <= MAX_INSERTED * rate / RATE
        if all(complete) and last["underruns"] == last["overruns"] == 0:
            break
    assert complete == (True, True)
    assert (last["underruns"], last["overruns"]) == (0, 0)


def inserted(recorded: Samples, expected: Samples) -> float:
    """Return the number of samples that the sound server inserted. It is infinite if a sample is lost or changed.

    A null sink has its own clock, and inserts some samples from time to time to synchronise it.
    """
    first = offset = position(recorded, expected[:RATE])
    index = 0
    while index < len(expected):
        piece = recorded[offset + index :][: len(expected) - index]
        wrong = np.flatnonzero(np.abs(piece - expected[index : index + len(piece)]).max(axis=1) >= 2**-15)
        if not len(wrong):
            return offset - first if len(piece) == len(expected) - index else np.inf
        index += int(wrong[0])
        part = expected[index : index + 64]
        candidates = (offset + index + gap for gap in range(1, RATE))
        match = next((start for start in candidates if _equal(recorded[start : start + len(part)], part)), None)
        if match is None:
            return np.inf
        offset = match - index
    return offset - first


def _equal(some: Samples, other: Samples) -> bool:
    return some.shape == other.shape and bool(np.abs(some - other).max() < 2**-15)


def test_inserted_samples_are_distinguished_from_lost_ones() -> None:
    sound = noise(2)
    silence = np.zeros((7, 2), np.float32)
    assert inserted(np.concatenate([silence, sound, silence]), sound) == 0
    assert inserted(np.concatenate([silence, sound[:20000], silence, sound[20000:]]), sound) == 7
    assert inserted(np.concatenate([sound[:20000], sound[20001:], silence]), sound) == np.inf
    changed = sound.copy()
    changed[25000] += 1e-3
    assert inserted(changed, sound) == np.inf


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("sound_server")
def test_other_programs_record_from_the_virtual_microphone(
    golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle, sound = golden_bundle(SS), noise(5)
    for attempt in range(ATTEMPTS):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        flags = ["--virtual-mic", "clean", "--input", "pulse", "--buffer-ms", 200, "--record", folder / "recording"]
        process = subprocess.Popen(
            command("kb-client", "live", "--json-lines", "--bundle", bundle, *flags),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + PATIENCE
        while "\tclean\t" not in sources():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        refused = refusal("kb-client", "live", "--bundle", bundle, "--virtual-mic", "clean")
        assert "a microphone with this name exists already" in refused
        with recording("clean", folder / "clean.raw"), playing(sound, "room", folder):
            time.sleep(16)
            process.send_signal(signal.SIGTERM)
            output, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
        assert "clean" not in sources()
        last = json.loads(output.splitlines()[-1])
        captured, _ = soundfile.read(folder / "recording" / "input.wav", dtype="float32")
        start = position(captured, sound)
        played = soundfile.read(folder / "recording" / "output.wav", dtype="float32")[0][start : start + len(sound)]
        complete = inserted(read_raw(folder / "clean.raw"), played) <= MAX_INSERTED
        if complete:
            break
    assert complete, last


def sources() -> str:
    return subprocess.run(["pactl", "list", "short", "sources"], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_invalid_devices_are_refused(
    sound_server: Path, golden_bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = golden_bundle(SS)
    listed = run("kb-client", "devices")
    assert listed.returncode == 0
    assert "pulse" in listed.stdout
    assert "input, output" in listed.stdout
    assert "no such input device" in refusal("kb-client", "live", "--bundle", bundle, "--input", "nowhere")
    assert "no such output device" in refusal("kb-client", "live", "--bundle", bundle, "--output", "99")
    assert "letters" in refusal("kb-client", "live", "--bundle", bundle, "--virtual-mic", "a b")
    assert "only silence" in refusal_after_recording("kb-client", "enroll", "anna", "--seconds", 5, "--input", "pulse")
    monkeypatch.setenv("PULSE_SERVER", f"unix:{sound_server}/nobody")
    assert "pactl" in refusal("kb-client", "live", "--bundle", bundle, "--virtual-mic", "clean")


def refusal_after_recording(*call: object) -> str:
    name, *arguments = map(str, call)
    result = run(name, *arguments)
    assert result.returncode == 2
    return result.stderr.splitlines()[-1]
