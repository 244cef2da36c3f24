"""An example device that needs only docs/bundle.md, NumPy and ONNX Runtime, and no code of this project.

Usage: python examples/device.py BUNDLE VECTORS

Runs the input of test vectors frame by frame through the graph of the bundle, with their hints, and prints the largest
difference from their output. The exit code is 0 if the difference is below 1e-4.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime


def read_safetensors(path):
    """Read the tensors of a safetensors file, which consists of a length, a JSON header and the values."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    kinds = {"F32": "<f4", "F16": "<f2"}
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(content[begin:end], kinds[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def open_bundle(folder):
    """Read the manifest of a bundle, and load its graph after checking the digest."""
    manifest = json.loads((folder / "bundle.json").read_text())
    assert manifest["schema_version"] == 2
    graph = (folder / "small.onnx").read_bytes()
    assert manifest["graph_digest"] == f"sha256:{hashlib.sha256(graph).hexdigest()}"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return manifest, onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def device_network(model):
    """Return the size of the device's network: the small one of a pair, or the network alone."""
    return model["small"] if "small" in model else model["network"]


def speaker_inputs(folder, model, embedding):
    """Compute the modulation between the blocks from a speaker embedding. It is constant for a session."""
    weights = read_safetensors(folder / "small.safetensors")
    bins = (model["framing"]["chunk"] + model["framing"]["lookahead"]) // 2 + 1
    inputs = {}
    for index in range(device_network(model)["blocks"] - 1):
        weight = weights[f"network.speaker.{index}.weight"].astype(np.float32)
        bias = weights[f"network.speaker.{index}.bias"].astype(np.float32)
        parts = (weight @ embedding + bias).reshape(2, bins, device_network(model)["channels"])
        inputs[f"speaker_weight_{index}"], inputs[f"speaker_bias_{index}"] = parts
    return inputs


class Stream:
    """The state of one stream through the graph."""

    def __init__(self, graph, model, speaker):
        self.graph, self.chunk = graph, model["framing"]["chunk"]
        self.lookahead, self.window = model["framing"]["lookahead"], device_network(model)["window"]
        boosting = model.get("boosting", {})
        assert "policy" not in boosting, "this example is for bundles whose hints have a fixed delay"
        self.delay = boosting.get("delay", 0)
        self.outputs = [value.name for value in graph.get_outputs()]
        self.inputs = {value.name: np.zeros(value.shape, np.float32) for value in graph.get_inputs()}
        self.inputs.update(speaker)
        if "self_mask" in self.inputs:
            self.inputs["self_mask"][:] = -np.inf
        rows = next(value.shape[0] for value in graph.get_outputs() if value.name == "frame")
        self.overlap = np.zeros((rows, self.lookahead), np.float32)
        self.waiting = {name: [] for name in self.inputs if name.startswith("delayed_")}
        self.number = 0

    def step(self, window, hint):
        """Process the next frame.

        Args:
            window: its samples, [microphones, chunk + lookahead].
            hint: the hint of ``delay`` frames ago, or None.

        Returns:
            Samples of the estimate, [sources * microphones, chunk].
        """
        inputs, row = self.inputs, self.number % self.window
        inputs["window"] = window
        if "hint" in inputs:
            inputs["hint"] = np.zeros_like(inputs["hint"]) if hint is None else hint
        for name, features in self.waiting.items():
            # The features of the frame that the hint belongs to. They are zeros in the first frames.
            ready = len(features) == self.delay
            inputs[name] = features.pop(0) if ready else np.zeros_like(inputs[name])
        masks = [inputs[name] for name in ("mask", "self_mask") if name in inputs]
        for mask in masks:
            mask[row] = -np.inf  # the oldest row, which the new frame replaces
        outputs = dict(zip(self.outputs, self.graph.run(None, inputs), strict=True))
        for mask in masks:
            mask[row] = 0
        for name, value in outputs.items():
            if name.startswith("new_"):
                inputs[name.removeprefix("new_")] = value
            elif name.startswith("features_"):
                self.waiting[name.replace("features", "delayed")].append(value)
            elif name.startswith(("key_", "self_key_")):
                inputs[name.replace("key_", "keys_")][:, :, row] = value[:, 0]
            elif name.startswith(("value_", "self_value_")):
                inputs[name.replace("value_", "values_")][:, row] = value[:, 0]
            elif name in ("input_new", "output_new"):
                past = inputs[name.replace("new", "past")]
                inputs[name.replace("new", "past")] = np.concatenate([past[:, :, 1:], value], axis=2)
        frame = outputs["frame"]
        samples = frame[:, : self.chunk].copy()
        samples[:, : self.lookahead] += self.overlap
        self.overlap = frame[:, self.chunk :]
        self.number += 1
        return samples


def main(bundle, vectors):
    folder, vectors = Path(bundle), Path(vectors)
    manifest, graph = open_bundle(folder)
    model, about = manifest["model"], json.loads((vectors / "vectors.json").read_text())
    assert about["bundle_id"] == manifest["id"], f"these vectors are of the bundle {about['bundle_name']}"

    def read(name):
        return np.fromfile(vectors / f"{name}.f32", "<f4").reshape(about["shapes"][name])

    sound, hints, expected = read("input"), read("hints"), read("output")
    speaker = speaker_inputs(folder, model, read("speaker")) if model["task"] == "tse" else {}
    stream = Stream(graph, model, speaker)
    chunk, lookahead = stream.chunk, stream.lookahead
    padded = np.pad(sound, ((0, 0), (0, lookahead)))
    given = iter(hints)
    worst = 0.0
    for frame in range(sound.shape[1] // chunk):
        # The vectors define which frames have a hint. A real device uses the hints that arrive on time.
        hint = next(given) if frame in about["frames_with_hints"] else None
        samples = stream.step(np.ascontiguousarray(padded[:, frame * chunk :][:, : chunk + lookahead]), hint)
        worst = max(worst, float(np.abs(samples - expected[:, frame * chunk :][:, :chunk]).max()))
    print(f"{about['bundle_name']}: largest difference {worst:.1e} over {stream.number} frames")
    return 0 if worst < 1e-4 else 1


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
