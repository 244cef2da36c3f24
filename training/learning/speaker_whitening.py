"""Whitening of speaker embeddings for training target speech extraction.

All d-vectors lie in a small part of their space. A layer that receives them unchanged learns what speakers have in
common long before it learns their differences. Whitening subtracts the mean and scales the principal components to unit
variance; the minor components stay small. Because it is linear, it can be folded into the speaker layers when a
checkpoint is read (:mod:`models.checkpoint`). So bundles take embeddings without whitening.
"""

from typing import cast

import torch
from torch import Tensor, nn

from knowledge_boosting.models.config import SPEAKER_EMBEDDING_SIZE
from knowledge_boosting.models.tfgridnet import TFGridNet


class SpeakerWhitening(nn.Module):
    """Computes ``matrix (e - mean)`` of an embedding ``e``. Before :meth:`fit` it is the identity."""

    mean: Tensor  # [256]
    matrix: Tensor  # [256, 256]

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(SPEAKER_EMBEDDING_SIZE))
        self.register_buffer("matrix", torch.eye(SPEAKER_EMBEDDING_SIZE))

    def fit(self, embeddings: Tensor, components: int) -> None:
        """Compute mean and matrix from embeddings ``[N, 256]``. ``components`` principal components are scaled."""
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
        """Change the speaker layers of a network so that they give the same output for whitened embeddings."""
        for layer in cast("list[nn.Linear]", list(network.speaker)):
            layer.bias.add_(layer.weight @ self.mean)
            layer.weight.copy_(torch.linalg.solve(self.matrix.double(), layer.weight.double(), left=False))
