"""Bundles: a directory with a manifest, networks and a graph, opened and checked. Needs no torch.

A bundle is a directory: ``bundle.json``; ``small.safetensors``, the device's network, and ``small.onnx``, one frame of
it as a graph; ``large.safetensors``, the server's network and hint encoder; ``README.md``, the model card. A device
needs the small part, a server the large.
"""

from collections.abc import Mapping
from pathlib import Path

from knowledge_boosting.common.errors import InputError, reason
from knowledge_boosting.models.config import ModelConfig, Pair
from knowledge_boosting.models.manifest import GRAPH_FILE, MANIFEST_FILE, Manifest, Part, file_digest, read_manifest

PRETRAINED = Path(__file__).parent / "pretrained"
DEFAULT_BUNDLE = "ss-48ms-compact"


class Bundle:
    """A bundle that has been opened. Each of its files is compared with its digest once, when it is first asked for."""

    def __init__(self, name_or_path: str | Path) -> None:
        """Open a bundle, given as the path of its directory or as the name of a shipped one.

        Raises:
            InputError: there is no such bundle (the message names those there are), or its manifest cannot be used.
        """
        self.directory = _find(str(name_or_path))
        self.manifest: Manifest = read_manifest(self.directory)
        self._checked: set[Path] = set()

    def __repr__(self) -> str:
        return f"Bundle({str(self.directory)!r})"

    @classmethod
    def shipped(cls) -> "list[Bundle]":
        """All bundles that come with the software, by name."""
        return [cls(path.parent) for path in _shipped()]

    @property
    def name(self) -> str:
        """Its name."""
        return self.manifest.name

    @property
    def id(self) -> str:
        """A digest of its model and weights: device and server must have the same one."""
        return self.manifest.id

    @property
    def task(self) -> str:
        """``ss``, which separates all speakers, or ``tse``, which extracts one."""
        return self.model.task

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.model.framing.sample_rate

    @property
    def channels(self) -> int:
        """Microphones M."""
        return self.model.microphones

    @property
    def speakers(self) -> int:
        """Speakers S in the output."""
        return self.model.sources

    @property
    def delay_ms(self) -> float | None:
        """Milliseconds that a hint may be late; None for one network alone, which takes none."""
        return 1000 * self.model.delay * self.model.framing.chunk_seconds if isinstance(self.model, Pair) else None

    @property
    def quality(self) -> Mapping[str, float]:
        """Figures that were measured, such as ``boosted_si_sdri`` in dB, by name."""
        return self.manifest.quality

    @property
    def model(self) -> ModelConfig:
        """What its networks are."""
        return self.manifest.model

    def weights(self, part: Part) -> Path:
        """The file of one part's weights.

        Raises:
            InputError: this copy of the bundle lacks the part, or the file was changed.
        """
        if part not in self.manifest.digests:
            raise InputError(
                f"{self.directory}: is one network alone and has no {part} part; choose a bundle of a pair"
            )
        missing = f"this copy of the bundle lacks its {part} part"
        return self._check(f"{part}.safetensors", self.manifest.digests[part], missing)

    def graph(self) -> Path:
        """The file of the device's graph.

        Raises:
            InputError: this copy of the bundle lacks the graph, or the file was changed.
        """
        missing = "export the bundle again with kb-export, or use --engine torch"
        return self._check(GRAPH_FILE, self.manifest.graph_digest, missing)

    def _check(self, file: str, expected: str | None, missing: str) -> Path:
        path = self.directory / file
        if path in self._checked:
            return path
        if expected is None or not path.is_file():
            raise InputError(f"{path}: no such file; {missing}")
        try:
            digest = file_digest(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({reason(error)})") from None
        if digest != expected:
            raise InputError(f"{path}: digest differs from {MANIFEST_FILE}; the file was changed or cut, copy it again")
        self._checked.add(path)
        return path


def _find(name_or_path: str) -> Path:
    for candidate in (Path(name_or_path), PRETRAINED / name_or_path):
        if (candidate / MANIFEST_FILE).is_file():
            return candidate
    if Path(name_or_path).is_dir():
        raise InputError(f"{name_or_path}: has no {MANIFEST_FILE}; make a bundle with kb-export")
    shipped = [path.parent.name for path in _shipped()]
    advice = f"shipped ones: {', '.join(shipped)}" if shipped else "none is shipped yet, make one with kb-export"
    raise InputError(f"{name_or_path}: no bundle of that name or path ({advice})")


def _shipped() -> list[Path]:
    return sorted(PRETRAINED.glob(f"*/{MANIFEST_FILE}"))
