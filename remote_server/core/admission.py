"""Admission control: which calls get a session now."""

from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.remote_server.core.access import Caller
from knowledge_boosting.remote_server.core.bundles import Bundles, ServedBundle
from knowledge_boosting.remote_server.core.limits import Limits
from knowledge_boosting.remote_server.core.messages import check_config, unknown_bundle
from knowledge_boosting.remote_server.core.refusals import Refused, Status


class Admission:
    """Counts the sessions of a server by bundle, by host and by token."""

    def __init__(self, bundles: Bundles, limits: Limits) -> None:
        self._bundles, self._limits = bundles, limits
        self._calls: Counter[str] = Counter()  # calls by host, including its sessions
        self._sessions = 0
        self._loading = 0  # calls that wait until a bundle is loaded
        self._closed = False

    @property
    def empty(self) -> bool:
        """Whether no session is open, and no call waits for one."""
        return not self._sessions and not self._loading

    def close(self) -> None:
        """Refuse all further sessions."""
        self._closed = True

    def allowed(self, caller: Caller) -> list[ServedBundle]:
        """Return the bundles that a caller has permission to use. Other bundles are hidden from it."""
        return [bundle for bundle in self._bundles.served if caller.may_use(bundle.manifest.name)]

    @asynccontextmanager
    async def slot(
        self, caller: Caller, host: str, configuration: Callable[[], Awaitable[pb.SessionConfig]]
    ) -> AsyncGenerator[tuple[pb.SessionConfig, ServedBundle]]:
        """Reserve a slot for a session in the bundle that a device requests, for the duration of the block.

        Args:
            caller: The caller of the session.
            host: The host of the device. The call counts for it at once, so that no host can keep many calls waiting.
            configuration: Waits for the configuration of the session.

        Yields:
            The configuration, and its bundle, which is loaded.

        Raises:
            Refused: There is no free slot, or the configuration is not valid.
        """
        self._calls[host] += 1
        try:
            self._check_open()
            self._check_host(host, self._limits.sessions_per_peer or 0)
            config = await configuration()
            bundle = await self._bundle_of(config, caller)
            self._check_open()  # draining can have begun during the wait
            self._check_host(host, self._limits.sessions_of(host, bundle.slots))
            with caller.session():
                bundle.sessions += 1
                self._sessions += 1
                try:
                    yield config, bundle
                finally:
                    self._sessions -= 1
                    bundle.sessions -= 1
                    self._bundles.release_if_unused(bundle)
        finally:
            self._calls[host] -= 1
            self._calls += Counter()  # this removes hosts without calls

    async def _bundle_of(self, config: pb.SessionConfig, caller: Caller) -> ServedBundle:
        """Return the bundle of a session, after it is loaded and has a free slot.

        Raises:
            Refused: The configuration does not match the bundle, the bundle cannot be loaded, or it has no free slot.
        """
        bundle = self._bundles.find(config.bundle_id) if config.bundle_id else None
        if bundle is None or bundle.manifest.id != config.bundle_id:
            raise unknown_bundle(config, [served.manifest for served in self.allowed(caller)])
        caller.check_bundle(bundle.manifest.name)
        check_config(config, bundle.manifest.model)
        self._loading += 1
        try:
            await self._bundles.load(bundle)
        except InputError:
            text = f"this server cannot load {bundle.manifest.label}; see its log"
            raise Refused(text, Status.INTERNAL) from None
        finally:
            self._loading -= 1
        if bundle.retired:  # it can have been retired while it was loaded
            raise unknown_bundle(config, [served.manifest for served in self.allowed(caller)])
        if not self._bundles.free_slots(bundle):
            text = "all sessions of this server are in use; try again later, or try another server"
            raise Refused(text, Status.RESOURCE_EXHAUSTED)
        return bundle

    def _check_open(self) -> None:
        if self._closed:
            raise shutting_down()

    def _check_host(self, host: str, limit: int) -> None:
        """Refuse a session if its host has more calls than the limit. 0: no limit."""
        if limit and self._calls[host] > limit:
            text = f"{limit} sessions of this host are already open; end one of them"
            raise Refused(text, Status.RESOURCE_EXHAUSTED)


def shutting_down() -> Refused:
    """Create the refusal of all sessions while the server shuts down."""
    return Refused("the server is shutting down; try another server", Status.UNAVAILABLE)
