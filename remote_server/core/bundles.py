"""The bundles that a server runs, each with an engine of its own."""

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
    """A bundle and, once it is loaded, the engine that runs its large network."""

    manifest: Manifest
    path: Path
    slots: int  # sessions at once; 0: not known before it is loaded
    loaded: HintEngine | None = None
    loading: "asyncio.Task[None] | None" = None
    sessions: int = 0
    retired: bool = False  # not among those asked for any more: takes no new sessions, and goes after its last one

    @property
    def engine(self) -> HintEngine:
        """The engine of a bundle that is loaded."""
        assert self.loaded is not None
        return self.loaded


class Bundles:
    """All bundles of a server. Devices say by its id which one they have."""

    def __init__(
        self,
        names: Sequence[str] | None,
        device: torch.device,
        *,
        max_sessions: int | None,
        max_wait: float,
        metrics: Metrics,
    ) -> None:
        """Load every bundle.

        Args:
            names: names or paths of bundles, or folders that hold bundles. None: all shipped bundles, the default one
                first, of which the others are loaded only when they are first asked for.
            max_sessions: of each bundle at once; None: as many as the device carries, measured.
            max_wait: seconds that a step may wait for further sessions.

        Raises:
            InputError: a bundle cannot be loaded.
        """
        # A frame's matrices are too small to share among threads; more processes use more cores.
        torch.set_num_threads(1)
        self._names, self._on_demand = names or [DEFAULT_BUNDLE, str(PRETRAINED)], not names
        self._device, self._max_sessions = device, max_sessions
        self._max_wait, self._metrics = max_wait, metrics
        self._served: dict[str, ServedBundle] = {}
        self._loading = False  # what is served may be found again, and must not go meanwhile
        self.take_in(self.load_new())

    @property
    def served(self) -> list[ServedBundle]:
        """Those that take new sessions, in the order asked for."""
        return [bundle for bundle in self._served.values() if not bundle.retired]

    def find(self, name_or_id: str) -> ServedBundle | None:
        """A bundle that takes new sessions; the first one for an empty name."""
        for bundle in self.served:
            if name_or_id in ("", bundle.manifest.id, bundle.manifest.name):
                return bundle
        return None

    def has_place(self, bundle: ServedBundle) -> bool:
        """Whether one more session of a bundle can be served."""
        if bundle.sessions >= bundle.slots:
            return False
        if self._max_sessions is not None or not bundle.sessions:
            return True
        # What was measured was the whole device, which all bundles share, those that are retired too.
        share = sum(other.sessions / other.slots for other in self._served.values() if other.sessions)
        return share + 1 / bundle.slots < 1 + 1e-9

    async def load(self, bundle: ServedBundle) -> None:
        """Have a bundle loaded, which may take seconds; what several wait for is loaded once, and stays if they leave.

        Raises:
            InputError: it cannot be loaded.
        """
        if bundle.loaded is None:
            if bundle.loading is None:
                bundle.loading = asyncio.create_task(self._load_beside(bundle))
                bundle.loading.add_done_callback(lambda task: task.cancelled() or task.exception())  # told by the log
            await asyncio.shield(bundle.loading)

    async def _load_beside(self, bundle: ServedBundle) -> None:
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
            self.let_go(bundle)  # if it was retired meanwhile

    def check(self) -> None:
        """Find out whether all engines still run.

        Raises:
            Failure: one does not.
        """
        for bundle in self._served.values():
            if bundle.loaded is not None and not bundle.loaded.alive:
                raise Failure(f"the network of {bundle.manifest.label} has stopped; see the log")

    def load_new(self) -> dict[str, ServedBundle]:
        """Look at the names again: what is there now, by id. What is new is loaded, which may take seconds.

        Raises:
            InputError: a bundle cannot be loaded. None is then.
        """
        self._loading = True
        found: dict[str, ServedBundle] = {}
        try:
            for path in self._paths():
                manifest = Bundle(path).manifest
                if manifest.id not in found:
                    bundle = self._served.get(manifest.id) or ServedBundle(manifest, path, self._max_sessions or 0)
                    if bundle.loaded is None and not (self._on_demand and found):
                        self._load(bundle)
                    found[manifest.id] = bundle
        except BaseException:
            self._loading = False
            for identity, bundle in found.items():
                if identity not in self._served and bundle.loaded is not None:
                    bundle.loaded.close()
            raise
        return found

    def take_in(self, found: dict[str, ServedBundle]) -> tuple[list[str], list[str]]:
        """Serve what :meth:`load_new` found, and retire what is not among it. The labels of both."""
        added = [bundle.manifest.label for identity, bundle in found.items() if identity not in self._served]
        gone = {identity: bundle for identity, bundle in self._served.items() if identity not in found}
        for bundle in found.values():
            bundle.retired = False
            if bundle.loaded is not None:
                self._metrics.begin(bundle.manifest.name, bundle.slots)
        self._served = {**found, **gone}
        self._loading = False
        for bundle in gone.values():
            bundle.retired = True
            self.let_go(bundle)
        return added, [bundle.manifest.label for bundle in gone.values()]

    def let_go(self, bundle: ServedBundle) -> None:
        """Free a retired bundle whose last session has ended."""
        unused = bundle.retired and not bundle.sessions and bundle.loading is None and not self._loading
        if unused and bundle.manifest.id in self._served:
            del self._served[bundle.manifest.id]
            if bundle.loaded is None:
                return
            bundle.loaded.close()
            if bundle.manifest.name not in (other.manifest.name for other in self._served.values()):
                self._metrics.slots.remove(bundle.manifest.name)

    def close(self) -> None:
        """End all engines."""
        for bundle in self._served.values():
            if bundle.loaded is not None:
                bundle.loaded.close()

    def _paths(self) -> list[Path]:
        paths: dict[Path, None] = {}
        for name in self._names:
            folder = Path(name)
            inside = [] if (folder / MANIFEST_FILE).exists() else sorted(folder.glob(f"*/{MANIFEST_FILE}"))
            # In a folder there may be networks alone beside the pairs.
            pairs = [path.parent for path in inside if isinstance(Bundle(path.parent).model, Pair)]
            paths |= dict.fromkeys(path.resolve() for path in pairs or [Bundle(name).directory])
        return list(paths)

    def _load(self, bundle: ServedBundle) -> None:
        opened = Bundle(bundle.path)
        model, manifest = load_large(opened), opened.manifest
        if manifest.id != bundle.manifest.id:
            raise InputError(f"{bundle.path}: holds another bundle than at the start; send SIGHUP, or start again")
        try:
            slots = self._max_sessions or measure_capacity(model, self._device)
            observe = partial(self._metrics.observe_step, manifest.name)
            engine = HintEngine(model, self._device, slots=slots, max_wait=self._max_wait, observe=observe)
        except RuntimeError as error:  # torch's error for memory that is not there
            text = f"{bundle.path}: no memory for {self._max_sessions or 'all'} sessions on {self._device}"
            raise InputError(f"{text}; lower --max-sessions ({str(error).splitlines()[0]})") from None
        bundle.slots, bundle.loaded = slots, engine
