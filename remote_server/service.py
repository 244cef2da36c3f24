"""The gRPC service: a thin adapter of :class:`remote_server.core.hint_server.HintServer`."""

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

# A device that found no place may try again after so many milliseconds.
TRY_LATER = (("grpc-retry-pushback-ms", "2000"),)

# grpc's own context types differ between its synchronous and asyncio halves.
Context = Any


class HintService(HintServiceServicer):
    """Carries the calls of a server by gRPC."""

    def __init__(self, server: HintServer) -> None:
        self._server = server

    async def StreamHints(
        self, request_iterator: AsyncIterator[pb.StreamHintsRequest], context: Context
    ) -> AsyncIterator[pb.StreamHintsResponse]:
        """One session, from its configuration to the end of its audio."""
        try:
            session = self._server.session(readable(request_iterator), CALLER.get(), context.peer())
            async with aclosing(session) as responses:
                async for response in responses:
                    yield response
        except Refused as error:
            await refuse(error, context)

    async def Enroll(self, request: pb.EnrollRequest, context: Context) -> pb.EnrollResponse:
        """Enrollment speech to a speaker embedding."""
        try:
            return await self._server.enroll(request, CALLER.get(), context.peer())
        except Refused as error:
            await refuse(error, context)

    async def DescribeModel(self, request: pb.DescribeModelRequest, context: Context) -> pb.DescribeModelResponse:
        """What this server runs."""
        try:
            return self._server.describe(request, CALLER.get())
        except Refused as error:
            await refuse(error, context)


def code_of(status: Status) -> grpc.StatusCode:
    """GRPC's own status."""
    return grpc.StatusCode[status.name]


async def refuse(why: Refused, context: Context) -> NoReturn:
    """End a call."""
    if why.status is Status.RESOURCE_EXHAUSTED:
        context.set_trailing_metadata(TRY_LATER)
    await context.abort(code_of(why.status), str(why))
    raise AssertionError  # abort has raised


async def readable(requests: AsyncIterator[pb.StreamHintsRequest]) -> AsyncIterator[pb.StreamHintsRequest]:
    """Requests, and why they end if they cannot be read: by :class:`Refused`."""
    try:
        async for request in requests:
            yield request
    except DecodeError:
        raise Refused("request: is no StreamHintsRequest") from None
    except grpc.RpcError as error:
        raise Refused(f"the connection broke ({type(error).__name__})", Status.CANCELLED) from None
