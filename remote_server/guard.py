"""The gate in front of every call: no token, no answer."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health

from remote_server.access import CALLER, Access, Denied

_log = logging.getLogger("kb-server")

_OPEN = f"/{health.SERVICE_NAME}/"  # whoever balances load or watches a server has no token


class Guard(grpc.aio.ServerInterceptor):
    """Lets calls with a known token through, and health checks; the others end in UNAUTHENTICATED.

    The coroutine that answers a call finds whom it is from in :data:`remote_server.access.CALLER`.
    """

    def __init__(self, access: Access, refused: Callable[[str], None]) -> None:
        """``refused`` is told the status of every call that is not let through."""
        self._access, self._refused = access, refused

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        method = str(handler_call_details.method)
        if not method.startswith(_OPEN):
            try:
                CALLER.set(self._access.caller(handler_call_details.invocation_metadata))
            except Denied as error:
                self._refused(error.status.name)
                return _refuse(method, error)
        return await continuation(handler_call_details)


def _refuse(method: str, why: Denied) -> Any:
    """A method of any kind that ends at once."""

    async def refuse(_requests: AsyncIterator[bytes], context: Any) -> NoReturn:
        _log.warning("%s %r: %s: %s", context.peer(), method[:100], why.status.name, why)
        await context.abort(why.status, str(why))
        raise AssertionError  # abort has raised

    return grpc.stream_stream_rpc_method_handler(refuse)
