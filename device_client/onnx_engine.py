"""The small network under ONNX Runtime: the device's engine, without torch."""

import numpy as np
from safetensors.numpy import load_file

from common.errors import InputError, reason
from device_client.engine import CheckedEngine, Engine
from models.manifest import find_bundle, read_manifest, verify_graph, verify_part
from models.onnx_stream import OnnxStream, load_graph
from protos.codec import Samples


class OnnxModel:
    """A bundle's small network, from which sessions are made."""

    def __init__(self, bundle: str) -> None:
        """Load a bundle.

        Raises:
            InputError: the bundle cannot be used, or has no graph.
        """
        directory = find_bundle(bundle)
        self.manifest = read_manifest(directory)
        self._graph = load_graph(verify_graph(directory, self.manifest))
        self._speaker_layers: list[tuple[Samples, Samples]] = []
        if self.manifest.model.task == "tse":
            path = verify_part(directory, self.manifest, "small")
            try:
                weights = load_file(path)
                self._speaker_layers = [
                    (weights[f"network.speaker.{index}.weight"], weights[f"network.speaker.{index}.bias"])
                    for index in range(self.manifest.model.small.blocks - 1)
                ]
            except Exception as error:  # safetensors has errors of its own
                raise InputError(f"{path}: not the weights of this network ({reason(error)})") from None

    def session(self, speaker_embedding: Samples | None) -> Engine:
        """A session from its start; ``speaker_embedding`` is ``[256]`` for TSE."""
        model, speaker = self.manifest.model, {}
        for index, (weight, bias) in enumerate(self._speaker_layers):
            if speaker_embedding is None:
                raise ValueError("target speech extraction needs a speaker embedding")
            # What a speaker layer multiplies and adds is the same for a whole session, and so no part of the graph.
            modulation = weight.astype(np.float32) @ speaker_embedding + bias.astype(np.float32)
            parts = modulation.reshape(2, model.framing.bins, model.small.channels)
            speaker[f"speaker_weight_{index}"], speaker[f"speaker_bias_{index}"] = parts
        return CheckedEngine(OnnxStream(self._graph, model, speaker))
