"""Hints that are used on arrival, with a real server: replay, a live session, and its repetition."""

import csv
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray

from knowledge_boosting.common.links import NetworkConditions
from knowledge_boosting.device_client.hints.buffer import ArrivalBuffer
from knowledge_boosting.models.arrival_fusion import NEVER
from knowledge_boosting.models.arrivals import MERGES
from knowledge_boosting.models.networks import write_bundle
from knowledge_boosting.models.pair import BoostedPair
from knowledge_boosting.training.data.hint_arrivals import simulate_arrivals
from tests.arrivals import arrival_pair
from tests.golden_cases import TOLERANCE, worst
from tests.processes import EXACT, Server, run, running_server

WINDOW, SECONDS = 30, 2
FRAMES = 125 * SECONDS


@pytest.fixture(scope="module")
def pair() -> BoostedPair:
    return arrival_pair(WINDOW)


@pytest.fixture(scope="module")
def bundle(pair: BoostedPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "arrival"
    write_bundle(path, pair, pair.config, untrained=True, source="random", configuration="none")
    return path


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    with running_server(bundle) as started:
        yield started


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "mixture.wav"
    samples = np.random.default_rng(0).normal(0, 0.1, (16000 * SECONDS, 2)).astype(np.float32)
    soundfile.write(path, samples, 16000, subtype="FLOAT")
    return path


def sound(path: Path) -> NDArray[np.float32]:
    """Read samples ``[M, N]``."""
    samples: NDArray[np.float32] = soundfile.read(path, dtype="float32", always_2d=True)[0].T
    return samples


def merge_times(arrived: NDArray[np.float64]) -> torch.Tensor:
    """Return the frame at which each hint is merged, from the times at which hints arrive, in frames."""
    times, waiting = torch.full((FRAMES,), NEVER), set[int]()
    for frame in range(FRAMES):
        waiting |= {number for number in range(frame) if arrived[number] <= frame and times[number] == NEVER}
        waiting = {number for number in waiting if number >= frame - WINDOW}
        for number in sorted(waiting)[-MERGES:]:
            times[number] = frame
            waiting.remove(number)
    return times


@torch.inference_mode()
def test_a_replay_gives_the_samples_of_one_process(
    pair: BoostedPair, bundle: Path, server: Server, mixture: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    up, down = rng.uniform(0, 20, FRAMES), rng.uniform(0, 40, FRAMES)
    down[60] = 200.5  # a stall, after which many hints arrive together
    down[150] = 1000.5  # one that is longer than the window
    rows = [f"{a:.6f},{b:.6f}" for a, b in zip(up, down, strict=True)]
    (tmp_path / "trace.csv").write_text("\n".join(["up_ms,down_ms", *rows]) + "\n")
    for engine in ("compiled", "onnx", "torch"):
        result = run(
            *("kb-client", "replay", mixture, "--bundle", bundle, "--server", server.address, *EXACT),
            *("--trace", tmp_path / "trace.csv", "-o", tmp_path / "out.wav", "--output-format", "float"),
            *("--report", tmp_path / "report.json", "--plot", tmp_path / "plot.png", "--engine", engine),
        )
        assert result.returncode == 0, result.stderr
        output = np.stack([sound(tmp_path / f"out-speaker{number}.wav") for number in (1, 2)])
        arrived = np.maximum.accumulate(np.maximum.accumulate(8 * np.arange(FRAMES) + up) + down) / 8
        times = merge_times(arrived)
        expected = pair(torch.from_numpy(sound(mixture))[None], None, times).small[0]
        assert worst(output, expected) < TOLERANCE

    hints: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())["hints"]
    used = times[: FRAMES - 1] != NEVER
    assert hints["due"] == FRAMES - 1
    assert hints["on_time"] == int(used.sum())
    assert 20 < hints["due"] - hints["on_time"] < 200
    for milliseconds, share in hints["shares_by_age_ms"].items():
        youngest = [
            min((frame - number for number in range(frame) if times[number] <= frame), default=FRAMES)
            for frame in range(FRAMES)
        ]
        assert share == pytest.approx(np.mean(np.array(youngest) * 8 <= int(milliseconds)), abs=1e-4)
    assert "newest hint" in result.stdout


def test_the_curve_by_delay_gives_the_figures_of_replays_at_these_delays(
    bundle: Path, server: Server, mixture: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    references = [tmp_path / "1.wav", tmp_path / "2.wav"]
    for path in references:
        soundfile.write(path, rng.normal(0, 0.1, (16000 * SECONDS, 2)).astype(np.float32), 16000, subtype="FLOAT")
    call = ["replay", mixture, "-o", tmp_path / "out.wav", "--bundle", bundle, "--server", server.address]
    call += ["--reference", references[0], "--reference", references[1], "--report", tmp_path / "report.json"]

    def report(*flags: object) -> dict[str, Any]:
        result = run("kb-client", *call, *flags)
        assert result.returncode == 0, result.stderr
        found: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
        return found

    # The hints of a run with losses are complete all the same.
    found = report("--page", tmp_path / "page.html", "--delay-ms", "20", "--jitter-ms", "30", "--loss", "0.1")
    curve = found["si_sdri_by_delay_ms"]
    assert list(curve) == ["8", "16", "24", "48", "96", "200"]
    for delay in ("16", "200"):
        alone = report("--delay-ms", delay)
        assert alone["si_sdri_by_delay_ms"] is None
        assert alone["quality"]["boosted"]["si_sdri"] == pytest.approx(curve[delay], abs=0.002)
    assert curve["16"] != curve["200"]
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert all(f"{gain:+.1f} at {delay} ms" in page for delay, gain in curve.items())


@torch.inference_mode()
def test_training_simulates_the_networks_of_a_replay(
    pair: BoostedPair, bundle: Path, server: Server, mixture: Path, tmp_path: Path
) -> None:
    result = run(
        *("kb-client", "replay", mixture, "--bundle", bundle, "--server", server.address, "--seed", 5, *EXACT),
        *("--delay-ms", 30, "--jitter-ms", 20, "--loss", 0.03, "--server-ms", 4),
        *("-o", tmp_path / "out.wav", "--output-format", "float"),
    )
    assert result.returncode == 0, result.stderr
    conditions = NetworkConditions(delay_ms=30, jitter_ms=20, loss=0.03)
    ready_at = simulate_arrivals(conditions, 5, FRAMES, pair.config)
    assert (ready_at == NEVER).any()
    expected = pair(torch.from_numpy(sound(mixture))[None], None, ready_at).small[0]
    output = np.stack([sound(tmp_path / f"out-speaker{number}.wav") for number in (1, 2)])
    assert worst(output, expected) < TOLERANCE


@torch.inference_mode()
def test_a_live_session_gives_the_samples_of_one_process(
    pair: BoostedPair, bundle: Path, server: Server, mixture: Path, tmp_path: Path
) -> None:
    """The recording says which hints were used at which frames. With the same hints, every way gives the same."""
    recording = tmp_path / "recording"
    result = run(
        *("kb-client", "live", "--bundle", bundle, "--server", server.address, "--play", "1"),
        *("--input", mixture, "--output", tmp_path / "played.wav", "--record", recording),
    )
    assert result.returncode == 0, result.stderr
    again = run(
        *("kb-client", "replay", recording / "input.wav", "-o", tmp_path / "again.wav"),
        *("--bundle", bundle, "--frame-log", recording / "frames.csv"),
    )
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again.wav").read_bytes() == (recording / "output.wav").read_bytes()

    with (recording / "frames.csv").open() as file:
        rows = [[int(age) for age in row["ages"].split()] for row in csv.DictReader(file)]
    assert sum(map(len, rows)) > FRAMES // 4
    channels = pair.config.hint_channels
    values = iter(np.fromfile(recording / "hints.f32", "<f4").reshape(-1, channels, 97))
    hints, times = torch.zeros(1, len(rows), channels, 97), torch.full((len(rows),), NEVER)
    for frame, ages in enumerate(rows):
        for age in ages:
            hints[0, frame - age], times[frame - age] = torch.from_numpy(next(values)), frame
    samples = torch.from_numpy(sound(recording / "input.wav"))[None, :, : 128 * len(rows)]
    expected = pair.estimate_small(samples, hints, None, times)[0, 0]
    # The lookahead after the last frame was recorded, but is not part of these samples.
    played = sound(recording / "output.wav")
    assert worst(played[:, :-128], expected[:, :-128]) < TOLERANCE


def test_hints_are_taken_from_the_moment_they_arrive() -> None:
    buffer = ArrivalBuffer(max_age=WINDOW)
    for frame, arrived_at in ((3, 100), (4, 100), (5, 100), (5, 110), (6, 200)):
        buffer.put(frame, np.full((1, 1), frame, np.float32), arrived_at)
    assert buffer.take(8, now=99) == []
    assert [(hint.age, hint.values.item()) for hint in buffer.take(9, now=150)] == [(4, 5), (5, 4)]
    assert [hint.age for hint in buffer.take(10, now=150)] == [7]
    assert buffer.take(11, now=199) == []
    assert buffer.take(6 + WINDOW + 1, now=200) == []  # too old
    buffer.put(40, np.zeros((1, 1), np.float32), 300)
    assert buffer.take(40, now=300) == []  # the features of its own frame are not there yet
    assert [hint.age for hint in buffer.take(41, now=300)] == [1]


def test_one_thread_puts_while_another_takes() -> None:
    buffer, frames, taken = ArrivalBuffer(WINDOW), 2000, list[int]()
    captured = threading.Semaphore(0)

    def put() -> None:
        for frame in range(frames):
            captured.acquire()
            buffer.put(frame, np.full((1, 1), frame, np.float32), arrived_at=0)

    thread = threading.Thread(target=put)
    thread.start()
    for frame in range(frames):
        captured.release()
        time.sleep(1e-5 * (frame % 3))  # sometimes longer and sometimes shorter than the other thread needs
        for hint in buffer.take(frame, now=0):
            assert hint.values.item() == frame - hint.age
            taken.append(frame - hint.age)
    thread.join()
    assert len(taken) == len(set(taken)) > frames // 10
