"""Speaker embeddings as target speech extraction learns by them: what tells speakers apart, at one scale.

All d-vectors lie in one corner of their space. A layer that gets them as they are learns what voices have in common
long before what tells one from another. Here they come centred, their principal components at unit variance, the minor
ones left small. Being linear, this is taken into the speaker layers again when a checkpoint is read
(:mod:`models.checkpoint`), so that bundles take embeddings as they are.
"""

from typing import cast

import torch
from torch import Tensor, nn

from knowledge_boosting.models.config import SPEAKER_EMBEDDING_SIZE
from knowledge_boosting.models.tfgridnet import TFGridNet


class SpeakerWhitening(nn.Module):
    """``matrix (e - mean)`` of an embedding ``e``; leaves it as it is until fitted."""

    mean: Tensor  # [256]
    matrix: Tensor  # [256, 256]

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(SPEAKER_EMBEDDING_SIZE))
        self.register_buffer("matrix", torch.eye(SPEAKER_EMBEDDING_SIZE))

    def fit(self, embeddings: Tensor, components: int) -> None:
        """Take the mean and the principal components of embeddings ``[N, 256]``."""
        centred = embeddings.double() - embeddings.double().mean(0)
        variance, directions = torch.linalg.eigh(centred.T @ centred / len(centred))  # ascending
        scale = torch.ones_like(variance)
        scale[-components:] = variance[-components:].clamp_min(1e-6).rsqrt()
        self.mean.copy_(embeddings.double().mean(0))
        self.matrix.copy_((directions * scale).T)

    def forward(self, embedding: Tensor) -> Tensor:
        return (embedding - self.mean) @ self.matrix.T

    @torch.no_grad()
    def compensate(self, network: TFGridNet) -> None:
        """Let a network's speaker layers, which took embeddings as they are, take whitened ones."""
        for layer in cast("list[nn.Linear]", list(network.speaker)):
            layer.bias.add_(layer.weight @ self.mean)
            layer.weight.copy_(torch.linalg.solve(self.matrix.double(), layer.weight.double(), left=False))
