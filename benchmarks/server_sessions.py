"""Measures how many sessions a server supports: ``python -m benchmarks.server_sessions ss-compact``, ``--tiny``.

Starts a kb-server process and increases the number of sessions step by step until hints are late. Each session sends a
chunk every 8 ms in real time. The latency of a hint is the time from when its chunk should be sent until the hint
arrives. Client and server share the machine. Prints a table, and writes JSON and a plot.
"""

import argparse
import asyncio
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.manifest import read_manifest
from tests.load import SIZES, DeviceAudio, open_load, write_random_bundle
from tests.processes import Server, cpu_seconds, memory_mib, running_server

QUANTILES = {"p50": 50, "p95": 95, "p99": 99}
PARTS = ("latency", "lag", "transport", "queue", "compute")
WARM_UP = 1.0  # seconds at the start of a step that are not measured


@dataclass(frozen=True)
class Step:
    """The result of a number of simultaneous sessions."""

    sessions: int
    sent: int
    lost: int  # hints that never arrived
    late: int  # hints that arrived after their deadline
    ended: list[str]  # sessions that the server refused or ended
    milliseconds: dict[str, dict[str, float]]  # quantiles by part of the latency
    server_cores: float
    client_cores: float
    server_mib: float

    @property
    def order(self) -> tuple[int, int, float]:
        """The sort key of repeated steps; the smallest is the best."""
        return len(self.ended), self.lost, self.milliseconds["latency"]["p99"]

    def within(self, limit_ms: float) -> bool:
        """Return whether 99 % of the hints arrive within ``limit_ms`` and none is lost."""
        return not self.ended and not self.lost and self.milliseconds["latency"]["p99"] < limit_ms


async def measure(server: Server, audio: DeviceAudio, sessions: int, seconds: float, per_connection: int) -> Step:
    pid = server.process.pid
    async with open_load(server.address, audio, sessions, per_connection) as load:
        if not load.ended:
            await load.run(WARM_UP)
        load.take()
        sent, hints = load.sent, load.hints
        began, used, own = time.monotonic(), cpu_seconds(pid), time.process_time()
        if not load.ended:
            await load.run(seconds)
        passed = time.monotonic() - began
        used, own = cpu_seconds(pid) - used, time.process_time() - own
        await load.settle()
        parts = load.take().milliseconds()
        sent, lost, ended = load.sent - sent, (load.sent - sent) - (load.hints - hints), load.ended
    return Step(
        sessions=sessions,
        sent=sent,
        lost=max(lost, 0),  # hints of the warm-up can arrive after it
        late=int((parts["latency"] > audio.deadline_ms).sum()),
        ended=ended,
        milliseconds={
            part: {
                name: round(float(np.percentile(parts[part], value)), 3) if len(parts[part]) else float("inf")
                for name, value in QUANTILES.items()
            }
            for part in PARTS
        },
        server_cores=round(used / max(passed, 1e-3), 3),
        client_cores=round(own / max(passed, 1e-3), 3),
        server_mib=round(memory_mib(pid), 1),
    )


