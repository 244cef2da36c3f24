"""A temporary kb-server process on a loopback address."""

import importlib.util
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from knowledge_boosting.common.call_credentials import Credentials
from knowledge_boosting.common.connection import connect, off_main_thread
from knowledge_boosting.common.errors import Failure, InputError
from knowledge_boosting.protos.codec import SERVICE_NAME

_START_TIMEOUT = 120  # seconds; importing torch takes long on a slow disk
_ANSWER_TIMEOUT = 10.0  # seconds


@contextmanager
def local_server(bundle: Path) -> Iterator[str]:
    """Start a server for a bundle, yield its address ``HOST:PORT``, and stop it when the block ends.

    Raises:
        Failure: The server does not start, or it cannot be reached.
    """
    if sys.platform == "win32":
        raise Failure("a server needs Linux or macOS; give --server HOST:PORT")
    if importlib.util.find_spec("torch") is None:
        raise Failure(
            "a server on this machine needs torch; give --server HOST:PORT, or run "
            "pip install 'knowledge-boosting[server]'"
        )
    server = [sys.executable, "-m", "knowledge_boosting.remote_server.main"]
    command = [*server, "--bundle", str(bundle), "--port", "0", "--device", "cpu"]
    # The only client is this process, which can send faster than real time.
    command += ["--max-sessions", "2", "--limit", "speed=0"]
    with tempfile.TemporaryFile() as log:
        # In its own session, it does not receive Ctrl-C. If this process dies, its standard input ends and it stops.
        process = subprocess.Popen(
            [*command, "--until-stdin-ends"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
        try:
            address = _wait_until_listening(process)
            if address is None:
                process.kill()
                process.wait()
                log.seek(0)
                lines = log.read().decode(errors="replace").strip().splitlines()
                raise Failure(f"the local server did not start: {lines[-1] if lines else 'it printed no message'}")
            _check_health(address)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _wait_until_listening(process: "subprocess.Popen[bytes]") -> str | None:
    assert process.stdout is not None
    deadline = time.monotonic() + _START_TIMEOUT
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([process.stdout], [], [], left)[0]:
            return None
        line = process.stdout.readline()
        if not line:
            return None
        if match := re.search(rb"listening on (\S+:\d+)", line):
            return match[1].decode()
    return None


@off_main_thread
def _check_health(address: str) -> None:
    try:
        with connect(address, Credentials(), _ANSWER_TIMEOUT) as channel:
            request = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
            answer = health_pb2_grpc.HealthStub(channel).Check(  # type: ignore[attr-defined] # missing in its stubs
                request, timeout=_ANSWER_TIMEOUT
            )
    except (InputError, grpc.RpcError) as error:
        detail = error.details() if isinstance(error, grpc.Call) else str(error)
        raise Failure(f"the local server has started, but cannot be reached ({detail})") from None
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise Failure("the local server has started, but it is not serving")
