"""Tests for ``kb-client replay`` with a real server process: every sample of the output is checked."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray

from knowledge_boosting.models.arrival_fusion import NEVER
from knowledge_boosting.models.checkpoint import build
from knowledge_boosting.models.config import FixedDelay, NetworkSize, Pair
from knowledge_boosting.models.networks import write_bundle
from knowledge_boosting.models.pair import BoostedPair, PairOutput
from tests.golden_cases import TOLERANCE, Golden, worst
from tests.processes import EXACT, PATIENCE, Server, command, environment, free_port, run, running_server

SAMPLES = Path(__file__).parents[2] / "samples"
SS, TSE = "ss_delay6_compression2", "tse_delay6"
GetGolden = Callable[[str], Golden]
GetBundle = Callable[[str], Path]


def write_inputs(case: Golden, folder: Path, repeats: int = 1) -> tuple[Path, list[object]]:
    """Write the first mixture of a case to a file. Return its path, and the flags that the task needs."""
    samples = np.tile(case.mixture[0].numpy(), repeats)
    soundfile.write(folder / "mixture.wav", samples.T, 16000, subtype="FLOAT")
    if case.speaker_embedding is None:
        return folder / "mixture.wav", []
    np.save(folder / "speaker.npy", case.speaker_embedding[0].numpy())
    return folder / "mixture.wav", ["--enrollment", folder / "speaker.npy"]


def read_outputs(case: Golden, folder: Path) -> NDArray[np.float32]:
    """Read the estimate ``[S, M, N]`` from out.wav, or from out-speaker1.wav and out-speaker2.wav."""
    tse = case.speaker_embedding is not None
    names = ["out.wav"] if tse else ["out-speaker1.wav", "out-speaker2.wav"]
    return np.stack([soundfile.read(folder / name, dtype="float32", always_2d=True)[0].T for name in names])


def read_report(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


@torch.inference_mode()
def offline(case: Golden, used: NDArray[np.bool_] | None = None, repeats: int = 1) -> torch.Tensor:
    """Compute the output for the first mixture of a case in one process. Hints that are not used are set to zero."""
    speaker = case.speaker_embedding[:1] if case.speaker_embedding is not None else None
    ready_at = torch.where(torch.from_numpy(used), 0, NEVER) if used is not None else None
    output: PairOutput = case.pair(case.mixture[:1].tile(repeats), speaker, ready_at)
    return output.small[0]


def frames_in(ranges: list[list[int]]) -> list[int]:
    return [frame for first, last in ranges for frame in range(first, last + 1)]


@pytest.mark.parametrize(("name", "delay_ms"), [(SS, 48), (TSE, 12), (TSE, 7.5)])
def test_every_hint_on_time_gives_the_published_output(
    name: str,
    delay_ms: float,
    golden: GetGolden,
    golden_bundle: GetBundle,
    tse_server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hint that arrives exactly at its deadline is on time, like one that arrives before."""
    for variable in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")  # no proxy is used for loopback addresses
    case = golden(name)
    mixture, flags = write_inputs(case, tmp_path)
    flags += ["-o", tmp_path / "out.wav", "--output-format", "float", "--report", tmp_path / "report.json"]
    if name == TSE:
        flags += ["--server", tse_server.address]  # otherwise it starts its own server
    result = run(
        "kb-client", "replay", mixture, "--bundle", golden_bundle(name), "--delay-ms", delay_ms, *EXACT, *flags
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr  # without a terminal, there is no progress bar
    assert worst(read_outputs(case, tmp_path), case.small_output[0]) < TOLERANCE
    report = read_report(tmp_path)
    frames = case.hint.shape[1]
    assert report["frames"] == frames
    assert report["hints"]["on_time"] == report["hints"]["due"] == frames - case.pair.config.delay
    assert report["hints"]["age_ms"] == dict.fromkeys(("p50", "p95", "p99", "max"), delay_ms)


@pytest.mark.parametrize("name", [SS, TSE])
def test_late_hints_are_exactly_zeroed_hints(
    name: str, golden: GetGolden, golden_bundle: GetBundle, ss_server: Server, tse_server: Server, tmp_path: Path
) -> None:
    case = golden(name)
    frames, delay = case.hint.shape[1], case.pair.config.delay
    chunk_ms = 1e3 * case.pair.config.framing.chunk_seconds
    rng = np.random.default_rng(3)
    up = rng.uniform(0, delay * chunk_ms * 0.4, frames)
    down = np.where(rng.random(frames) < 0.1, delay * chunk_ms * 1.5, up)
    rows = [f"{a:.6f},{b:.6f}" for a, b in zip(up, down, strict=True)]
    (tmp_path / "trace.csv").write_text("\n".join(["up_ms,down_ms", *rows]) + "\n")
    mixture, flags = write_inputs(case, tmp_path)
    flags += ["-o", tmp_path / "out.wav", "--output-format", "float", "--report", tmp_path / "report.json"]
    server = (tse_server if name == TSE else ss_server).address
    result = run(
        *("kb-client", "replay", mixture, "--bundle", golden_bundle(name), "--server", server, *EXACT),
        *("--trace", tmp_path / "trace.csv", *flags),
    )
    assert result.returncode == 0, result.stderr

    # Packets arrive in the order of sending on each link.
    captured = chunk_ms * np.arange(frames)
    at_server = np.maximum.accumulate(captured + up)
    arrived = np.maximum.accumulate(at_server + down)
    used = arrived <= captured + delay * chunk_ms
    report = read_report(tmp_path)["hints"]
    due = frames - delay
    unused = frames_in(report["late_frames"]) + frames_in(report["missing_frames"])
    assert sorted(unused) == np.flatnonzero(~used[:due]).tolist()
    assert 10 < len(unused) < due - 10
    assert worst(read_outputs(case, tmp_path), offline(case, used)) < TOLERANCE
    assert worst(offline(case, used), case.small_output[0]) > 100 * TOLERANCE


def test_a_virtual_run_does_not_depend_on_the_load_of_the_machine(
    golden: GetGolden, golden_bundle: GetBundle, tmp_path: Path
) -> None:
    case = golden(SS)
    written = []
    for name, busy in (("idle", False), ("busy", True)):
        folder = tmp_path / name
        folder.mkdir()
        write_inputs(case, folder)
        spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 if busy else 0)]
        try:
            result = run(
                *("kb-client", "replay", "mixture.wav", "-o", "out.wav", "--output-format", "float"),
                *("--bundle", golden_bundle(SS), "--delay-ms", 20, "--jitter-ms", 12, "--loss", 0.02, "--seed", 5),
                *("--bandwidth-mbit", 5, "--server-ms", 3, "--report", "report.json"),
                cwd=folder,
            )
        finally:
            for spinner in spinners:
                spinner.kill()
        assert result.returncode == 0, result.stderr
        report = read_report(folder)
        del report["timing"]
        assert report["hints"]["late"] > 5
        assert report["hints"]["on_time"] > 5
        written.append((report, read_outputs(case, folder)))
    (report, outputs), (busy_report, busy_outputs) = written
    assert report == busy_report
    assert busy_outputs.tobytes() == outputs.tobytes()