async def search(
    server: Server, audio: DeviceAudio, limits: list[float], options: argparse.Namespace
) -> tuple[list[Step], dict[float, int]]:
    """Run 1, 2, 4, ... sessions until the largest limit is missed, and then refine the search.

    Returns:
        All steps, and the maximum number of sessions by limit.
    """
    steps: dict[int, Step] = {}

    async def step(sessions: int) -> Step:
        if sessions in steps:
            return steps[sessions]
        for _ in range(options.tries):
            tried = await measure(server, audio, sessions, options.seconds, options.per_connection)
            Console(stderr=True).print(f"{sessions} sessions: p99 {tried.milliseconds['latency']['p99']} ms")
            await asyncio.sleep(1)  # so that the server can release the sessions of this step
            steps[sessions] = min(steps.get(sessions, tried), tried, key=lambda each: each.order)
            if steps[sessions].within(min(limits)):
                break
        return steps[sessions]

    sessions = 1
    while (await step(sessions)).within(max(limits)) and sessions < options.most:
        sessions = min(2 * sessions, options.most)
    most = {}
    for limit in limits:
        good = max((count for count, result in steps.items() if result.within(limit)), default=0)
        bad = min((count for count, result in steps.items() if count > good), default=good)
        while bad - good > max(1, good // 16):
            middle = (good + bad) // 2
            good, bad = (middle, bad) if (await step(middle)).within(limit) else (good, middle)
        most[limit] = good
    return [steps[count] for count in sorted(steps)], most


def results_table(steps: list[Step], title: str) -> Table:
    table = Table(title=title)
    for name in ("sessions", "p50 ms", "p95", "p99", *PARTS[1:], "late", "lost", "ended", "server", "client"):
        table.add_column(name, justify="right")
    for step in steps:
        latency = step.milliseconds["latency"]
        table.add_row(
            str(step.sessions),
            *(f"{latency[name]:.1f}" for name in QUANTILES),
            *(f"{step.milliseconds[part]['p50']:.1f} / {step.milliseconds[part]['p99']:.1f}" for part in PARTS[1:]),
            *(str(count) for count in (step.late, step.lost, len(step.ended))),
            f"{step.server_cores:.2f}",
            f"{step.client_cores:.2f}",
        )
    table.caption = "lag (of the client), transport, queue and compute: p50 / p99 ms; server and client: cores"
    return table


def plot(steps: list[Step], limits: list[float], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    above, below = axes
    sessions = [step.sessions for step in steps]
    for name in QUANTILES:
        above.plot(sessions, [step.milliseconds["latency"][name] for step in steps], "o-", markersize=4, label=name)
    for limit in limits:
        above.axhline(limit, color="0.4", linestyle="--", linewidth=1)
        above.annotate(f"{limit:g} ms", (1, limit), (-3, 3), ("axes fraction", "data"), "offset points", ha="right")
    above.set(ylabel="chunk sent to hint received, ms")
    above.set_title("latency of the hints", loc="left", fontsize=10)
    for part in PARTS[1:]:
        # A part of no time at all has no place on a logarithmic axis.
        median = [max(step.milliseconds[part]["p50"], 0.1) for step in steps]
        below.plot(sessions, median, "o-", markersize=4, label=part)
    below.set(xlabel="devices", ylabel="p50, ms")
    below.set_title("where that time goes", loc="left", fontsize=10)
    for axis in axes:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
        axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.yaxis.set_minor_locator(ticker.NullLocator())
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    figure.suptitle(f"How many devices can this server carry?\n{title}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


@contextmanager
def chosen_bundle(options: argparse.Namespace) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        size = next((name for name in SIZES if getattr(options, name.replace("-", "_"))), None)
        yield write_random_bundle(Path(folder), size) if size else Bundle(options.bundle).directory


def main() -> None:
    parser = argparse.ArgumentParser(description="Hint latency and capacity by number of sessions.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("bundle", nargs="?", help="name or path of a bundle; or use one with random weights:")
    which.add_argument("--tiny", action="store_true", help="tiny networks, which need little computation")
    which.add_argument("--full-size", action="store_true", help="networks of the published sizes")
    parser.add_argument("--seconds", type=float, default=10, help="duration of a step, after a second of warm-up")
    parser.add_argument("--most", type=int, default=128, help="maximum number of sessions")
    parser.add_argument(
        "--tries", type=int, default=1, help="how often a step that misses a limit is repeated; the best result is used"
    )
    parser.add_argument("--per-connection", type=int, default=1, help="sessions that share a connection")
    parser.add_argument(
        "--server-option", action="append", default=[], help="flag of kb-server, as --server-option=--NAME=V"
    )
    parser.add_argument("--pcm", default="f32", choices=("f32", "s16"))
    parser.add_argument("--hints", default="f16", choices=("f32", "f16", "int8"))
    parser.add_argument("--json", type=Path, default=Path("out/server_sessions.json"))
    parser.add_argument("--plot", type=Path, default=Path("out/server_sessions.png"))
    options = parser.parse_args()
    if options.tries < 1:
        parser.error("--tries: give 1 or more")
    flags = ["--max-sessions", options.most, *options.server_option]
    with chosen_bundle(options) as bundle, running_server(bundle, *flags) as server:
        manifest = read_manifest(bundle)
        audio = DeviceAudio(manifest, pcm=options.pcm, hints=options.hints)
        limits = [audio.deadline_ms, audio.deadline_ms / 2]
        steps, most = asyncio.run(search(server, audio, limits, options))
    title = f"{manifest.label}, {options.seconds:g} s for each number of devices"
    console = Console(width=150)
    console.print(results_table(steps, title))
    for limit, count in most.items():
        bound = "at least " if count == options.most else ""
        console.print(f"p99 below {limit:g} ms and no hint lost: {bound}{count} sessions")
    report: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "bundle": manifest.label,
        "server_options": options.server_option,
        "seconds": options.seconds,
        "tries": options.tries,
        "sessions_per_connection": options.per_connection,
        "capacity": {f"p99 below {limit:g} ms": count for limit, count in most.items()},
        "steps": [asdict(step) for step in steps],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=2) + "\n")
    plot(steps, limits, title, options.plot)


if __name__ == "__main__":
    main()
