"""The networks in torch. This is the only module of the client that needs torch."""

from collections.abc import Sequence

import torch

from knowledge_boosting.device_client.engines.engine import CheckedEngine, Engine
from knowledge_boosting.models.arrivals import Hint
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.framing import pad_to_frames
from knowledge_boosting.models.networks import load_large, load_small
from knowledge_boosting.models.pair import SmallModel, torch_hints
from knowledge_boosting.protos.codec import Samples


class TorchModel:
    """The small network of a bundle, which creates sessions."""

    engine = "torch"

    def __init__(self, bundle: Bundle) -> None:
        """Load the weights of a bundle.

        Raises:
            InputError: The bundle cannot be used.
        """
        # A frame is too little work to share among threads.
        torch.set_num_threads(1)
        self._model, self.manifest = load_small(bundle), bundle.manifest

    def session(self, speaker_embedding: Samples | None) -> Engine:
        """Start a session. ``speaker_embedding`` is ``[256]`` for TSE, otherwise None."""
        return CheckedEngine(_TorchEngine(self._model, speaker_embedding))


class _TorchEngine:
    @torch.inference_mode()
    def __init__(self, model: SmallModel, speaker_embedding: Samples | None) -> None:
        self._model = model
        self._speaker = _batch(speaker_embedding) if speaker_embedding is not None else None
        self._state = model.initial_state(1, self._speaker)

    @torch.inference_mode()
    def step(self, window: Samples, hints: Sequence[Hint] = ()) -> Samples:
        estimate, self._state = self._model(_batch(window), self._state, torch_hints(self._model.config, hints))
        samples: Samples = estimate[0].numpy()
        return samples

    @torch.inference_mode()
    def reset(self) -> None:
        self._state = self._model.initial_state(1, self._speaker)


def _batch(values: Samples) -> torch.Tensor:
    return torch.from_numpy(values)[None]


@torch.inference_mode()
def large_estimate(bundle: Bundle, mixture: Samples, speaker_embedding: Samples | None) -> Samples:
    """Compute the estimate ``[S, M, N]`` of a bundle's large network for a whole mixture ``[M, N]``.

    Raises:
        InputError: The bundle has no large network, or its file is missing.
    """
    large = load_large(bundle)
    samples = pad_to_frames(_batch(mixture), bundle.model.framing)
    state = large.initial_state(1, _batch(speaker_embedding) if speaker_embedding is not None else None)
    _, embedding, _ = large(samples, state)
    estimate: Samples = large.estimate(embedding)[0, ..., : mixture.shape[-1]].numpy()
    return estimate
