"""The Ray Serve application of deploy/ray on two nodes of this machine, and what its HAProxy says of it."""

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
PATIENCE = 90.0  # seconds; only a test that has failed waits so long


@dataclass(frozen=True)
class RayCluster:
    """A running application; ``server`` is the one address that devices know."""

    server: Server
    statistics: str  # URL of HAProxy's

    def sessions(self) -> dict[str, int]:
        """The open sessions of every replica that HAProxy sends calls to, by its name there."""
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
        """Wait until something is so."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, (what, self.sessions())
            time.sleep(0.1)

    def wait_for_replicas(self, count: int) -> None:
        """Wait until HAProxy sends calls to so many replicas."""
        self.wait_for(f"{count} replicas", lambda: len(self.sessions()) == count)


def replica_processes() -> list[int]:
    """The process of every replica on this machine."""
    found = []
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if status.read_bytes().startswith(b"ray::ServeReplica:hints:HintReplica"):
                found.append(int(status.parent.name))
        except OSError:  # it has just ended
            continue
    return found


@contextmanager
def running_cluster(bundle: Path, **scaling: float) -> Iterator[RayCluster]:
    """The application of deploy/ray/serve.yaml with a bundle, on free ports; ``scaling`` is how it scales."""
    with ExitStack() as stack:
        # Ray's sockets lie there, and their paths must be short.
        folder = tempfile.mkdtemp(prefix="kb-ray-")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        # Where Ray writes which cluster is this machine's own; it makes no folder for that.
        (Path(folder) / "ray").mkdir()
        ports = free_ports(60)
        env = {**environment(), **shipped_environment(), **local_environment(folder, ports), "RAY_TMPDIR": folder}
        nodes, address = started_nodes(folder, env)
        stack.callback(end, nodes)
        config = Path(folder) / "serve.yaml"
        config.write_text(yaml.safe_dump(local_config(bundle, scaling, ports)))
        serve = [str(Path(sys.executable).with_name("serve")), "run", "--non-blocking", "--address", address]
        cluster = RayCluster(Server(nodes, f"127.0.0.1:{ports[0]}"), f"http://127.0.0.1:{ports[2]}/stats;csv")
        # Two nodes of one machine give their first replicas the same port. The very first must find it taken.
        with socket.create_server(("", ports[20])):
            subprocess.run([*serve, str(config)], cwd=ROOT, env=env, check=True)
            cluster.wait_for_replicas(1)
        yield cluster


def started_nodes(folder: str, env: Mapping[str, str]) -> tuple["subprocess.Popen[str]", str]:
    """The process that keeps two nodes, and their address."""
    call = [sys.executable, "-m", "tests.remote_server.ray_nodes", folder]
    # Ray waits 15 s for a helper of its own, which a busy machine may not read from its disk in time, but at the second
    # attempt has in memory.
    for _ in range(3):
        nodes = subprocess.Popen(call, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert nodes.stdout is not None
        for line in nodes.stdout:
            if line.startswith("address "):
                return nodes, line.split()[1]
        end(nodes)
    raise AssertionError("Ray's nodes do not start")


def shipped_environment() -> dict[str, str]:
    """What deploy/ray/environment sets."""
    lines = (DEPLOY / "environment").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def local_environment(folder: str, ports: Sequence[int]) -> dict[str, str]:
    """What differs for two nodes on one machine, beside other programs."""
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
    """deploy/ray/serve.yaml for one HAProxy on free ports."""
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
    config["proxy_location"] = "HeadOnly"
    config["grpc_options"]["port"], config["http_options"]["port"] = ports[:2]
    application = config["applications"][0]
    # Room enough: a replica that is slow to notice that a session has ended refuses nobody.
    application["args"].update(bundle=str(bundle), max_sessions=64)
    application["deployments"] = [{"name": "HintReplica", "autoscaling_config": dict(scaling)}]
    return config


def free_ports(count: int) -> range:
    """So many ports in a row that nobody listens on, below those that the system gives to clients."""
    while True:
        first = random.randrange(20_000, 30_000)
        with ExitStack() as stack, suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.create_server(("", port)))
            return range(first, first + count)


def end(nodes: "subprocess.Popen[str]") -> None:
    """End the cluster."""
    assert nodes.stdin is not None
    assert nodes.stdout is not None
    nodes.stdin.close()
    try:
        nodes.wait(timeout=60)
    finally:
        nodes.kill()
        nodes.wait()
        nodes.stdout.close()
