"""Identification: an additional training loss for target speech extraction, which teaches a network to know voices.

To extract a speaker, a network must know which of the voices that it hears is like the speaker embedding. With the loss
of extraction alone, it has to find out at the same time what in a voice to look at, and what to compare it with.
Identification trains the first of these directly: linear layers, used only in training, must tell from the features
before each modulation by the speaker embedding whose voice is in every time-frequency bin, as the main components of
the embedding of that speaker. A modulation can then compare these with those of the target.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from knowledge_boosting.models.pair import SmallModel

COMPONENTS = 8  # of a whitened embedding; the first ones tell most about a voice


class Identification(nn.Module):
    """The linear layers, one for each block that a modulation follows."""

    def __init__(self, model: SmallModel) -> None:
        super().__init__()
        self._features: list[Tensor] = []
        blocks = list(model.network.blocks)[:-1]
        for block in blocks:
            block.register_forward_hook(self._record)
        self.heads = nn.ModuleList(nn.Linear(model.network.channels, COMPONENTS) for _ in blocks)

    def _record(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if module.training:
            self._features.append(functional.layer_norm(output[0], output[0].shape[-1:]))

    def loss(self, embeddings: Tensor, spectra: Tensor, mixture: Tensor) -> Tensor:
        """Return the mean squared error of the components, summed over the layers. The network must have run before.

        Every bin is weighted by the magnitude of the mixture, and every speaker in it by the share of its power.

        Args:
            embeddings: the whitened embeddings of the targets, ``[B, 256]``. Each mixture is there twice, one after the
                other, with each of its speakers as the target.
            spectra: the spectra of the targets, complex ``[B, T, F, 1, M]``.
            mixture: the spectrum of the mixture, complex ``[B, T, F, M]``.
        """
        target = embeddings[:, -COMPONENTS:].flip(1)
        speakers = torch.stack([target, target.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)], dim=1)  # [B, 2, C]
        power = spectra.abs().square().sum((3, 4))
        other = power.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        shares = torch.stack([power, other], dim=-1) / (power + other + 1e-8)[..., None]  # [B, T, F, 2]
        weights = mixture.abs().mean(-1, keepdim=True)
        weights = shares * weights / weights.mean((1, 2), keepdim=True).clamp_min(1e-8)
        total = spectra.real.new_zeros(())
        for head, features in zip(self.heads, self._features, strict=True):
            errors = (head(features)[..., None, :] - speakers[:, None, None]).square().mean(-1)  # [B, T, F, 2]
            total = total + (errors * weights).sum(-1).mean()
        self._features.clear()
        return total
