"""The small network under ONNX Runtime: the device's engine, without torch."""

import numpy as np
from safetensors.numpy import load_file

from knowledge_boosting.common.errors import InputError, reason
from knowledge_boosting.device_client.engines.engine import CheckedEngine, Engine
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.config import SPEAKER_EMBEDDING_SIZE
from knowledge_boosting.models.manifest import GRAPH_FILE
from knowledge_boosting.models.onnx_stream import OnnxStream, check_sizes, load_graph
from knowledge_boosting.protos.codec import Samples


class OnnxModel:
    """A bundle's small network, from which sessions are made."""

    def __init__(self, bundle: Bundle) -> None:
        """Load a bundle's graph.

        Raises:
            InputError: the bundle cannot be used, or has no graph.
        """
        self.manifest = bundle.manifest
        self._graph = load_graph(bundle.graph())
        self._speaker_layers: list[tuple[Samples, Samples]] = []
        if self.manifest.model.needs_speaker:
            path = bundle.weights("small")
            try:
                weights = load_file(path)
                self._speaker_layers = [
                    (weights[f"network.speaker.{index}.weight"], weights[f"network.speaker.{index}.bias"])
                    for index in range(self.manifest.model.on_device.blocks - 1)
                ]
            except Exception as error:  # safetensors has errors of its own
                raise InputError(f"{path}: not the weights of this network ({reason(error)})") from None

        # A graph of another network, or of sizes that only it knows, is told before it is needed.
        model = self.manifest.model
        silence = np.zeros((model.microphones, model.framing.n_fft), np.float32)
        try:
            check_sizes(self._graph)
            speaker = np.zeros(SPEAKER_EMBEDDING_SIZE, np.float32) if model.needs_speaker else None
            estimate = self.session(speaker).step(silence, None)
            if estimate.shape != (model.sources, model.microphones, model.framing.chunk):
                raise ValueError(f"it gives {list(estimate.shape)}")
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            path = bundle.directory / GRAPH_FILE
            text = f"{path}: not the graph of this bundle's network ({reason(error)[:200]}); export the bundle again"
            raise InputError(text) from None

    def session(self, speaker_embedding: Samples | None) -> Engine:
        """A session from its start; ``speaker_embedding`` is ``[256]`` for TSE."""
        model, speaker = self.manifest.model, {}
        for index, (weight, bias) in enumerate(self._speaker_layers):
            if speaker_embedding is None:
                raise ValueError("target speech extraction needs a speaker embedding")
            # What a speaker layer multiplies and adds is the same for a whole session, and so no part of the graph.
            modulation = weight.astype(np.float32) @ speaker_embedding + bias.astype(np.float32)
            parts = modulation.reshape(2, model.framing.bins, model.on_device.channels)
            speaker[f"speaker_weight_{index}"], speaker[f"speaker_bias_{index}"] = parts
        return CheckedEngine(OnnxStream(self._graph, model, speaker))
