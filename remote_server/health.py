"""The standard gRPC health service. It needs no token, so that no caller must be able to block it."""

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_MAX_WATCHERS = 64  # concurrent calls of Watch
_WRITE_TIMEOUT = 5.0  # seconds in which a watcher must accept a response


class Health(health_pb2_grpc.HealthServicer):
    """Reports SERVING until :meth:`stop_serving` is called.

    It replaces the servicer of grpcio, which writes to its watchers while it holds the lock for status changes. There,
    a watcher that does not read would block the shutdown.
    """

    def __init__(self, *services: str) -> None:
        self._services = frozenset(services)
        self._status = int(health_pb2.HealthCheckResponse.SERVING)
        self._changed = asyncio.Event()
        self._watchers = 0

    def stop_serving(self) -> None:
        """Report NOT_SERVING from now on. This does not wait for any caller."""
        self._status = int(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._changed.set()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        """Return the status of a service, or of the server if the name is empty."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service")
        return health_pb2.HealthCheckResponse(status=self._status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        """Send the current status of a service, and again when it changes."""
        if self._watchers >= _MAX_WATCHERS:
            text = f"there are already {_MAX_WATCHERS} watchers; call Check instead"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        self._watchers += 1
        try:
            status = await self._send_status(request.service, context)
            await self._changed.wait()
            if status == health_pb2.HealthCheckResponse.SERVING:
                await self._send_status(request.service, context)
            await asyncio.Event().wait()  # there is no further change; the watcher or the server ends the call
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the response was not read in time")
        finally:
            self._watchers -= 1

    async def _send_status(self, service: str, context: Any) -> int:
        known = service in self._services
        status = self._status if known else health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        async with asyncio.timeout(_WRITE_TIMEOUT):
            await context.write(health_pb2.HealthCheckResponse(status=status))
        return status
