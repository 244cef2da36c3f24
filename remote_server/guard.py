"""The gate in front of every call: no token, no answer."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health

from knowledge_boosting.remote_server.core.access import CALLER, Access, Denied
from knowledge_boosting.remote_server.core.refusals import Refused
from knowledge_boosting.remote_server.service import refuse

_OPEN = f"/{health.SERVICE_NAME}/"  # whoever balances load or watches a server has no token


class Guard(grpc.aio.ServerInterceptor):
    """Lets calls with a known token through, and health checks; the others end in UNAUTHENTICATED.

    The coroutine that answers a call finds whom it is from in :data:`remote_server.core.access.CALLER`.
    """

    def __init__(self, access: Access, refused: Callable[[str, str, Refused], None]) -> None:
        """``refused`` gets peer, method and reason of every call that is not let through."""
        self._access, self._refused = access, refused

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        method = str(handler_call_details.method)
        if not method.startswith(_OPEN):
            try:
                CALLER.set(self._access.caller(handler_call_details.invocation_metadata))
            except Denied as error:
                return self._refuse(method, error)
        return await continuation(handler_call_details)

    def _refuse(self, method: str, why: Denied) -> Any:
        """A method of any kind that ends at once."""

        async def end(_requests: AsyncIterator[bytes], context: Any) -> NoReturn:
            self._refused(context.peer(), method, why)
            await refuse(why, context)

        return grpc.stream_stream_rpc_method_handler(end)