def wait_for_frames(metrics_port: int, count: int) -> None:
    """Wait until a server has computed a number of frames."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=PATIENCE) as answer:
            match = re.search(r"^kb_frames_total\{.*\} (\S+)$", answer.read().decode(), re.MULTILINE)
        if match is not None and float(match[1]) >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"the server has not computed {count} frames")


def test_after_the_loss_of_the_server_the_small_network_continues(
    golden: GetGolden, golden_bundle: GetBundle, tmp_path: Path
) -> None:
    case, repeats = golden(SS), 4
    mixture, _ = write_inputs(case, tmp_path, repeats)
    port = free_port()
    with running_server(golden_bundle(SS), "--metrics-port", port) as server:
        client = subprocess.Popen(
            command(
                *("kb-client", "replay", mixture, "-o", tmp_path / "out.wav", "--output-format", "float", *EXACT),
                *("--bundle", golden_bundle(SS), "--server", server.address, "--clock", "real"),
                *("--delay-ms", 10, "--report", tmp_path / "report.json"),
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for_frames(port, 100)
        os.kill(server.process.pid, signal.SIGKILL)
        _, errors = client.communicate(timeout=PATIENCE)
    assert client.returncode == 0, errors
    assert "the server was lost" in errors
    report = read_report(tmp_path)
    frames = report["frames"]
    lost = report["server_lost"]["first_lost_hint"]
    assert 20 < lost < frames - 60
    assert report["server_lost"]["first_frame_without"] == lost + 6
    assert report["server_lost"]["status"] == "UNAVAILABLE"
    used = np.ones(frames, np.bool_)
    used[lost:] = False
    used[frames_in(report["hints"]["late_frames"]) + frames_in(report["hints"]["missing_frames"])] = False
    assert used[:lost].any()
    output = read_outputs(case, tmp_path)
    assert output.shape[-1] == repeats * case.mixture.shape[-1]
    assert worst(output, offline(case, used, repeats)) < TOLERANCE


def test_a_lost_server_is_an_error_if_it_is_required(
    golden: GetGolden, golden_bundle: GetBundle, tmp_path: Path
) -> None:
    mixture, _ = write_inputs(golden(SS), tmp_path, 4)
    port = free_port()
    with running_server(golden_bundle(SS), "--metrics-port", port) as server:
        client = subprocess.Popen(
            command(
                *("kb-client", "replay", mixture, "-o", tmp_path / "out.wav", "--bundle", golden_bundle(SS)),
                *("--server", server.address, "--clock", "real", "--require-server"),
            ),
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for_frames(port, 60)
        os.kill(server.process.pid, signal.SIGKILL)
        _, errors = client.communicate(timeout=PATIENCE)
    assert client.returncode == 1
    assert errors.startswith("kb-client: error: the server was lost after ")
    assert len(errors.splitlines()) == 1
    assert not list(tmp_path.glob("*out*"))


def test_on_the_real_clock_late_hints_are_zeroed_hints(
    golden: GetGolden, golden_bundle: GetBundle, ss_server: Server, tmp_path: Path
) -> None:
    """Which hints are late depends on this machine, but the report and the output must agree."""
    case = golden(SS)
    mixture, flags = write_inputs(case, tmp_path)
    flags += ["-o", tmp_path / "out.wav", "--output-format", "float", "--report", tmp_path / "report.json"]
    started = time.monotonic()
    result = run(
        *("kb-client", "replay", mixture, "--bundle", golden_bundle(SS), "--server", ss_server.address, *EXACT),
        *("--clock", "real", "--delay-ms", 30, "--jitter-ms", 10, *flags),
    )
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - started > 1  # the audio lasts one second
    report = read_report(tmp_path)
    hints = report["hints"]
    assert hints["on_time"] + hints["late"] + hints["missing"] == hints["due"] == report["frames"] - 6
    assert hints["age_ms"]["p50"] > 30
    used = np.ones(report["frames"], np.bool_)
    used[frames_in(hints["late_frames"]) + frames_in(hints["missing_frames"])] = False
    assert worst(read_outputs(case, tmp_path), offline(case, used)) < TOLERANCE


def servers_of(bundle: Path) -> list[int]:
    """Return the process ids of all servers whose command line contains the bundle."""
    processes = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                line = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"knowledge_boosting.remote_server.main" in line and str(bundle).encode() in line:
                processes.append(int(entry.name))
    return processes


@pytest.mark.skipif(not Path("/proc").exists(), reason="searches processes in /proc")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGHUP, 1), (signal.SIGKILL, -9)]
)
def test_the_local_server_ends_with_the_client(
    number: signal.Signals, code: int, golden: GetGolden, golden_bundle: GetBundle, tmp_path: Path
) -> None:
    mixture, _ = write_inputs(golden(SS), tmp_path, 100)  # still running when the signal is sent
    bundle = tmp_path / "bundle"
    bundle.symlink_to(golden_bundle(SS))
    client = subprocess.Popen(
        command("kb-client", "replay", mixture, "-o", tmp_path / "out.wav", "--bundle", bundle, "--clock", "real"),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + PATIENCE
    while not servers_of(bundle):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(4)  # until the run, or at least the start of the server; the signal must end both
    client.send_signal(number)
    _, errors = client.communicate(timeout=PATIENCE)
    assert client.returncode == code
    assert "Traceback" not in errors
    while servers_of(bundle):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # A killed process leaves temporary files, but no output.
    assert not list(tmp_path.glob("out*" if number == signal.SIGKILL else "*out*"))


# Interrupts itself while gRPC begins a call, before the thread that completes the call runs.
INTERRUPTED_CALL = """
import os, signal, sys
import grpc._channel
begin = grpc._channel._run_channel_spin_thread
def interrupted(state):
    os.kill(os.getpid(), signal.SIGINT)
    begin(state)
