"""The small network under ONNX Runtime. This engine does not need torch."""

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
    """The small network of a bundle, which creates sessions."""

    engine = "onnx"

    def __init__(self, bundle: Bundle) -> None:
        """Load and check the graph of a bundle.

        Raises:
            InputError: The bundle cannot be used, or it has no graph.
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
            except Exception as error:  # safetensors raises its own exceptions
                text = (
                    f"{path}: does not contain the weights of this network ({reason(error)}); export the bundle again"
                )
                raise InputError(text) from None

        # A trial step finds the graph of another network, or one with inconsistent sizes, before it is needed.
        model = self.manifest.model
        silence = np.zeros((model.microphones, model.framing.n_fft), np.float32)
        try:
            check_sizes(self._graph)
            speaker = np.zeros(SPEAKER_EMBEDDING_SIZE, np.float32) if model.needs_speaker else None
            estimate = self.session(speaker).step(silence, [])
            if estimate.shape != (model.sources, model.microphones, model.framing.chunk):
                raise ValueError(f"its output has the shape {list(estimate.shape)}")
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            path = bundle.directory / GRAPH_FILE
            text = f"{path}: not the graph of this bundle's network ({reason(error)[:200]}); export the bundle again"
            raise InputError(text) from None

    def session(self, speaker_embedding: Samples | None) -> Engine:
        """Start a session. ``speaker_embedding`` is ``[256]`` for TSE, otherwise None."""
        model, speaker = self.manifest.model, {}
        for index, (weight, bias) in enumerate(self._speaker_layers):
            if speaker_embedding is None:
                raise ValueError("target speech extraction needs a speaker embedding")
            # The factor and the offset of a speaker layer are constant in a session, so they are inputs of the graph.
            modulation = weight.astype(np.float32) @ speaker_embedding + bias.astype(np.float32)
            parts = modulation.reshape(2, model.framing.bins, model.on_device.channels)
            speaker[f"speaker_weight_{index}"], speaker[f"speaker_bias_{index}"] = parts
        return CheckedEngine(OnnxStream(self._graph, model, speaker))
