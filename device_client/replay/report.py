"""The report of a replay: a JSON file, which ``docs/report.md`` describes, and a table for the terminal."""

from bisect import bisect_left
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table

from knowledge_boosting.common.files import atomic_file
from knowledge_boosting.common.links import NetworkConditions
from knowledge_boosting.device_client.hints.buffer import hint_words
from knowledge_boosting.device_client.replay.loop import Run
from knowledge_boosting.device_client.replay.tally import Tally
from knowledge_boosting.models.config import ModelConfig
from knowledge_boosting.models.manifest import UNTRAINED_NOTICE, Manifest
from knowledge_boosting.models.tasks import TaskName

FrameRange = tuple[int, int]
_SHARE_AGES_MS = 50, 100, 200


class Record(BaseModel):
    """Base class of the parts of the report."""

    model_config = ConfigDict(extra="forbid")


class Percentiles(Record):
    """Percentiles of a set of times. They are null if the set is empty."""

    p50: float | None
    p95: float | None
    p99: float | None
    max: float | None

    @classmethod
    def of(cls, times: Tally) -> "Percentiles":
        """Return the percentiles of times, in milliseconds."""
        if not times:
            return cls(p50=None, p95=None, p99=None, max=None)
        p50, p95, p99, top = (round(times.percentile_ms(q), 3) for q in (50, 95, 99, 100))
        return cls(p50=p50, p95=p95, p99=p99, max=top)


class BundleReport(Record):
    """The part of the report about the bundle."""

    name: str
    id: str
    task: TaskName
    untrained: bool
    notice: str | None = Field(description="a warning about the weights that applies to all figures")
    delay_frames: int
    delay_ms: float


class NetworkReport(Record):
    """The part of the report about the network conditions."""

    delay_ms: float
    jitter_ms: float
    loss: float
    bandwidth_mbit: float | None
    trace: str | None
    server_ms: float | None = Field(description="virtual clock: simulated time of the server for each frame")
    pcm_encoding: str
    hint_encoding: str


class HintReport(Record):
    """The part of the report about the hints."""

    due: int = Field(description="hints that a frame could use: all except those of the last delay_frames frames")
    on_time: int
    late: int = Field(description="hints that arrived after their deadline; zeros were fused instead")
    missing: int = Field(description="hints that had not arrived at the end of the run; zeros were fused instead")
    late_frames: list[FrameRange] = Field(description="first and last frame of each range of late hints")
    missing_frames: list[FrameRange]
    shares_by_age_ms: dict[str, float] | None = Field(
        description="hints used on arrival: shares of the frames with a hint of at most this age; null: fixed delay"
    )
    age_ms: Percentiles = Field(description="time from the capture of a frame to the arrival of its hint")
    age_histogram_ms: dict[str, int] = Field(description="number of hints by age; the key is the upper edge of a class")
    bytes_up: int = Field(description="PCM sent")
    bytes_down: int = Field(description="hint payloads received")
    kbit_per_second_up: float
    kbit_per_second_down: float


class ServerLost(Record):
    """The part of the report about a server that was lost before the end of the audio."""

    first_lost_hint: int = Field(description="first frame whose hint was not received")
    first_frame_without: int = Field(description="first frame from which on no hint was fused")
    status: str
    detail: str


class Quality(Record):
    """The quality of one system in dB, as the mean over speakers and microphones."""

    si_sdr: float
    si_sdri: float
    snri: float


class Timing(Record):
    """The part of the report about times. On the virtual clock, only this part differs between runs."""

    server: str
    wall_seconds: float
    compute_ms: Percentiles = Field(description="time of the small network for each frame")
    real_time_factor: float = Field(description="compute time divided by the duration of the audio; must be below 1")
    frames_behind: int = Field(description="real clock: frames that started more than one chunk after their capture")
    server_queue_ms: Percentiles
    server_compute_ms: Percentiles


