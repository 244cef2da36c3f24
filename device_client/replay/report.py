"""What a replay tells: the JSON report (``docs/report.md`` describes it) and the table for the terminal."""

from bisect import bisect_left
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table

from knowledge_boosting.common.files import atomic_file
from knowledge_boosting.device_client.hints.links import NetworkConditions
from knowledge_boosting.device_client.replay.loop import Run
from knowledge_boosting.device_client.replay.tally import Tally
from knowledge_boosting.models.config import ModelConfig
from knowledge_boosting.models.manifest import UNTRAINED_NOTICE, Manifest
from knowledge_boosting.models.tasks import TaskName

FrameRange = tuple[int, int]


class Record(BaseModel):
    """A part of the report."""

    model_config = ConfigDict(extra="forbid")


class Percentiles(Record):
    """Of a set of figures; null where there are none."""

    p50: float | None
    p95: float | None
    p99: float | None
    max: float | None

    @classmethod
    def of(cls, times: Tally) -> "Percentiles":
        """Percentiles of times, in milliseconds."""
        if not times:
            return cls(p50=None, p95=None, p99=None, max=None)
        p50, p95, p99, top = (round(times.percentile_ms(q), 3) for q in (50, 95, 99, 100))
        return cls(p50=p50, p95=p95, p99=p99, max=top)


class BundleReport(Record):
    """The bundle that ran."""

    name: str
    id: str
    task: TaskName
    untrained: bool
    notice: str | None = Field(description="what must be known before any figure here is used")
    delay_frames: int
    delay_ms: float


class NetworkReport(Record):
    """The simulated network."""

    delay_ms: float
    jitter_ms: float
    loss: float
    bandwidth_mbit: float | None
    trace: str | None
    server_ms: float | None = Field(description="virtual clock: time the server is taken to need for a frame")
    pcm_encoding: str
    hint_encoding: str


class HintReport(Record):
    """What became of the hints."""

    due: int = Field(description="hints that a frame waited for: all but those of the last delay_frames frames")
    on_time: int
    late: int = Field(description="arrived after the frame they were due at had started; fused as zeros")
    missing: int = Field(description="had not arrived when the run ended; fused as zeros")
    late_frames: list[FrameRange] = Field(description="first and last frame of every stretch of late hints")
    missing_frames: list[FrameRange]
    age_ms: Percentiles = Field(description="from a frame's capture to the arrival of its hint")
    age_histogram_ms: dict[str, int] = Field(description="arrived hints by age: upper edge of each class, in order")
    bytes_up: int = Field(description="PCM sent")
    bytes_down: int = Field(description="hint payloads received")
    kbit_per_second_up: float
    kbit_per_second_down: float


class ServerLost(Record):
    """The server went away before the audio ended."""

    first_lost_hint: int = Field(description="no hint of this frame or a later one was fused")
    first_frame_without: int = Field(description="from this frame on the small network was alone")
    status: str
    detail: str


class Quality(Record):
    """Mean over sources and microphones, dB."""

    si_sdr: float
    si_sdri: float
    snri: float


class Timing(Record):
    """Everything that differs from run to run on the virtual clock."""

    server: str
    wall_seconds: float
    compute_ms: Percentiles = Field(description="small network, per frame")
    real_time_factor: float = Field(description="compute time over duration of the audio; below 1 keeps up")
    frames_behind: int = Field(description="real clock: frames started more than one chunk after their capture")
    server_queue_ms: Percentiles
    server_compute_ms: Percentiles


class Report(Record):
    """One replay."""

    schema_version: Literal[1] = 1
    bundle: BundleReport
    input: str
    seconds: float
    sample_rate: int
    outputs: list[str]
    clipped_samples: int
    clock: Literal["virtual", "real"]
    seed: int
    network: NetworkReport | None = Field(description="null for a bundle of one network alone")
    frames: int
    overflows: int = Field(
        default=0, description="frames at which the small network gave no numbers, and the input was taken in its place"
    )
    hints: HintReport | None
    server_lost: ServerLost | None
    quality: dict[str, Quality] = Field(
        description="with --reference: mixture, alone (--alone), small_without_hints, boosted, large (--with-large)"
    )
    timing: Timing


def bundle_report(manifest: Manifest) -> BundleReport:
    """The report's part on the bundle."""
    return BundleReport(
        name=manifest.name,
        id=manifest.id,
        task=manifest.model.task,
        untrained=manifest.untrained,
        notice=UNTRAINED_NOTICE if manifest.untrained else None,
        delay_frames=manifest.model.delay,
        delay_ms=_budget_ms(manifest.model),
    )


def network_report(
    conditions: NetworkConditions, *, trace: str | None, server_ms: float | None, pcm: str, hints: str
) -> NetworkReport:
    """The report's part on the network."""
    recorded = trace is not None
    return NetworkReport(
        delay_ms=0 if recorded else conditions.delay_ms,
        jitter_ms=0 if recorded else conditions.jitter_ms,
        loss=0 if recorded else conditions.loss,
        bandwidth_mbit=None if recorded else conditions.bandwidth_mbit,
        trace=trace,
        server_ms=server_ms,
        pcm_encoding=pcm,
        hint_encoding=hints,
    )


