"""Who may have a session now."""

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
    """The places of a server: one for every session, counted by bundle, by host and by token."""

    def __init__(self, bundles: Bundles, limits: Limits) -> None:
        self._bundles, self._limits = bundles, limits
        self._calls: Counter[str] = Counter()  # of a host, its sessions included
        self._places = 0
        self._loading = 0  # calls that wait for a bundle
        self._closed = False

    @property
    def empty(self) -> bool:
        """Whether nobody has a place, nor waits for one."""
        return not self._places and not self._loading

    def close(self) -> None:
        """Give no more places."""
        self._closed = True

    def allowed(self, caller: Caller) -> list[ServedBundle]:
        """The bundles that a caller may use, and hear of."""
        return [bundle for bundle in self._bundles.served if caller.may_use(bundle.manifest.name)]

    @asynccontextmanager
    async def place(
        self, caller: Caller, host: str, configuration: Callable[[], Awaitable[pb.SessionConfig]]
    ) -> AsyncGenerator[tuple[pb.SessionConfig, ServedBundle]]:
        """A place in the bundle that a device asks for, as long as the block lasts; the bundle is loaded.

        Args:
            host: of the device. It counts from now on, so that no host keeps many calls waiting.
            configuration: waits for what the device asks for.

        Raises:
            Refused: there is none for it.
        """
        self._calls[host] += 1
        try:
            self._check_open()
            self._check_host(host, self._limits.sessions_per_peer or 0)
            config = await configuration()
            bundle = await self._bundle_of(config, caller)
            self._check_open()  # draining may have begun while we waited
            self._check_host(host, self._limits.sessions_of(host, bundle.slots))
            with caller.session():
                bundle.sessions += 1
                self._places += 1
                try:
                    yield config, bundle
                finally:
                    self._places -= 1
                    bundle.sessions -= 1
                    self._bundles.let_go(bundle)
        finally:
            self._calls[host] -= 1
            self._calls += Counter()  # forgets those that have none

    async def _bundle_of(self, config: pb.SessionConfig, caller: Caller) -> ServedBundle:
        """The bundle of a session, loaded and with a place in it.

        Raises:
            Refused: the configuration does not fit, the bundle cannot be loaded, or all places are taken.
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
        if bundle.retired:  # while it was loaded
            raise unknown_bundle(config, [served.manifest for served in self.allowed(caller)])
        if not self._bundles.has_place(bundle):
            text = f"all {bundle.slots} sessions of this server are taken; try again later or another server"
            raise Refused(text, Status.RESOURCE_EXHAUSTED)
        return bundle

    def _check_open(self) -> None:
        if self._closed:
            raise shutting_down()

    def _check_host(self, host: str, limit: int) -> None:
        """Refuse a session of a host that has so many already; 0: no limit."""
        if limit and self._calls[host] > limit:
            text = f"{limit} sessions of this host are open already; end one of them"
            raise Refused(text, Status.RESOURCE_EXHAUSTED)


def shutting_down() -> Refused:
    """What devices are told when a server goes away."""
    return Refused("the server is shutting down; try another", Status.UNAVAILABLE)
