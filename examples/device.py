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
        self.on_arrival = boosting.get("policy") == "arrival"
        self.delay = boosting.get("delay", 0)
        self.outputs = [value.name for value in graph.get_outputs()]
        kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
        self.inputs = {value.name: np.zeros(value.shape, kinds[value.type]) for value in graph.get_inputs()}
        self.inputs.update(speaker)
        if "self_mask" in self.inputs:
            self.inputs["self_mask"][:] = -np.inf
        rows = next(value.shape[0] for value in graph.get_outputs() if value.name == "frame")
        self.overlap = np.zeros((rows, self.lookahead), np.float32)
        # The features of the last frames, by the index of the fusion.
        self.features = {name.removeprefix("features_"): [] for name in self.outputs if name.startswith("features_")}
        self.merged = [None] * self.window  # hints on arrival: the merged frame in each row of the rings
        self.number = 0

    def step(self, window, hints):
        """Process the next frame.

        Args:
            window: its samples, [microphones, chunk + lookahead].
            hints: the hints to use at this frame, as pairs of age and values. With a fixed delay there is at most one,
                of that age.

        Returns:
            Samples of the estimate, [sources * microphones, chunk].
        """
        inputs, row = self.inputs, self.number % self.window
        inputs["window"] = window
        if self.on_arrival:
            self.put_arrived(hints)
        else:
            self.put_delayed(hints)
        ring_masks = ("self_mask",) if self.on_arrival else ("mask", "self_mask")
        masks = [inputs[name] for name in ring_masks if name in inputs]
        for mask in masks:
            mask[row] = -np.inf  # the oldest row, which the new frame replaces
        outputs = dict(zip(self.outputs, self.graph.run(None, inputs), strict=True))
        for mask in masks:
            mask[row] = 0
        # The places in key_i and value_i, and the rows of the rings that they are written to.
        rows = [(0, row)]
        if self.on_arrival:
            rows = [(place, (self.number - age) % self.window) for place, (age, _) in enumerate(hints)]
            for age, _ in hints:
                self.merged[(self.number - age) % self.window] = self.number - age
        for name, value in outputs.items():
            if name.startswith("new_"):
                inputs[name.removeprefix("new_")] = value
            elif name.startswith("features_"):
                kept = self.features[name.removeprefix("features_")]
                kept.append(value)
                del kept[: -max(self.delay, self.window)]
            elif name.startswith(("key_", "self_key_")):
                for place, of in [(0, row)] if name.startswith("self") else rows:
                    inputs[name.replace("key_", "keys_")][:, :, of] = value[:, place]
            elif name.startswith(("value_", "self_value_")):
                for place, of in [(0, row)] if name.startswith("self") else rows:
                    inputs[name.replace("value_", "values_")][:, of] = value[:, place]
            elif name in ("input_new", "output_new"):
                past = inputs[name.replace("new", "past")]
                inputs[name.replace("new", "past")] = np.concatenate([past[:, :, 1:], value], axis=2)
        frame = outputs["frame"]
        samples = frame[:, : self.chunk].copy()
        samples[:, : self.lookahead] += self.overlap
        self.overlap = frame[:, self.chunk :]
        self.number += 1
        return samples

    def put_delayed(self, hints):
        """Put the hint of ``delay`` frames ago, and the features of its frame, into the inputs."""
        inputs = self.inputs
        if "hint" in inputs:
            inputs["hint"] = hints[0][1] if hints else np.zeros_like(inputs["hint"])
        for index, features in self.features.items():
            # There are no features in the first frames.
            name, ready = f"delayed_{index}", 0 < self.delay <= len(features)
            if name in inputs:
                inputs[name] = features[-self.delay] if ready else np.zeros_like(inputs[name])

    def put_arrived(self, hints):
        """Put the hints to merge, the features of their frames, and what is visible, into the inputs."""
        inputs, window, now = self.inputs, self.window, self.number
        merges = len(inputs["mask"]) - window
        bins = inputs["hint"].shape[1] // merges
        ages = np.ones(window + merges, np.float32)
        ages[:window] = (now - np.arange(window) - 1) % window + 1
        visible = np.zeros(window + merges, bool)
        visible[:window] = [frame == now - age for frame, age in zip(self.merged, ages[:window], strict=True)]
        for place, (age, values) in enumerate(hints):
            columns = slice(place * bins, (place + 1) * bins)
            inputs["hint"][:, columns] = values
            for index, features in self.features.items():
                inputs[f"waiting_{index}"][columns] = features[-age]
            ages[window + place], visible[window + place] = age, True
        inputs["ages"] = ages.astype(inputs["ages"].dtype)
        inputs["mask"] = np.where(visible, 0, -1e30).astype(np.float32)
        inputs["strength"][:] = min(1, visible.sum() / 8)
        inputs["youngest"][:] = ages[visible].min() if visible.any() else window


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
    worst = 0.0
    for frame in range(sound.shape[1] // chunk):
        # The vectors define when each hint is used. A real device uses the hints that arrive in time.
        given = [
            (age, values) for (at, age), values in zip(about["hints_at_and_age"], hints, strict=True) if at == frame
        ]
        samples = stream.step(np.ascontiguousarray(padded[:, frame * chunk :][:, : chunk + lookahead]), given)
        worst = max(worst, float(np.abs(samples - expected[:, frame * chunk :][:, :chunk]).max()))
    print(f"{about['bundle_name']}: largest difference {worst:.1e} over {stream.number} frames")
    return 0 if worst < 1e-4 else 1


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