def hint_report(run: Run, seconds: float) -> HintReport:
    """The report's part on the hints."""
    on_time, late, missing = run.log.classify(run.ended_at)
    ages = run.log.tally(run.ended_at)
    return HintReport(
        due=len(on_time),
        on_time=int(on_time.sum()),
        late=int(late.sum()),
        missing=int(missing.sum()),
        late_frames=_ranges(late),
        missing_frames=_ranges(missing),
        age_ms=Percentiles.of(ages),
        age_histogram_ms=_histogram(ages),
        bytes_up=run.bytes_up,
        bytes_down=run.bytes_down,
        kbit_per_second_up=round(run.bytes_up * 8e-3 / seconds, 1),
        kbit_per_second_down=round(run.bytes_down * 8e-3 / seconds, 1),
    )


def lost_report(run: Run) -> ServerLost | None:
    """The report's part on a server that went away."""
    if run.lost is None:
        return None
    first = run.hints_received
    return ServerLost(
        first_lost_hint=first,
        first_frame_without=min(first + run.log.delay, len(run.log.used)),
        status=run.lost.status,
        detail=run.lost.detail,
    )


def timing(run: Run, model: ModelConfig, *, server: str, wall_seconds: float) -> Timing:
    """The report's part on time."""
    frames = max(len(run.compute), 1)
    return Timing(
        server=server,
        wall_seconds=round(wall_seconds, 3),
        compute_ms=Percentiles.of(run.compute),
        real_time_factor=round(run.compute.total / frames / (1e6 * model.framing.chunk_seconds), 4),
        frames_behind=run.frames_behind,
        server_queue_ms=Percentiles.of(run.server_queue),
        server_compute_ms=Percentiles.of(run.server_compute),
    )


def table(report: Report) -> Table:
    """The report for a person."""
    bundle, hints, took = report.bundle, report.hints, report.timing
    title = f"{report.input}: {report.frames} frames, {report.seconds:.2f} s, bundle {bundle.name}"
    grid = Table(title=title, show_header=False, title_justify="left", caption_justify="left")
    if bundle.notice:
        grid.caption = bundle.notice
        grid.add_row("weights", "UNTRAINED")
    if report.network is not None and hints is not None:
        grid.add_row("network", _describe(report.network, report.clock))
        share = f"{100 * hints.on_time / hints.due:.1f} %" if hints.due else "none due"
        grid.add_row(
            "hints", f"{hints.on_time} on time ({share}), {hints.late} late, {hints.missing} missing of {hints.due}"
        )
        grid.add_row("hint age", f"{_spread(hints.age_ms)}; due after {bundle.delay_ms:g} ms")
        grid.add_row("traffic", f"{hints.kbit_per_second_up:g} kbit/s up, {hints.kbit_per_second_down:g} down")
        if report.server_lost is not None:
            lost = report.server_lost
            grid.add_row(
                "server lost", f"no hints from frame {lost.first_frame_without} on ({lost.status}: {lost.detail})"
            )
        grid.add_row("server", f"compute {_spread(took.server_compute_ms)}")
    else:
        grid.add_row("hints", "none: this bundle is one network alone")
    grid.add_row("device", f"compute {_spread(took.compute_ms)}; real-time factor {took.real_time_factor:.2f}")
    if report.overflows:
        grid.add_row("overflowed", f"{report.overflows} frames: the input was taken; scale samples to +-1")
    if took.frames_behind:
        grid.add_row("device too slow", f"{took.frames_behind} frames started more than a chunk late")
    names = {
        "mixture": "mixture",
        "alone": "alone",
        "small_without_hints": "small, no hints" if report.network is not None else "this network",
        "boosted": "boosted",
        "large": "large",
    }
    for key, quality in report.quality.items():
        gains = "" if key == "mixture" else f", SI-SDRi {quality.si_sdri:+.2f} dB, SNRi {quality.snri:+.2f} dB"
        untrained = " (untrained)" if bundle.untrained and key != "mixture" else ""
        grid.add_row(names[key], f"SI-SDR {quality.si_sdr:.2f} dB{gains}{untrained}")
    for path in report.outputs:
        grid.add_row("wrote", path)
    return grid


def _describe(network: NetworkReport, clock: str) -> str:
    if network.trace is not None:
        words = [f"delays of {network.trace}"]
    else:
        words = [f"{network.delay_ms:g} ms round trip"]
        if network.jitter_ms:
            words.append(f"{network.jitter_ms:g} ms jitter")
        if network.loss:
            words.append(f"{100 * network.loss:g} % loss")
        if network.bandwidth_mbit is not None:
            words.append(f"{network.bandwidth_mbit:g} Mbit/s")
    if network.server_ms:
        words.append(f"server {network.server_ms:g} ms")
    return f"{', '.join(words)}; {clock} clock"


def _spread(figures: Percentiles) -> str:
    if figures.p50 is None:
        return "none"
    return f"p50 {figures.p50:.2f}, p95 {figures.p95:.2f}, p99 {figures.p99:.2f} ms"


def _budget_ms(model: ModelConfig) -> float:
    return round(1000 * model.delay * model.framing.chunk_seconds, 6)


def _ranges(flags: NDArray[np.bool_]) -> list[FrameRange]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(int)))
    return [(int(first), int(end) - 1) for first, end in zip(edges[::2], edges[1::2], strict=True)]


def _histogram(ages: Tally) -> dict[str, int]:
    edges = [4, 8, 16, 24, 32, 40, 48, 64, 96, 128, 256, 512, 1024]
    classes = [0] * (len(edges) + 1)
    for microseconds, count in ages.counts.items():
        classes[bisect_left(edges, microseconds / 1e3)] += count
    return dict(zip([*map(str, edges), "inf"], classes, strict=True))


def write_report(path: Path, report: Report) -> None:
    """Write the report as JSON, whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
