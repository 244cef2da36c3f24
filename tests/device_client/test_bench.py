"""Tests for ``kb-client bench``."""

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from knowledge_boosting.device_client.commands.bench import bench as run_bench
from knowledge_boosting.device_client.engines.engine import CheckedEngine
from knowledge_boosting.models.arrivals import Hint
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.protos.codec import Samples
from tests.processes import command


def test_every_installed_bundle_is_measured(tmp_path: Path) -> None:
    report = tmp_path / "bench.json"
    call = command("kb-client", "bench", "--frames", 100, "--json", report)
    result = subprocess.run(call, capture_output=True, text=True, check=True)
    figures = json.loads(report.read_text())
    assert set(figures["bundles"]) == {bundle.name for bundle in Bundle.shipped()}
    for name, row in figures["bundles"].items():
        assert name in result.stdout
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] <= row["p99.9_ms"]
    assert figures["peak_memory_mib"] > 10


@pytest.mark.parametrize(
    ("milliseconds", "verdict"),
    [(0.8, "live, with 10x headroom"), (5.0, "too slow for golden: most frames")],
)
def test_the_verdict_follows_from_the_time_per_frame(
    milliseconds: float,
    verdict: str,
    golden_bundle: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = [0]  # advances only while the network runs
    step = CheckedEngine.step

    def slow(engine: CheckedEngine, window: Samples, hints: Sequence[Hint] = ()) -> Samples:
        clock[0] += int(1e6 * milliseconds)
        return step(engine, window, hints)

    monkeypatch.setattr(CheckedEngine, "step", slow)
    monkeypatch.setattr("time.perf_counter_ns", lambda: clock[0])
    run_bench([str(golden_bundle("ss_delay6_compression2"))], "onnx", 200, None)
    assert verdict in " ".join(capsys.readouterr().out.replace("ss_delay6_compression2", "golden").split())


def test_a_missing_output_folder_is_reported_before_the_measurement(tmp_path: Path) -> None:
    call = command("kb-client", "bench", "--json", tmp_path / "no" / "b.json")
    result = subprocess.run(call, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "create it first" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not result.stdout
