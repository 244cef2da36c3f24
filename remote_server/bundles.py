"""The bundles that a server runs, each with an engine of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from common.errors import Failure, InputError
from models.bundle import load_large
from models.manifest import MANIFEST_FILE, Manifest, find_bundle, read_manifest
from remote_server.capacity import measure_capacity
from remote_server.engine import HintEngine
from remote_server.metrics import Metrics


@dataclass
class ServedBundle:
    """A bundle and the engine that runs its large network."""

    manifest: Manifest
    engine: HintEngine
    sessions: int = 0
    retired: bool = False  # not among those asked for any more: takes no new sessions, and goes after its last one


class Bundles:
    """All bundles of a server. Devices say by its id which one they have."""

    def __init__(
        self, names: Sequence[str], device: torch.device, *, max_sessions: int | None, max_wait: float, metrics: Metrics
    ) -> None:
        """Load every bundle.

        Args:
            names: names or paths of bundles, or folders that hold bundles.
            max_sessions: of each bundle at once; None: as many as the device carries, measured.
            max_wait: seconds that a step may wait for further sessions.

        Raises:
            InputError: a bundle cannot be loaded.
        """
        # A frame's matrices are too small to share among threads; more processes use more cores.
        torch.set_num_threads(1)
        self._names, self._device, self._max_sessions = names, device, max_sessions
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
        if bundle.sessions >= bundle.engine.slots:
            return False
        if self._max_sessions is not None or not bundle.sessions:
            return True
        # What was measured was the whole device, which all bundles share, those that are retired too.
        share = sum(other.sessions / other.engine.slots for other in self._served.values())
        return share + 1 / bundle.engine.slots < 1 + 1e-9

    def check(self) -> None:
        """Find out whether all engines still run.

        Raises:
            Failure: one does not.
        """
        for bundle in self._served.values():
            if not bundle.engine.alive:
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
                manifest = read_manifest(path)
                if manifest.id not in found:
                    found[manifest.id] = self._served.get(manifest.id) or self._load(path)
        except BaseException:
            self._loading = False
            for identity, bundle in found.items():
                if identity not in self._served:
                    bundle.engine.close()
            raise
        return found

    def take_in(self, found: dict[str, ServedBundle]) -> tuple[list[str], list[str]]:
        """Serve what :meth:`load_new` found, and retire what is not among it. The labels of both."""
        added = [bundle.manifest.label for identity, bundle in found.items() if identity not in self._served]
        gone = {identity: bundle for identity, bundle in self._served.items() if identity not in found}
        for bundle in found.values():
            bundle.retired = False
            self._metrics.begin(bundle.manifest.name, bundle.engine.slots)
        self._served = {**found, **gone}
        self._loading = False
        for bundle in gone.values():
            bundle.retired = True
            self.let_go(bundle)
        return added, [bundle.manifest.label for bundle in gone.values()]

    def let_go(self, bundle: ServedBundle) -> None:
        """Free a retired bundle whose last session has ended."""
        unused = bundle.retired and not bundle.sessions and not self._loading
        if unused and bundle.manifest.id in self._served:
            del self._served[bundle.manifest.id]
            bundle.engine.close()
            if bundle.manifest.name not in (other.manifest.name for other in self._served.values()):
                self._metrics.slots.remove(bundle.manifest.name)

    def close(self) -> None:
        """End all engines."""
        for bundle in self._served.values():
            bundle.engine.close()

    def _paths(self) -> list[Path]:
        paths: dict[Path, None] = {}
        for name in self._names:
            folder = Path(name)
            inside = [] if (folder / MANIFEST_FILE).exists() else sorted(folder.glob(f"*/{MANIFEST_FILE}"))
            # In a folder there may be networks alone beside the pairs.
            pairs = [path.parent for path in inside if read_manifest(path.parent).model.large is not None]
            paths |= dict.fromkeys(path.resolve() for path in pairs or [find_bundle(name)])
        return list(paths)

    def _load(self, path: Path) -> ServedBundle:
        model, manifest = load_large(str(path))
        try:
            slots = self._max_sessions or measure_capacity(model, self._device)
            observe = partial(self._metrics.observe_step, manifest.name)
            engine = HintEngine(model, self._device, slots=slots, max_wait=self._max_wait, observe=observe)
        except RuntimeError as error:  # torch's error for memory that is not there
            text = f"{path}: no memory for {self._max_sessions or 'all'} sessions on {self._device}"
            raise InputError(f"{text}; lower --max-sessions ({str(error).splitlines()[0]})") from None
        return ServedBundle(manifest, engine)
