"""The bundles of a server, each with its own engine."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from knowledge_boosting.common.errors import Failure, InputError
from knowledge_boosting.models.bundle import DEFAULT_BUNDLE, PRETRAINED, Bundle
from knowledge_boosting.models.config import Pair
from knowledge_boosting.models.manifest import MANIFEST_FILE, Manifest
from knowledge_boosting.models.networks import load_large
from knowledge_boosting.remote_server.core.capacity import measure_capacity
from knowledge_boosting.remote_server.core.engine import HintEngine
from knowledge_boosting.remote_server.core.metrics import Metrics

_log = logging.getLogger("kb-server")


@dataclass
class ServedBundle:
    """A bundle, and the engine that runs its large network when the bundle is loaded."""

    manifest: Manifest
    path: Path
    slots: int  # maximum number of open sessions; 0: unknown until the bundle is loaded
    loaded: HintEngine | None = None
    loading: "asyncio.Task[None] | None" = None
    sessions: int = 0
    retired: bool = False  # whether it was removed: then it accepts no sessions, and is released after the last one

    @property
    def engine(self) -> HintEngine:
        """The engine. The bundle must be loaded."""
        assert self.loaded is not None
        return self.loaded


class Bundles:
    """All bundles of a server. Devices select a bundle by its id."""

    def __init__(
        self,
        names: Sequence[str] | None,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        max_sessions: int | None,
        max_wait: float,
        metrics: Metrics,
    ) -> None:
        """Load the bundles.

        Args:
            names: Names or paths of bundles, or folders with bundles. None: all shipped bundles. Then the default
                bundle is loaded at once, and each other one when a device first requests it.
            device: The device for the networks.
            dtype: The type of their weights and features.
            max_sessions: The maximum number of open sessions of each bundle. None: it is measured on the device.
            max_wait: The time that a step waits for the audio of other sessions, seconds.
            metrics: The metrics of the server.

        Raises:
            InputError: A bundle cannot be loaded.
        """
        # The matrices of a frame are too small to share among threads. With --workers, processes use more cores.
        torch.set_num_threads(1)
        self._names, self._on_demand = names or [DEFAULT_BUNDLE, str(PRETRAINED)], not names
        self._device, self._dtype, self._max_sessions = device, dtype, max_sessions
        self._max_wait, self._metrics = max_wait, metrics
        self._served: dict[str, ServedBundle] = {}
        self._scanning = False  # a scan can include retired bundles again, so that none is released during it
        self.apply(self.scan())

    @property
    def served(self) -> list[ServedBundle]:
        """The bundles that accept new sessions, in the order of their names on the command line."""
        return [bundle for bundle in self._served.values() if not bundle.retired]

    def find(self, name_or_id: str) -> ServedBundle | None:
        """Return a bundle that accepts new sessions, by its name or id. An empty text means the first bundle."""
        for bundle in self.served:
            if name_or_id in ("", bundle.manifest.id, bundle.manifest.name):
                return bundle
        return None

    def free_slots(self, bundle: ServedBundle) -> int:
        """Return how many more sessions of a bundle the server can accept.

        Before a bundle is loaded, this is 0 if the number is measured.
        """
        free = bundle.slots - bundle.sessions
        if self._max_sessions is not None:
            return free
        # The measured number of slots needs the whole device, which all bundles share, including retired ones.
        share = sum(other.sessions / other.slots for other in self._served.values() if other.sessions)
        return max(0, min(free, int((1 - share) * bundle.slots + 1e-6)))

    async def load(self, bundle: ServedBundle) -> None:
        """Load a bundle if it is not loaded. This can take seconds.

        Concurrent calls load it only once, and a call that is cancelled does not stop the loading.

        Raises:
            InputError: The bundle cannot be loaded.
        """
        if bundle.loaded is None:
            if bundle.loading is None:
                bundle.loading = asyncio.create_task(self._load_in_background(bundle))
                # Retrieve the exception, which is logged already, so that asyncio does not report it again.
                bundle.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
            await asyncio.shield(bundle.loading)

    async def _load_in_background(self, bundle: ServedBundle) -> None:
        name = bundle.manifest.label
        try:
            await asyncio.to_thread(self._load, bundle)
        except InputError as error:
            _log.error({"event": "load_failed", "bundle": name, "why": str(error)})
            raise
        else:
            _log.info({"event": "bundle_loaded", "bundle": name, "sessions": bundle.slots})
            self._metrics.begin(bundle.manifest.name, bundle.slots)
        finally:
            bundle.loading = None
            self.release_if_unused(bundle)  # it can have been retired while it was loaded

    def check(self) -> None:
        """Check that the threads of all engines run.

        Raises:
            Failure: The thread of an engine has ended.
        """
        for bundle in self._served.values():
            if bundle.loaded is not None and not bundle.loaded.alive:
                raise Failure(f"the network of {bundle.manifest.label} has stopped; see the log")

    def scan(self) -> dict[str, ServedBundle]:
        """Read the names again, and load the bundles that are new. This can take seconds.

        Returns:
            The bundles that now exist, by id, for :meth:`apply`.

        Raises:
            InputError: A bundle cannot be loaded. Then no new bundle stays loaded.
        """
        self._scanning = True
        scanned: dict[str, ServedBundle] = {}
        try:
            for path in self._paths():
                manifest = Bundle(path).manifest
                if manifest.id not in scanned:
                    for other in scanned.values():
                        if other.manifest.name == manifest.name:
                            text = f"{path}: has the same name, {manifest.name}, as {other.path}; leave out one of them"
                            raise InputError(text)
                    bundle = self._served.get(manifest.id) or ServedBundle(manifest, path, self._max_sessions or 0)
                    if bundle.loaded is None and not (self._on_demand and scanned):
                        self._load(bundle)
                    scanned[manifest.id] = bundle
        except BaseException:
            self._scanning = False
            for identity, bundle in scanned.items():
                if identity not in self._served and bundle.loaded is not None:
                    bundle.loaded.close()
            raise
        return scanned

    def apply(self, scanned: dict[str, ServedBundle]) -> tuple[list[str], list[str]]:
        """Serve the bundles of a :meth:`scan` and retire all others. Return the labels of added and retired bundles."""
        added = [bundle.manifest.label for identity, bundle in scanned.items() if identity not in self._served]
        removed = {identity: bundle for identity, bundle in self._served.items() if identity not in scanned}
        for bundle in scanned.values():
            bundle.retired = False
            if bundle.loaded is not None:
                self._metrics.begin(bundle.manifest.name, bundle.slots)
        self._served = {**scanned, **removed}
        self._scanning = False
        for bundle in removed.values():
            bundle.retired = True
            self.release_if_unused(bundle)
        return added, [bundle.manifest.label for bundle in removed.values()]

    def release_if_unused(self, bundle: ServedBundle) -> None:
        """Release a bundle if it is retired and its last session has ended."""
        unused = bundle.retired and not bundle.sessions and bundle.loading is None and not self._scanning
        if unused and bundle.manifest.id in self._served:
            del self._served[bundle.manifest.id]
            if bundle.loaded is None:
                return
            bundle.loaded.close()
            if bundle.manifest.name not in (other.manifest.name for other in self._served.values()):
                self._metrics.slots.remove(bundle.manifest.name)

    def close(self) -> None:
        """Close all engines."""
        for bundle in self._served.values():
            if bundle.loaded is not None:
                bundle.loaded.close()

    def _paths(self) -> list[Path]:
        paths: dict[Path, None] = {}
        for name in self._names:
            folder = Path(name)
            inside = [] if (folder / MANIFEST_FILE).exists() else sorted(folder.glob(f"*/{MANIFEST_FILE}"))
            # A folder can also contain bundles of one network alone, which have no hints.
            pairs = [path.parent for path in inside if isinstance(Bundle(path.parent).model, Pair)]
            paths |= dict.fromkeys(path.resolve() for path in pairs or [Bundle(name).directory])
        return list(paths)

    def _load(self, bundle: ServedBundle) -> None:
        opened = Bundle(bundle.path)
        model, manifest = load_large(opened), opened.manifest
        if manifest.id != bundle.manifest.id:
            text = f"{bundle.path}: contains another bundle than before; send SIGHUP to the server, or restart it"
            raise InputError(text)
        model.network.to(self._dtype)  # the hint encoder keeps its precision
        try:
            slots = self._max_sessions or measure_capacity(model, self._device)
            observe = partial(self._metrics.observe_step, manifest.name)
            engine = HintEngine(model, self._device, slots=slots, max_wait=self._max_wait, observe=observe)
        except RuntimeError as error:  # torch raises this if there is not enough memory
            text = f"{bundle.path}: not enough memory for {self._max_sessions or 'all'} sessions on {self._device}"
            raise InputError(f"{text}; lower --max-sessions ({str(error).splitlines()[0]})") from None
        bundle.slots, bundle.loaded = slots, engine
