"""The authentication of all calls by bearer tokens."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health

from knowledge_boosting.remote_server.core.access import CALLER, Access, Denied
from knowledge_boosting.remote_server.core.refusals import Refused
from knowledge_boosting.remote_server.service import refuse

_PUBLIC = f"/{health.SERVICE_NAME}/"  # load balancers and monitors have no token


class Guard(grpc.aio.ServerInterceptor):
    """An interceptor that accepts health checks and calls with a known token. Other calls end in UNAUTHENTICATED.

    It stores the caller in :data:`remote_server.core.access.CALLER` for the coroutine that handles the call.
    """

    def __init__(self, access: Access, refused: Callable[[str, str, Refused], None]) -> None:
        """Create the interceptor.

        Args:
            access: The known tokens.
            refused: Called with peer, method and reason of each call that is refused.
        """
        self._access, self._refused = access, refused

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        method = str(handler_call_details.method)
        if not method.startswith(_PUBLIC):
            try:
                CALLER.set(self._access.caller(handler_call_details.invocation_metadata))
            except Denied as error:
                return self._refuse(method, error)
        return await continuation(handler_call_details)

    def _refuse(self, method: str, reason: Denied) -> Any:
        """Return a handler that refuses the call at once. It works for methods of every kind."""

        async def end(_requests: AsyncIterator[bytes], context: Any) -> NoReturn:
            self._refused(context.peer(), method, reason)
            await refuse(reason, context)

        return grpc.stream_stream_rpc_method_handler(end)
