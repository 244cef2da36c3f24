"""The standard health service. Anybody may ask it, and so no caller can hold it up."""

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_WATCHERS = 64  # at once; each is a call that stays
_WRITING_SECONDS = 5.0  # that a watcher has to take an answer


class Health(health_pb2_grpc.HealthServicer):
    """Serves until told otherwise. grpcio's own servicer writes to its watchers under the lock that a change needs."""

    def __init__(self, *services: str) -> None:
        self._services = frozenset(services)
        self._status = int(health_pb2.HealthCheckResponse.SERVING)
        self._changed = asyncio.Event()
        self._watchers = 0

    def stop_serving(self) -> None:
        """Answer NOT_SERVING from now on. Waits for nobody."""
        self._status = int(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._changed.set()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        """The status of a service, or of the server for an empty name."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return health_pb2.HealthCheckResponse(status=self._status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        """The status now, and again when it changes."""
        if self._watchers >= _WATCHERS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{_WATCHERS} others watch; ask by Check")
        self._watchers += 1
        try:
            told = await self._tell(request.service, context)
            await self._changed.wait()
            if told == health_pb2.HealthCheckResponse.SERVING:
                await self._tell(request.service, context)
            await asyncio.Event().wait()  # it does not change again; the watcher ends the call, or the server does
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the answer was not taken in time")
        finally:
            self._watchers -= 1

    async def _tell(self, service: str, context: Any) -> int:
        known = service in self._services
        status = self._status if known else health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        async with asyncio.timeout(_WRITING_SECONDS):
            await context.write(health_pb2.HealthCheckResponse(status=status))
        return status
