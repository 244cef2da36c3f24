"""Guidance: an additional training loss, with which networks learn to use hints or a speaker embedding in few updates.

With the loss of the small network alone, the output of fusion is noise at first, and it takes thousands of updates
until delayed hints are useful. Guidance trains every fusion directly. A linear layer, used only in training, takes what
fusion adds to the features, and must predict the share of each source in every time-frequency bin. With *ideal hints*,
which are computed from the true sources, this is learned even faster, and needs no large network. For a network alone,
guidance trains the features after every block except the first in the same way. SI-SDR gives a network that extracts
the wrong speaker, or none, hardly any information about what to change.
"""

from functools import partial
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from knowledge_boosting.models.framing import Stft, pad_to_frames
from knowledge_boosting.models.layers import Fusion, prelu
from knowledge_boosting.models.pair import SmallModel

# The scale of a large network's output is arbitrary. Trained ones were found to give about 4 times the source spectra.
IDEAL_GAIN = 4.0


def source_spectra(stft: Stft, sources: Tensor) -> Tensor:
    """Return the complex spectra ``[B, T, F, S, M]`` of sources ``[B, S, M, N]``."""
    count, microphones = sources.shape[1:3]
    spectrum = stft.analyse(pad_to_frames(sources.flatten(1, 2), stft.framing))
    real, imaginary = spectrum.unflatten(-1, (2, count, microphones)).unbind(-3)
    return torch.complex(real, imaginary)


def in_order_of(embedding: Tensor, spectra: Tensor) -> Tensor:
    """Return the spectra of sources ``[B, T, F, S, M]`` in the order in which a spectral estimate has them.

    Args:
        embedding: the spectral estimate of a large network, ``[B, T, F, 2S']``.
        spectra: the spectra.
    """
    count, microphones = spectra.shape[3:]
    pairs = embedding.float().unflatten(-1, (count, microphones, 2))
    estimates = torch.complex(*pairs.unbind(-1))
    scale = (
        estimates.abs().square().sum((1, 2, 4)).sqrt()[:, :, None]
        * spectra.abs().square().sum((1, 2, 4)).sqrt()[:, None]
    )
    likeness = torch.einsum("btfsm,btfkm->bsk", estimates.conj(), spectra).abs() / scale.clamp_min(1e-12)
    orders = list(permutations(range(count)))
    scores = torch.stack([likeness[:, range(count), order].sum(1) for order in orders], dim=1)
    chosen = torch.tensor(orders, device=spectra.device)[scores.argmax(1)]  # [B, S]
    return spectra.gather(3, chosen[:, None, None, :, None].expand_as(spectra))


def ideal_embedding(spectra: Tensor) -> Tensor:
    """Return the spectral estimate ``[B, T, F, 2S']`` of a perfect large network, from spectra ``[B, T, F, S, M]``.

    The source that is stronger at the left ear comes first, because trained large networks use this order.
    """
    if spectra.shape[3] > 1:
        level = spectra.abs().square().sum((1, 2)).clamp_min(1e-12).log()  # [B, S, M]
        order = (level[..., 0] - level[..., -1]).argsort(dim=1, descending=True)
        spectra = spectra.gather(3, order[:, None, None, :, None].expand_as(spectra))
    return IDEAL_GAIN * torch.view_as_real(spectra).flatten(-3)


class Guidance(nn.Module):
    """The linear layers of guidance: one for each fusion, or in a network alone for each block except the first."""

    def __init__(self, model: SmallModel) -> None:
        super().__init__()
        config, network = model.config, model.network
        self._sources, self._microphones = config.sources, config.microphones
        self._features: list[Tensor] = []
        guided = list(network.fusion) or list(network.blocks)[1:]
        for module in guided:
            if isinstance(module, Fusion):
                module.merge.register_forward_hook(partial(self._record_fusion, module))
            else:
                module.register_forward_hook(lambda m, _, output: self._record_features(m, output[0]))
        self.heads = nn.ModuleList(
            nn.Linear(config.on_device.channels, config.sources * config.microphones) for _ in guided
        )

    def _record_fusion(self, fusion: Fusion, merge: nn.Module, _: Any, merged: Tensor) -> None:
        # This is the input of the normalisation at the end of the fusion.
        self._record_features(merge, prelu(merged, fusion.slope_merge))

    def _record_features(self, module: nn.Module, features: Tensor) -> None:
        if module.training:
            self._features.append(functional.layer_norm(features, features.shape[-2:]))

    def reset(self) -> None:
        """Delete the recorded features. Call this before the network runs."""
        self._features.clear()

    def loss(self, spectra: Tensor, mixture: Tensor, *, ordered: bool) -> Tensor:
        """Return the cross-entropy of the shares of the sources in each bin. Call this after the network has run.

        Every bin is weighted by the magnitude of the mixture.

        Args:
            spectra: the spectra of the sources, complex ``[B, T, F, S, M]``.
            mixture: the spectrum of the mixture, complex ``[B, T, F, M]``.
            ordered: whether the sources are in the order of the hints. Otherwise the order with the smallest loss is
                used. At first, when no order is better than another, the gradients of the orders cancel.
        """
        power = spectra.abs().square()
        share = power / (power + (mixture[..., None, :] - spectra).abs().square() + 1e-8)
        weight = mixture.abs()[..., None, :]
        weight = weight / weight.mean((1, 2), keepdim=True).clamp_min(1e-8)
        orders = list(permutations(range(self._sources)))[: 1 if ordered else None]
        total = spectra.new_zeros((), dtype=share.dtype)
        for head, features in zip(self.heads, self._features, strict=True):
            logits = head(features).unflatten(-1, (self._sources, self._microphones))
            losses = [
                (
                    functional.binary_cross_entropy_with_logits(logits[..., list(order), :], share, reduction="none")
                    * weight
                )
                .flatten(1)
                .mean(1)
                for order in orders
            ]
            total = total + torch.stack(losses).amin(0).mean()
        return total
