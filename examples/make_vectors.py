"""Makes test vectors of a bundle for devices in other languages: ``python examples/make_vectors.py BUNDLE FOLDER``.

They have 60 frames of noise with pauses, and hints for some of the frames. docs/bundle.md describes the files.
"""

import json
import sys
from pathlib import Path

import numpy as np

from knowledge_boosting.device_client.engines.onnx_engine import OnnxModel
from knowledge_boosting.models.arrivals import Hint, MergeQueue
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.config import ModelConfig

FRAMES = 60  # more than the window of attention


def hints_at_and_age(model: ModelConfig, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Draw the frames at which hints are used, and their ages: half of the frames have a hint."""
    if not model.hint_channels:
        return []
    frames = [frame for frame in range(FRAMES) if rng.uniform() < 0.5]
    if not model.on_arrival:
        return [(frame, model.delay) for frame in frames if frame >= model.delay]
    queue, used = MergeQueue(model.max_age), []
    arriving = sorted((frame + int(rng.integers(1, 30)), frame) for frame in frames)
    for at in range(FRAMES):
        for _, frame in [each for each in arriving if each[0] == at]:
            queue.put(frame)
        used += [(at, at - frame) for frame in queue.take(at)]
    return used


def main(bundle: str, folder: Path) -> None:
    """Write the test vectors."""
    loaded, rng = OnnxModel(Bundle(bundle)), np.random.default_rng(0)
    model = loaded.manifest.model
    framing = model.framing
    sound = rng.normal(0, 0.1, (model.microphones, FRAMES * framing.chunk)).astype(np.float32)
    sound[:, 3000:4000] = 0
    speaker = rng.normal(0, 1 / 16, 256).astype(np.float32) if model.needs_speaker else None
    used = hints_at_and_age(model, rng)
    hints = rng.normal(0, 1, (len(used), model.hint_channels, framing.bins)).astype(np.float32)
    engine, padded = loaded.session(speaker), np.pad(sound, ((0, 0), (0, framing.lookahead)))
    parts = []
    for frame in range(FRAMES):
        window = np.ascontiguousarray(padded[:, frame * framing.chunk :][:, : framing.n_fft])
        given = [Hint(age, values) for (at, age), values in zip(used, hints, strict=True) if at == frame]
        parts.append(engine.step(window, given))
    output = np.concatenate(parts, axis=-1).reshape(model.sources * model.microphones, -1)
    folder.mkdir(parents=True, exist_ok=True)
    values = {"input": sound, "hints": hints, "output": output} | ({} if speaker is None else {"speaker": speaker})
    for name, value in values.items():
        value.astype("<f4").tofile(folder / f"{name}.f32")
    about = {
        "bundle_name": loaded.manifest.name,
        "bundle_id": loaded.manifest.id,
        "hints_at_and_age": used,
        "shapes": {name: list(value.shape) for name, value in values.items()},
    }
    (folder / "vectors.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