class Report(Record):
    """The report of one replay."""

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
        default=0, description="frames whose estimate was not finite, so that the output is the input"
    )
    hints: HintReport | None
    server_lost: ServerLost | None
    quality: dict[str, Quality] = Field(
        description="with --reference: mixture, alone (--alone), small_without_hints, boosted, large (--with-large)"
    )
    si_sdri_by_delay_ms: dict[str, float] | None = Field(
        default=None,
        description="with --reference and --page, for hints used on arrival: SI-SDRi in dB of boosted, by delay",
    )
    timing: Timing


def bundle_report(manifest: Manifest) -> BundleReport:
    """Create the part about the bundle."""
    return BundleReport(
        name=manifest.name,
        id=manifest.id,
        task=manifest.model.task,
        untrained=manifest.untrained,
        notice=UNTRAINED_NOTICE if manifest.untrained else None,
        delay_frames=manifest.model.max_age,
        delay_ms=round(manifest.model.max_age_ms, 6),
    )


def network_report(
    conditions: NetworkConditions, *, trace: str | None, server_ms: float | None, pcm: str, hints: str
) -> NetworkReport:
    """Create the part about the network conditions.

    Args:
        conditions: The network conditions.
        trace: The path of the trace that replaces them, or None.
        server_ms: The simulated time of the server for each frame, or None on the real clock.
        pcm: The encoding of the samples.
        hints: The encoding of the hints.
    """
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


def hint_report(run: Run, model: ModelConfig, seconds: float) -> HintReport:
    """Create the part about the hints. ``seconds`` is the duration of the audio."""
    chunk_ms = 1e3 * model.framing.chunk_seconds
    shares = {str(age): round(run.log.share_younger(int(age / chunk_ms)), 4) for age in _SHARE_AGES_MS}
    on_time, late, missing = run.log.classify(run.ended_at)
    ages = run.log.tally(run.ended_at)
    return HintReport(
        due=len(on_time),
        on_time=int(on_time.sum()),
        late=int(late.sum()),
        missing=int(missing.sum()),
        late_frames=_ranges(late),
        missing_frames=_ranges(missing),
        shares_by_age_ms=shares if model.on_arrival else None,
        age_ms=Percentiles.of(ages),
        age_histogram_ms=_histogram(ages),
        bytes_up=run.bytes_up,
        bytes_down=run.bytes_down,
        kbit_per_second_up=round(run.bytes_up * 8e-3 / seconds, 1),
        kbit_per_second_down=round(run.bytes_down * 8e-3 / seconds, 1),
    )


def lost_report(run: Run) -> ServerLost | None:
    """Create the part about a lost server. It is None if the server was not lost."""
    if run.lost is None:
        return None
    first = run.hints_received
    used = np.flatnonzero(run.log.used)
    last_use = (used + run.log.age_used[used]).max(initial=0)
    return ServerLost(
        first_lost_hint=first,
        first_frame_without=min(max(first + run.log.delay, int(last_use) + 1), len(run.log.used)),
        status=run.lost.status,
        detail=run.lost.detail,
    )


def timing(run: Run, model: ModelConfig, *, server: str, wall_seconds: float) -> Timing:
    """Create the part about times."""
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


def settings(report: Report) -> dict[str, str]:
    """Return the settings and the most important figures of a run, as texts by their names."""
    texts = {"Bundle": f"{report.bundle.name} ({report.bundle.id[:12]})", "Duration": f"{report.seconds:.1f} s"}
    if report.network is not None and report.hints is not None:
        hints = report.hints
        texts["Network"] = _describe(report.network, report.clock)
        texts["Hints"] = (
            f"{hints.on_time} of {hints.due} {hint_words(on_arrival=hints.shares_by_age_ms is not None)[0]}"
        )
        texts["Traffic"] = f"{hints.kbit_per_second_up:g} kbit/s up, {hints.kbit_per_second_down:g} down"
    texts["Device"] = f"compute {_percentiles(report.timing.compute_ms)}"
    return texts


