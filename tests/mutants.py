"""Damaged files of every kind that the programs read: ``python -m tests.mutants KIND FOLDER FIRST COUNT``.

A mutant is made of a good file by a random generator of its own, so that its number names it. A process reads many of
them, with 2 GiB of memory beyond what it begins with, and writes down in ``FOLDER/at`` which one it is at, so that the
next process can go on after one that was killed. What is wrong with a reader is printed, a line a mutant.
"""

import contextlib
import importlib
import io
import json
import os
import random
import resource
import shutil
import sys
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from knowledge_boosting.common.errors import Failure, InputError
from knowledge_boosting.models.arrivals import Hint
from knowledge_boosting.models.bundle import Bundle as Opened

ROOT = Path(__file__).parent.parent
MEMORY = 2 * 2**30  # bytes
_NUMBERS = (0, 1, 2, 255, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)
_ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3, 1e9, 10**9, 10**30, -(2**63), 1e308, "", "x" * 3000, "\0\x1b[2J\ud800", [], {}, [[]]),
    *({"a": 1}, [1, "2"], float("nan"), float("inf"), 0.5),
)
Reader = Callable[[Path], object]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bytes with a few of the faults that files have."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        # Where a format's own structure is: at the head and at the end.
        size = len(changed)
        near = rng.choice((64, 1024, size, size))
        at = rng.randrange(max(1, min(near, size)))
        if rng.random() < 0.2:
            at = max(0, size - 1 - at)
        match rng.randrange(8):
            case 0:
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                if size:
                    changed[min(at, size - 1)] ^= 1 << rng.randrange(8)
            case 2:
                del changed[at:]
            case 3:
                del changed[at : at + rng.choice((1, 2, 4, 100, 10_000))]
            case 4:
                changed[at:at] = rng.randbytes(rng.choice((1, 4, 100)))
            case 5:
                width = rng.choice((1, 2, 4, 8))
                number = rng.choice(_NUMBERS) & (2 ** (8 * width) - 1)
                changed[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
            case 6:
                piece = changed[at : at + rng.choice((4, 64, 1000))]
                changed[at:at] = piece * rng.choice((1, 2, 50))
            case 7:
                changed[at:at] = rng.choice((b"[", b"{", b'{"a":', b"\0", b"(")) * rng.choice((1, 50, 30_000))
    return bytes(changed)


def altered(document: Any, rng: random.Random) -> Any:
    """A JSON document with one value or key in it that is another one."""
    places: list[tuple[Any, Any]] = []

    def look(node: Any) -> None:
        for key, value in list(node.items()) if isinstance(node, dict) else list(enumerate(node)):
            places.append((node, key))
            if isinstance(value, dict | list):
                look(value)

    look(document)
    for _ in range(rng.choice((1, 1, 2))):
        node, key = rng.choice(places)
        match rng.randrange(6):
            case 0 if isinstance(node, dict):
                node.pop(key, None)
            case 1 if isinstance(node, dict):
                node[rng.choice(("", "x", "model", "\0", "__class__"))] = rng.choice(_ODD)
            case 2 if isinstance(node, dict) and key in node and isinstance(node[key], int | float):
                node[key] = type(node[key])(node[key] * rng.choice((-1, 2, 3, 1000, 10**6)))
            case _:
                with contextlib.suppress(IndexError):
                    node[key] = rng.choice(_ODD)
    return document


def json_or_bytes(content: bytes, rng: random.Random) -> bytes:
    """A JSON text, altered in its meaning or in its bytes."""
    if rng.random() < 0.4:
        return damaged(content, rng)
    return json.dumps(altered(json.loads(content), rng)).encode()


class Bundle:
    """A bundle's folder, one file of which is damaged, with digests that say it is as it should be."""

    def __init__(self, file: str, reader: Reader) -> None:
        self._file, self._reader = file, reader

    def prepare(self, folder: Path) -> None:
        from knowledge_boosting.models.checkpoint import build
        from knowledge_boosting.models.config import FixedDelay, NetworkSize, Pair
        from knowledge_boosting.models.networks import write_bundle

        large = NetworkSize(channels=4, hidden=4, blocks=2, heads=2, self_attention=True)
        small = NetworkSize(channels=4, hidden=4, blocks=2, heads=2)
        config = Pair(task="tse", small=small, large=large, boosting=FixedDelay(delay=2))
        write_bundle(folder / "good", build(config), config, untrained=True, source="random", configuration="none")

    def mutate(self, folder: Path, mutant: Path, rng: random.Random) -> None:
        from knowledge_boosting.models.config import MODEL
        from knowledge_boosting.models.manifest import bundle_id, file_digest

        shutil.copytree(folder / "good", mutant)
        path, manifest = mutant / self._file, mutant / "bundle.json"
        path.write_bytes((json_or_bytes if path == manifest else damaged)(path.read_bytes(), rng))
        with contextlib.suppress(Exception):
            document = json.loads(manifest.read_text())
            parts = [part for part in document["digests"] if (mutant / f"{part}.safetensors").is_file()]
            document["digests"] |= {part: file_digest(mutant / f"{part}.safetensors") for part in parts}
            document["graph_digest"] = file_digest(mutant / "small.onnx")
            document["id"] = bundle_id(MODEL.validate_python(document["model"]), document["digests"])
            manifest.write_text(json.dumps(document))

    def read(self, mutant: Path) -> object:
        return self._reader(mutant)


class File:
    """One file, made of a good one."""

    def __init__(
        self,
        name: str,
        make: Callable[[Path], object],
        reader: Reader,
        mutate: Callable[[bytes, random.Random], bytes] = damaged,
    ) -> None:
        self._name, self._make, self._reader, self._mutate = name, make, reader, mutate

    def prepare(self, folder: Path) -> None:
        (folder / "good").mkdir()
        self._make(folder / "good" / self._name)

    def mutate(self, folder: Path, mutant: Path, rng: random.Random) -> None:
        mutant.mkdir()
        goods = sorted((folder / "good").iterdir())
        good = rng.choice(goods)
        (mutant / good.name).write_bytes(self._mutate(good.read_bytes(), rng))

    def read(self, mutant: Path) -> object:
        return self._reader(next(iter(mutant.iterdir())))


def _read_bundle(mutant: Path) -> object:
    from knowledge_boosting.models.networks import load_pair

    load_pair(Opened(mutant))
    return _read_graph(mutant)


def _read_graph(mutant: Path) -> object:
    from knowledge_boosting.device_client.engines.onnx_engine import OnnxModel

    model = OnnxModel(Opened(mutant))
    config = model.manifest.model
    speaker = np.full(256, 1 / 16, np.float32) if config.task == "tse" else None
    hints = []
    if config.hint_channels:
        hints = [Hint(config.delay, np.zeros((config.hint_channels, config.framing.bins), np.float32))]
    engine = model.session(speaker)
    for frame in range(5):
        engine.step(
            np.zeros((config.microphones, config.framing.n_fft), np.float32), hints if frame >= config.delay else []
        )
    return None


def _model_config() -> Any:
    from knowledge_boosting.models.config import Alone, NetworkSize

    return Alone(task="tse", network=NetworkSize(channels=4, hidden=4, blocks=2))


def _make_checkpoint(path: Path) -> None:
    import torch

    from knowledge_boosting.models.checkpoint import build

    state = build(_model_config()).state_dict()
    gains = {"small": [1.0, 1.0]}
    torch.save(state, path.with_name("bare.pt"))
    content = {"state_dict": {f"model.{name}": value for name, value in state.items()}, "training_speakers": ["a"]}
    torch.save({**content, "output_gain": gains, "global_step": 3}, path)
    strange = {**state, "sparse": torch.eye(3).to_sparse(), "expanded": torch.zeros(1).expand(10**9)}
    torch.save(strange, path.with_name("strange.pt"))


def _mutate_checkpoint(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return damaged(content, rng)
    # Inside of the archive, whose own sums would otherwise tell.
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(target, "w") as archive:
        chosen = rng.choice(source.namelist()) if rng.random() < 0.4 else None
        for name in source.namelist():
            part = source.read(name)
            if name == chosen or (chosen is None and name.endswith("data.pkl")):
                part = damaged(part, rng)
            kind = zipfile.ZIP_DEFLATED if rng.random() < 0.02 else zipfile.ZIP_STORED
            archive.writestr(name, part, kind)
    return target.getvalue()


def _read_checkpoint(path: Path) -> None:
    from knowledge_boosting.models.checkpoint import apply_output_gains, read_checkpoint, read_training_speakers

    apply_output_gains(read_checkpoint(path, _model_config()), path)
    read_training_speakers(path)


def _make_embedding(path: Path) -> None:
    np.save(path, np.full(256, 1 / 16, np.float32))
    np.savez(path.with_name("archive.npz"), np.zeros(3))
    np.save(path.with_name("structured.npy"), np.zeros(256, [("a", "f4"), ("b", "i4")]))


def _make_configuration(path: Path) -> None:
    for source in ("configs/demo/ss-48ms.json", "configs/SS_joint/B6-SS.json", "configs/baselines/BM-BS-500.json"):
        shutil.copy(ROOT / source, path.with_name(Path(source).name))


def _read_configuration(path: Path) -> None:
    from knowledge_boosting.models.checkpoint import build, read_config
    from knowledge_boosting.training.config import read_training_config

    with contextlib.suppress(InputError):
        read_training_config(path)
    build(read_config(path))


def _read_tokens(path: Path) -> None:
    from knowledge_boosting.remote_server.core.access import Access

    Access(path)


def _make_sofa(path: Path) -> None:
    shutil.copy(next((ROOT / "samples" / "hrtf").glob("*.sofa")), path)


def _read_sofa(path: Path) -> None:
    from knowledge_boosting.training.data.responses import check_sofa

    check_sofa(path)


def _read_trace(path: Path) -> None:
    from knowledge_boosting.common.links import read_trace

    read_trace(path)


def _make_sounds(path: Path) -> None:
    import soundfile

    sound = np.random.default_rng(0).normal(0, 0.1, (24000, 1)).astype(np.float32)
    soundfile.write(path, sound, 16000, "FLOAT")
    for name in ("sound.flac", "sound.ogg", "short.wav"):
        soundfile.write(path.with_name(name), sound, 16000)


def _read_sound(path: Path) -> None:
    from knowledge_boosting.device_client.audio.files import read_speech

    read_speech(path)


_TOKENS = '[[token]]\nname = "laptop"\ntoken = "0123456789abcdef0123456789abcdef"\nsessions = 2\nbundles = ["a", "b"]\n'


def _make_recipe(path: Path) -> None:
    path.write_bytes((Path(__file__).parents[1] / "configs" / "listeners" / "recipe.toml").read_bytes())


def _read_recipe(path: Path) -> object:
    from knowledge_boosting.training.recipes import Recipe

    recipe = Recipe(path)
    return [recipe.stage(name, path.parent) for name in recipe.stages]


def _make_tokens(path: Path) -> None:
    path.write_text(_TOKENS)
    path.chmod(0o600)


KINDS: dict[str, Bundle | File] = {
    "bundle": Bundle("bundle.json", _read_bundle),
    "graph": Bundle("small.onnx", _read_graph),
    "weights": Bundle("small.safetensors", _read_bundle),
    "checkpoint": File("run.ckpt", _make_checkpoint, _read_checkpoint, _mutate_checkpoint),
    "embedding": File(
        "voice.npy",
        _make_embedding,
        lambda path: importlib.import_module("knowledge_boosting.device_client.speakers").read_embedding(path),
    ),
    "configuration": File("config.json", _make_configuration, _read_configuration, json_or_bytes),
    "recipe": File("recipe.toml", _make_recipe, _read_recipe),
    "tokens": File("tokens.toml", _make_tokens, _read_tokens),
    "sofa": File("head.sofa", _make_sofa, _read_sofa),
    "trace": File("trace.csv", lambda path: path.write_text("up_ms,down_ms\n" + "4.0,5.5\n" * 50), _read_trace),
    "sound": File("sound.wav", _make_sounds, _read_sound),
}


def fault(kind: str, mutant: Path) -> str | None:
    """What a reader does wrong with a mutant, if anything: it may take it, or say in a line what is wrong."""
    before = sorted(mutant.rglob("*"))
    try:
        KINDS[kind].read(mutant)
    except (InputError, Failure) as error:
        line = str(error)
        if "\n" in line or len(line) > 2000:
            return f"says it in more than a line: {line[:300]!r}"
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]!r} at {last.filename}:{last.lineno}"
    left = sorted(set(mutant.rglob("*")) - set(before))
    return f"leaves {left}" if left else None


def main(kind: str, folder: Path, first: int, count: int) -> None:
    """Read so many mutants, from a number on."""
    warnings.simplefilter("ignore")
    if not (folder / "good").exists():
        KINDS[kind].prepare(folder)
    rng = random.Random(f"{kind} warm")
    KINDS[kind].mutate(folder, folder / "warm", rng)
    fault(kind, folder / "warm")  # what is loaded for the first reading is not the mutants' memory
    shutil.rmtree(folder / "warm")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for number in range(first, first + count):
        (folder / "at").write_text(str(number))
        mutant = folder / "mutant"
        KINDS[kind].mutate(folder, mutant, random.Random(f"{kind} {number}"))
        if (what := fault(kind, mutant)) is not None:
            print(f"{kind} {number}: {what}", flush=True)
        shutil.rmtree(mutant)
    os._exit(0)  # damaged graphs may have left threads behind


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
