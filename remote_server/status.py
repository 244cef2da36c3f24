"""``kb-server status``: what a server does, for a person."""

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.table import Table
from rich.text import Text

from knowledge_boosting.common.call_credentials import Credentials
from knowledge_boosting.common.cli import console
from knowledge_boosting.common.connection import call_failed, connect
from knowledge_boosting.common.errors import printable
from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.codec import SERVICE_NAME
from knowledge_boosting.protos.hints_pb2_grpc import HintServiceStub

_PATIENCE = 5.0  # seconds


def print_status(server: str, credentials: Credentials) -> bool:
    """Ask a server ``HOST:PORT`` how it is, and print it; whether it takes sessions.

    Raises:
        InputError: nobody answers, or it does not let us in.
    """
    with connect(server, credentials, _PATIENCE) as channel:
        stub = HintServiceStub(channel)
        try:
            request = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
            health = health_pb2_grpc.HealthStub(channel).Check(  # type: ignore[attr-defined] # missing in its stubs
                request, timeout=_PATIENCE
            )

            def describe(bundle: str) -> pb.DescribeModelResponse:
                request = pb.DescribeModelRequest(bundle=bundle)
                return stub.DescribeModel(request, timeout=_PATIENCE, metadata=credentials.metadata)

            first = describe("")
            answers = [first if name == first.bundle_name else describe(name) for name in first.bundles]
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            raise call_failed(server, "does not tell how it is", error) from None
    serving = bool(health.status == health_pb2.HealthCheckResponse.SERVING)
    table = Table("bundle", "id", "task", "delay", "sessions", "room for", box=None)
    for answer in answers:
        name = f"{answer.bundle_name} (UNTRAINED)" if answer.untrained else answer.bundle_name
        delay = f"{1000 * answer.delay * answer.chunk / answer.sample_rate:g} ms"
        left = str(answer.max_sessions - answer.sessions) if answer.max_sessions else "known when loaded"
        words = (printable(text) for text in (name, answer.bundle_id, answer.task.upper(), delay))
        table.add_row(*map(Text, words), str(answer.sessions), left)
    state = "serving" if serving else "shutting down: takes no new sessions"
    enrolls = "enrolls speakers" if first.enrolls else "enrolls no speakers"
    print(f"{server}: {state}; protocol {first.protocol_version}; {enrolls}")
    console().print(table)
    return serving
