"""The gRPC service, a thin adapter of :class:`remote_server.core.hint_server.HintServer`."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.hints_pb2_grpc import HintServiceServicer
from knowledge_boosting.remote_server.core.access import CALLER
from knowledge_boosting.remote_server.core.hint_server import HintServer
from knowledge_boosting.remote_server.core.refusals import Refused, Status

# A device whose session was refused because the server is full can retry after this number of milliseconds.
RETRY_METADATA = (("grpc-retry-pushback-ms", "2000"),)

# The synchronous and the asyncio interface of grpc have different context types.
Context = Any


class HintService(HintServiceServicer):
    """Passes gRPC calls on to a server core."""

    def __init__(self, server: HintServer) -> None:
        self._server = server

    async def StreamHints(
        self, request_iterator: AsyncIterator[pb.StreamHintsRequest], context: Context
    ) -> AsyncIterator[pb.StreamHintsResponse]:
        """Serve one session, from its configuration to the end of its audio."""
        try:
            session = self._server.session(checked_requests(request_iterator), CALLER.get(), context.peer())
            async with aclosing(session) as responses:
                async for response in responses:
                    yield response
        except Refused as error:
            await refuse(error, context)

    async def Enroll(self, request: pb.EnrollRequest, context: Context) -> pb.EnrollResponse:
        """Compute a speaker embedding from enrollment speech."""
        try:
            return await self._server.enroll(request, CALLER.get(), context.peer())
        except Refused as error:
            await refuse(error, context)

    async def DescribeModel(self, request: pb.DescribeModelRequest, context: Context) -> pb.DescribeModelResponse:
        """Describe a bundle of this server."""
        try:
            return self._server.describe(request, CALLER.get(), context.peer())
        except Refused as error:
            await refuse(error, context)


def grpc_code(status: Status) -> grpc.StatusCode:
    """Convert a status to that of gRPC."""
    return grpc.StatusCode[status.name]


async def refuse(reason: Refused, context: Context) -> NoReturn:
    """End a call with the status of a refusal."""
    if reason.status is Status.RESOURCE_EXHAUSTED:
        context.set_trailing_metadata(RETRY_METADATA)
    await context.abort(grpc_code(reason.status), str(reason))
    raise AssertionError  # abort always raises


async def checked_requests(requests: AsyncIterator[pb.StreamHintsRequest]) -> AsyncIterator[pb.StreamHintsRequest]:
    """Yield the requests of a call.

    Raises:
        Refused: A request cannot be decoded, or the connection is lost.
    """
    try:
        async for request in requests:
            yield request
    except DecodeError:
        raise Refused("request: is not a StreamHintsRequest") from None
    except grpc.RpcError as error:
        raise Refused(f"the connection was lost ({type(error).__name__})", Status.CANCELLED) from None
