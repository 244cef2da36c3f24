"""Opens and checks bundles, without torch.

A bundle is a directory with these files: ``bundle.json``, the manifest; ``small.safetensors``, the weights of the
device's network, and ``small.onnx``, a graph that computes one frame of it; ``large.safetensors``, the weights of the
server's network and the hint encoder; ``README.md``, the model card. A device needs the small part, and a server the
large part.
"""

from collections.abc import Mapping
from pathlib import Path

from knowledge_boosting.common.errors import InputError, reason
from knowledge_boosting.models.config import ModelConfig, Pair
from knowledge_boosting.models.manifest import GRAPH_FILE, MANIFEST_FILE, Manifest, Part, file_digest, read_manifest

PRETRAINED = Path(__file__).parent / "pretrained"
DEFAULT_BUNDLE = "ss-compact"


class Bundle:
    """An open bundle. Each file is compared with its digest when it is requested."""

    def __init__(self, name_or_path: str | Path) -> None:
        """Open a bundle by the path of its directory or by the name of a shipped bundle.

        Raises:
            InputError: the bundle does not exist (the message lists the shipped ones), or its manifest cannot be used.
        """
        self.directory = _find(str(name_or_path))
        self.manifest: Manifest = read_manifest(self.directory)

    def __repr__(self) -> str:
        return f"Bundle({str(self.directory)!r})"

    @classmethod
    def shipped(cls) -> "list[Bundle]":
        """Return all shipped bundles, sorted by name."""
        return [cls(path.parent) for path in _shipped()]

    @property
    def name(self) -> str:
        """The name of the bundle."""
        return self.manifest.name

    @property
    def id(self) -> str:
        """A digest of model and weights, which must be the same on device and server."""
        return self.manifest.id

    @property
    def task(self) -> str:
        """The task: ``ss`` separates all speakers, ``tse`` extracts one."""
        return self.model.task

    @property
    def sample_rate(self) -> int:
        """The sample rate, Hz."""
        return self.model.framing.sample_rate

    @property
    def channels(self) -> int:
        """The number of microphones M."""
        return self.model.microphones

    @property
    def speakers(self) -> int:
        """The number of speakers S in the output."""
        return self.model.sources

    @property
    def delay_ms(self) -> float | None:
        """The fixed delay of hints, ms; None for one network alone, and if hints are used on arrival."""
        fixed = isinstance(self.model, Pair) and not self.model.on_arrival
        return self.model.max_age_ms if fixed else None

    @property
    def quality(self) -> Mapping[str, float]:
        """The measured figures by name, such as ``boosted_si_sdri`` in dB."""
        return self.manifest.quality

    @property
    def model(self) -> ModelConfig:
        """The configuration of the networks."""
        return self.manifest.model

    def weights(self, part: Part) -> Path:
        """Return the path of the weights of one part, after checking its digest.

        Raises:
            InputError: this copy of the bundle lacks the part, or the file was changed.
        """
        if part not in self.manifest.digests:
            raise InputError(
                f"{self.directory}: holds one network alone and has no {part} part; choose a bundle with a pair"
            )
        missing = f"this copy of the bundle lacks its {part} part"
        return self._check(f"{part}.safetensors", self.manifest.digests[part], missing)

    def graph(self) -> Path:
        """Return the path of the device's graph, after checking its digest.

        Raises:
            InputError: this copy of the bundle lacks the graph, or the file was changed.
        """
        missing = "export the bundle again with kb-export, or use --engine torch"
        return self._check(GRAPH_FILE, self.manifest.graph_digest, missing)

    def _check(self, file: str, expected: str | None, missing: str) -> Path:
        path = self.directory / file
        if expected is None or not path.is_file():
            raise InputError(f"{path}: no such file; {missing}")
        try:
            digest = file_digest(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({reason(error)})") from None
        if digest != expected:
            raise InputError(f"{path}: digest differs from {MANIFEST_FILE}; the file was changed or cut, copy it again")
        return path


def _find(name_or_path: str) -> Path:
    if not name_or_path:
        raise InputError("the name of the bundle is empty; give a name or a path")
    try:
        for candidate in (Path(name_or_path), PRETRAINED / name_or_path):
            if (candidate / MANIFEST_FILE).is_file():
                return candidate
        if Path(name_or_path).is_dir():
            raise InputError(f"{name_or_path}: has no {MANIFEST_FILE}; make a bundle with kb-export")
    except OSError as error:
        raise InputError(f"{name_or_path}: no bundle of that name or path ({reason(error)})") from None
    shipped = [path.parent.name for path in _shipped()]
    advice = f"shipped ones: {', '.join(shipped)}" if shipped else "none is shipped yet, make one with kb-export"
    raise InputError(f"{name_or_path}: no bundle of that name or path ({advice})")


def _shipped() -> list[Path]:
    return sorted(PRETRAINED.glob(f"*/{MANIFEST_FILE}"))
