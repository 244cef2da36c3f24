"""``kb-server status``: show the state of a server."""

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.text import Text

from knowledge_boosting.common.call_credentials import Credentials
from knowledge_boosting.common.cli import console, full_table
from knowledge_boosting.common.connection import call_failed, connect, off_main_thread
from knowledge_boosting.common.errors import printable
from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.codec import SERVICE_NAME
from knowledge_boosting.protos.hints_pb2_grpc import HintServiceStub

_TIMEOUT = 5.0  # seconds


def print_status(server: str, credentials: Credentials) -> bool:
    """Print the state of a server with the address ``HOST:PORT``. Return whether it accepts sessions.

    Raises:
        InputError: The server does not answer, or it refuses the call.
        Failure: The server failed.
    """
    serving, first, answers = _ask(server, credentials)
    table = full_table("bundle", "id", "task", "hint age", "sessions", "free", box=None)
    for answer in answers:
        name = f"{answer.bundle_name} (UNTRAINED)" if answer.untrained else answer.bundle_name
        age = f"{1000 * answer.delay * answer.chunk / answer.sample_rate:g} ms"
        age = f"up to {age}" if answer.on_arrival else age
        free = str(answer.free_sessions) if answer.max_sessions else "not loaded"
        cells = (printable(text) for text in (name, answer.bundle_id, answer.task.upper(), age))
        table.add_row(*map(Text, cells), str(answer.sessions), free)
    state = "serving" if serving else "shutting down, accepts no new sessions"
    enrolls = "enrolls speakers" if first.enrolls else "enrolls no speakers"
    print(f"{server}: {state}; protocol {first.protocol_version}; {enrolls}")
    console().print(table)
    return serving


@off_main_thread
def _ask(
    server: str, credentials: Credentials
) -> tuple[bool, pb.DescribeModelResponse, list[pb.DescribeModelResponse]]:
    """Return whether the server accepts sessions, and the descriptions of its first bundle and of all of them."""
    with connect(server, credentials, _TIMEOUT) as channel:
        stub = HintServiceStub(channel)
        try:
            request = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
            health = health_pb2_grpc.HealthStub(channel).Check(  # type: ignore[attr-defined] # missing in its stubs
                request, timeout=_TIMEOUT
            )

            def describe(bundle: str) -> pb.DescribeModelResponse:
                request = pb.DescribeModelRequest(bundle=bundle)
                return stub.DescribeModel(request, timeout=_TIMEOUT, metadata=credentials.metadata)

            first = describe("")
            answers = [first if name == first.bundle_name else describe(name) for name in first.bundles]
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            raise call_failed(server, "does not report its state", error) from None
    return bool(health.status == health_pb2.HealthCheckResponse.SERVING), first, answers