def table(report: Report) -> Table:
    """Return the report as a table for the terminal."""
    bundle, hints, times = report.bundle, report.hints, report.timing
    title = f"{report.input}: {report.frames} frames, {report.seconds:.2f} s, bundle {bundle.name}"
    grid = Table(title=title, show_header=False, title_justify="left", caption_justify="left")
    if bundle.notice:
        grid.caption = bundle.notice
        grid.add_row("weights", "UNTRAINED")
    if (boosted := report.quality.get("boosted")) is not None:
        base = "alone" if "alone" in report.quality else "small_without_hints"
        gained = round(boosted.si_sdri - report.quality[base].si_sdri, 2) + 0.0  # no minus before zero
        over = "the network alone" if base == "alone" else "the same network without hints"
        grid.add_row("gain of hints", f"{gained:+.2f} dB over {over}{' (untrained)' if bundle.untrained else ''}")
    names = {
        "mixture": "mixture",
        "alone": "alone",
        "small_without_hints": "hints withheld" if report.network is not None else "this network",
        "boosted": "boosted",
        "large": "large",
    }
    for key, quality in report.quality.items():
        gains = "" if key == "mixture" else f", SI-SDRi {quality.si_sdri:+.2f} dB, SNRi {quality.snri:+.2f} dB"
        untrained = " (untrained)" if bundle.untrained and key != "mixture" else ""
        grid.add_row(names[key], f"SI-SDR {quality.si_sdr:.2f} dB{gains}{untrained}")
    if report.si_sdri_by_delay_ms:
        figures = (f"{gain:+.2f} at {delay} ms" for delay, gain in report.si_sdri_by_delay_ms.items())
        grid.add_row("boosted, by delay", f"SI-SDRi {', '.join(figures)}")
    if report.network is not None and hints is not None:
        grid.add_row("link", _describe(report.network, report.clock))
        share = f"{100 * hints.on_time / hints.due:.1f} %" if hints.due else "none due"
        used, unused = hint_words(on_arrival=hints.shares_by_age_ms is not None)
        grid.add_row(
            "hints", f"{hints.on_time} {used} ({share}), {hints.late} {unused}, {hints.missing} missing of {hints.due}"
        )
        grid.add_row("hint age", f"{_percentiles(hints.age_ms)}; deadline {bundle.delay_ms:g} ms")
        if hints.shares_by_age_ms is not None:
            shares = (f"at most {age} ms old in {100 * share:.1f} %" for age, share in hints.shares_by_age_ms.items())
            grid.add_row("newest hint", f"{', '.join(shares)} of the frames")
        grid.add_row("traffic", f"{hints.kbit_per_second_up:g} kbit/s up, {hints.kbit_per_second_down:g} down")
        if report.server_lost is not None:
            lost = report.server_lost
            grid.add_row(
                "server lost", f"no hints from frame {lost.first_frame_without} on ({lost.status}: {lost.detail})"
            )
        grid.add_row("server", f"compute {_percentiles(times.server_compute_ms)}")
    else:
        grid.add_row("hints", "none: this bundle is one network alone")
    grid.add_row("device", f"compute {_percentiles(times.compute_ms)}; real-time factor {times.real_time_factor:.2f}")
    if report.overflows:
        grid.add_row("overflowed", f"{report.overflows} frames: the output is the input; scale the samples to +-1")
    if times.frames_behind:
        grid.add_row("device too slow", f"{times.frames_behind} frames started more than one chunk after their capture")
    for path in report.outputs:
        grid.add_row("wrote", path)
    return grid


def _describe(network: NetworkReport, clock: str) -> str:
    if network.trace is not None:
        parts = [f"delays of {network.trace}"]
    else:
        parts = [f"{network.delay_ms:g} ms round trip"]
        if network.jitter_ms:
            parts.append(f"{network.jitter_ms:g} ms jitter")
        if network.loss:
            parts.append(f"{100 * network.loss:g} % loss")
        if network.bandwidth_mbit is not None:
            parts.append(f"{network.bandwidth_mbit:g} Mbit/s")
    if network.server_ms:
        parts.append(f"server {network.server_ms:g} ms")
    return f"{', '.join(parts)}; {clock} clock"


def _percentiles(figures: Percentiles) -> str:
    if figures.p50 is None:
        return "none"
    return f"p50 {figures.p50:.2f}, p95 {figures.p95:.2f}, p99 {figures.p99:.2f} ms"


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
    """Write the report as JSON. After an error there is no file.

    Raises:
        InputError: The file cannot be written.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
