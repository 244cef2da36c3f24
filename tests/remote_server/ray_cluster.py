"""The Ray Serve application of deploy/ray on two nodes of this machine, and the statistics of its HAProxy."""

import csv
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.processes import Server, environment

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy" / "ray"
PATIENCE = 90.0  # seconds; only a failing test waits this long


@dataclass(frozen=True)
class RayCluster:
    """A running application. ``server`` has the address for all devices."""

    server: Server
    statistics: str  # URL of HAProxy's statistics

    def sessions(self) -> dict[str, int]:
        """Return the number of open sessions of each replica in HAProxy, by its name there."""
        try:
            with urllib.request.urlopen(self.statistics, timeout=5) as answer:
                table = answer.read().decode().removeprefix("# ")
        except (urllib.error.URLError, ConnectionError):
            return {}
        replicas = [row for row in csv.DictReader(table.splitlines()) if "HintReplica" in row["svname"]]
        return {
            row["svname"]: int(row["scur"])
            for row in replicas
            if row["pxname"] == "grpc-hints" and row["status"].startswith("UP")
        }

    def wait_for(self, what: str, condition: Callable[[], bool]) -> None:
        """Wait until a condition is true. ``what`` describes it for the message of a timeout."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, (what, self.sessions())
            time.sleep(0.1)

    def wait_for_replicas(self, count: int) -> None:
        """Wait until HAProxy distributes calls over a number of replicas."""
        self.wait_for(f"{count} replicas", lambda: len(self.sessions()) == count)


def replica_processes() -> list[int]:
    """Return the process ids of all replicas on this machine."""
    processes = []
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if status.read_bytes().startswith(b"ray::ServeReplica:hints:HintReplica"):
                processes.append(int(status.parent.name))
        except OSError:  # the process has just ended
            continue
    return processes


@contextmanager
def running_cluster(bundle: Path, **scaling: float) -> Iterator[RayCluster]:
    """Run the application of deploy/ray/serve.yaml on free ports. ``scaling`` is its autoscaling configuration."""
    with ExitStack() as stack:
        # The folder contains Ray's sockets, whose paths must be short.
        folder = tempfile.mkdtemp(prefix="kb-ray-")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        # Ray writes the address of the local cluster to this folder, but does not create it.
        (Path(folder) / "ray").mkdir()
        ports = free_ports(60)
        env = {**environment(), **shipped_environment(), **local_environment(folder, ports), "RAY_TMPDIR": folder}
        nodes, address = started_nodes(folder, env)
        stack.callback(end, nodes)
        config = Path(folder) / "serve.yaml"
        config.write_text(yaml.safe_dump(local_config(bundle, scaling, ports)))
        serve = [str(Path(sys.executable).with_name("serve")), "run", "--non-blocking", "--address", address]
        cluster = RayCluster(Server(nodes, f"127.0.0.1:{ports[0]}"), f"http://127.0.0.1:{ports[2]}/stats;csv")
        # Two nodes on one machine give their first replicas the same port, so it must be in use for the first one.
        with socket.create_server(("", ports[20])):
            subprocess.run([*serve, str(config)], cwd=ROOT, env=env, check=True)
            cluster.wait_for_replicas(1)
        yield cluster


def started_nodes(folder: str, env: Mapping[str, str]) -> tuple["subprocess.Popen[str]", str]:
    """Start the process that runs two nodes. Return it and their address."""
    call = [sys.executable, "-m", "tests.remote_server.ray_nodes", folder]
    # Ray waits 15 s for a helper process. On a busy machine, reading it from disk can take longer at the first attempt.
    for _ in range(3):
        nodes = subprocess.Popen(call, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert nodes.stdout is not None
        for line in nodes.stdout:
            if line.startswith("address "):
                return nodes, line.split()[1]
        end(nodes)
    raise AssertionError("Ray's nodes do not start")


def shipped_environment() -> dict[str, str]:
    """Return the variables of deploy/ray/environment."""
    lines = (DEPLOY / "environment").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def local_environment(folder: str, ports: Sequence[int]) -> dict[str, str]:
    """Return the variables that differ for two nodes on one machine."""
    numbers = {
        "HAPROXY_STATS_PORT": ports[2],
        "HAPROXY_METRICS_PORT": ports[3],
        "FALLBACK_PROXY_HTTP_PORT": ports[4],
        "FALLBACK_PROXY_GRPC_PORT": ports[5],
        "DIRECT_INGRESS_MIN_GRPC_PORT": ports[20],
        "DIRECT_INGRESS_MAX_GRPC_PORT": ports[39],
        "DIRECT_INGRESS_MIN_HTTP_PORT": ports[40],
        "DIRECT_INGRESS_MAX_HTTP_PORT": ports[59],
        "PORT_QUARANTINE_S": 0,
        "PROXY_READY_CHECK_TIMEOUT_S": 60,
        "REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": 1,
    }
    files = {
        "CONFIG_FILE_LOC": "haproxy.cfg",
        "SOCKET_PATH": "admin.sock",
        "SERVER_STATE_BASE": "",
        "SERVER_STATE_FILE": "state",
        "METRICS_SOCKET_PATH": "metrics.sock",
    }
    return {
        "PYTHONPATH": str(ROOT),
        "RAY_USAGE_STATS_ENABLED": "0",
        **{f"RAY_SERVE_{name}": str(value) for name, value in numbers.items()},
        **{f"RAY_SERVE_HAPROXY_{name}": str(Path(folder) / file) for name, file in files.items()},
    }


def local_config(bundle: Path, scaling: Mapping[str, float], ports: Sequence[int]) -> dict[str, Any]:
    """Return deploy/ray/serve.yaml, changed to one HAProxy on free ports."""
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
    config["proxy_location"] = "HeadOnly"
    config["grpc_options"]["port"], config["http_options"]["port"] = ports[:2]
    application = config["applications"][0]
    # With many slots, a replica that notices the end of sessions late does not refuse new ones.
    application["args"].update(bundle=str(bundle), max_sessions=64)
    application["deployments"] = [{"name": "HintReplica", "autoscaling_config": dict(scaling)}]
    return config


def free_ports(count: int) -> range:
    """Return a range of free ports, below those that the system uses for outgoing connections."""
    while True:
        first = random.randrange(20_000, 30_000)
        with ExitStack() as stack, suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.create_server(("", port)))
            return range(first, first + count)


def end(nodes: "subprocess.Popen[str]") -> None:
    """Stop the cluster."""
    assert nodes.stdin is not None
    assert nodes.stdout is not None
    nodes.stdin.close()
    try:
        nodes.wait(timeout=60)
    finally:
        nodes.kill()
        nodes.wait()
        nodes.stdout.close()
