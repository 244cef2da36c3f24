"""Measures the effect of attacks on a session: ``python -m benchmarks.under_attack pings resets --seconds 10``.

Starts a kb-server process with a tiny network, and a session that sends a chunk every 8 ms. Then it starts the
attackers of ``tests/attackers.py``, one process for each given kind. Everything runs on this machine over loopback.
Prints one line of JSON.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from knowledge_boosting.models.manifest import read_manifest
from tests.attackers import KINDS, attacked
from tests.load import DeviceAudio, open_load, write_random_bundle
from tests.processes import Server, descriptors, memory_mib, running_server, threads

WARM_UP = 2.0  # seconds


async def measure_session(
    server: Server, address: str, bundle: Path, kinds: list[str], attack: str, seconds: float
) -> Any:
    """Measure one session while its server is attacked."""
    audio, pid = DeviceAudio(read_manifest(bundle)), server.process.pid
    usage: dict[str, list[float]] = {"descriptors": [], "threads": [], "memory_mib": []}

    def sample_usage() -> None:
        for name, of in (("descriptors", descriptors), ("threads", threads), ("memory_mib", memory_mib)):
            usage[name].append(round(of(pid), 1))

    async with open_load(address, audio, 1) as load:
        await load.run(WARM_UP)
        await load.settle()
        load.take()
        sent = load.sent
        sample_usage()
        with attacked(kinds, attack, seconds + 30, bundle):
            for _ in range(round(seconds)):
                await load.run(1)
                sample_usage()
        await load.settle()
        parts = load.take().milliseconds()
        latency, lag = parts["latency"], parts["lag"]
        sent, ended = load.sent - sent, load.ended
    return {
        "attack": kinds,
        "sent": sent,
        "lost": max(0, sent - len(latency)),
        "above_48_ms": int((latency > 48).sum()),
        "above_250_ms": int((latency > 250).sum()),
        # The latency from when the chunk was actually sent. On a busy machine only this is meaningful.
        "above_48_ms_from_sending": int((latency - lag > 48).sum()),
        "above_250_ms_from_sending": int((latency - lag > 250).sum()),
        "p50_ms": round(float(np.median(latency)), 1) if len(latency) else None,
        "max_ms": round(float(latency.max()), 1) if len(latency) else None,
        "max_own_lag_ms": round(float(lag.max()), 1) if len(lag) else None,
        "ended": ended,
        **{name: [values[0], max(values)] for name, values in usage.items()},  # before the attack, and the maximum
        "load": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="+", choices=[*KINDS, "nothing"])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--proxy", action="store_true", help="connect through deploy/haproxy/haproxy.cfg")
    parser.add_argument("--event-engine", action="store_true", help="use the newer event engine of gRPC in the server")
    parser.add_argument("--limit", action="append", default=[], help="limit of the server, NAME=VALUE")
    options = parser.parse_args()
    if options.event_engine:
        os.environ["GRPC_EXPERIMENTS"] = ""
    kinds = [kind for kind in options.kinds if kind != "nothing"]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        bundle = write_random_bundle(Path(folder), "tiny")
        limits = [part for limit in options.limit for part in ("--limit", limit)]
        server = stack.enter_context(running_server(bundle, "--drain-seconds", 3, *limits))
        os.environ.pop("GRPC_EXPERIMENTS", None)
        address = server.address
        if options.proxy:
            from tests.haproxy import running_haproxy

            address = stack.enter_context(running_haproxy(server.address))
        figures = asyncio.run(measure_session(server, address, bundle, kinds, address, options.seconds))
        with attacked(kinds, address, 30, bundle):
            time.sleep(1)
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            try:
                server.process.wait(20)
                figures["sigterm_seconds"] = round(time.monotonic() - began, 1)
            except subprocess.TimeoutExpired:
                figures["sigterm_seconds"] = None
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