grpc._channel._run_channel_spin_thread = interrupted
signal.signal(signal.SIGINT, signal.default_int_handler)
from knowledge_boosting.device_client.main import main
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="sends a signal")
def test_an_interruption_while_a_call_begins_ends_the_command(
    golden: GetGolden, golden_bundle: GetBundle, ss_server: Server, tmp_path: Path
) -> None:
    mixture, _ = write_inputs(golden(SS), tmp_path)
    flags = [mixture, "--bundle", golden_bundle(SS), "--server", ss_server.address, "-o", tmp_path / "out.wav"]
    result = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_CALL, "replay", *map(str, flags)],
        env=environment(),
        timeout=PATIENCE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (1, "kb-client: error: interrupted\n")
    assert not list(tmp_path.glob("*out*"))


def test_with_a_running_level_the_output_scales_with_the_input(tmp_path: Path) -> None:
    """The output scales with the input from -60 to -6 dBFS, with hints, and also with an offset or for silence."""
    size = NetworkSize(channels=8, hidden=8, blocks=2, heads=2)
    config = Pair(task="ss", small=size, large=size, boosting=FixedDelay(delay=6), running_level=True)
    torch.manual_seed(0)
    pair = build(config)
    assert isinstance(pair, BoostedPair)
    write_bundle(tmp_path / "level", pair, config, untrained=True, source="", configuration="")
    speech = soundfile.read(SAMPLES / "mixture.flac", dtype="float32")[0][8000:32000]
    speech *= 10 ** (-26 / 20) / np.sqrt(np.mean(speech**2))
    with torch.inference_mode():
        expected = pair(torch.from_numpy(speech.T.copy())[None]).small[0].numpy()
    peak = np.abs(expected).max()
    with running_server(tmp_path / "level") as server:

        def replayed(samples: NDArray[np.float32]) -> NDArray[np.float32]:
            soundfile.write(tmp_path / "in.wav", samples, 16000, subtype="FLOAT")
            flags = ["--bundle", tmp_path / "level", "--server", server.address, "--delay-ms", 48]
            flags += ["-o", tmp_path / "out.wav", "--output-format", "float"]
            result = run("kb-client", "replay", tmp_path / "in.wav", *flags)
            assert result.returncode == 0, result.stderr
            names = ["out-speaker1.wav", "out-speaker2.wav"]
            return np.stack([soundfile.read(tmp_path / name, dtype="float32")[0].T for name in names])

        for level in (-60, -6):
            gain = 10 ** ((level + 26) / 20)
            np.testing.assert_allclose(replayed(speech * gain) / gain, expected, atol=1e-3 * peak)
        # The last window extends beyond the end of the signal, where the offset ends too.
        whole = replayed(speech + np.float32(0.3))[..., :-192]
        np.testing.assert_allclose(whole, expected[..., :-192], atol=1e-2 * peak)
        assert np.abs(replayed(np.zeros_like(speech))).max() <= 1e-5
