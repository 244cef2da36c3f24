"""How networks learn in few updates what to listen for.

By the small network's loss alone, fusion is noise to it at first, and thousands of updates go by before late hints are
of any use. Guidance tells every fusion directly what hints are good for: from what it is about to add, a linear layer,
used in training only, must find the sources' shares of every time-frequency bin. With *ideal hints*, made from the true
sources, this is learned faster yet, and without a large network. Of a network alone, guidance asks the same of the
features themselves, after every block but the first: SI-SDR tells a network that extracts the wrong speaker, or none,
next to nothing of what to change.
"""

from functools import partial
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from knowledge_boosting.models.framing import Stft, pad_to_frames
from knowledge_boosting.models.layers import HintFusion, prelu
from knowledge_boosting.models.pair import SmallModel

IDEAL_GAIN = 4.0  # trained large networks, free in scale, were found to give about this times the sources' spectra


def source_spectra(stft: Stft, sources: Tensor) -> Tensor:
    """Complex spectra ``[B, T, F, S, M]`` of sources ``[B, S, M, N]``."""
    count, microphones = sources.shape[1:3]
    spectrum = stft.analyse(pad_to_frames(sources.flatten(1, 2), stft.framing))
    real, imaginary = spectrum.unflatten(-1, (2, count, microphones)).unbind(-3)
    return torch.complex(real, imaginary)


def ideal_embedding(spectra: Tensor) -> Tensor:
    """What a perfect large network would give, ``[B, T, F, 2S']``, of source spectra ``[B, T, F, S, M]``.

    The source that is stronger at the left ear comes first, as large networks were found to order them.
    """
    if spectra.shape[3] > 1:
        level = spectra.abs().square().sum((1, 2)).clamp_min(1e-12).log()  # [B, S, M]
        order = (level[..., 0] - level[..., -1]).argsort(dim=1, descending=True)
        spectra = spectra.gather(3, order[:, None, None, :, None].expand_as(spectra))
    return IDEAL_GAIN * torch.view_as_real(spectra).flatten(-3)


class Guidance(nn.Module):
    """A linear layer for each fusion of a small network, or each block but the first of a network alone."""

    def __init__(self, model: SmallModel) -> None:
        super().__init__()
        config, network = model.config, model.network
        self._sources, self._microphones = config.sources, config.microphones
        self._features: list[Tensor] = []
        guided = list(network.fusion) or list(network.blocks)[1:]
        for module in guided:
            if isinstance(module, HintFusion):
                module.merge.register_forward_hook(partial(self._record_fusion, module))
            else:
                module.register_forward_hook(lambda m, _, output: self._record_features(m, output[0]))
        self.heads = nn.ModuleList(
            nn.Linear(config.on_device.channels, config.sources * config.microphones) for _ in guided
        )

    def _record_fusion(self, fusion: HintFusion, merge: nn.Module, _: Any, merged: Tensor) -> None:
        # What the normalisation gets that fusion ends with.
        self._record_features(merge, prelu(merged, fusion.slope_merge))

    def _record_features(self, module: nn.Module, features: Tensor) -> None:
        if module.training:
            self._features.append(functional.layer_norm(features, features.shape[-2:]))

    def reset(self) -> None:
        """Call before the network runs."""
        self._features.clear()

    def loss(self, spectra: Tensor, mixture: Tensor) -> Tensor:
        """Cross-entropy of the sources' shares of each bin, loud bins counting for more; after the network has run.

        Args:
            spectra: of the sources, complex ``[B, T, F, S, M]``.
            mixture: spectrum of the mixture, complex ``[B, T, F, M]``.
        """
        power = spectra.abs().square()
        share = power / (power + (mixture[..., None, :] - spectra).abs().square() + 1e-8)
        weight = mixture.abs()[..., None, :]
        weight = weight / weight.mean((1, 2), keepdim=True).clamp_min(1e-8)
        total = spectra.new_zeros((), dtype=share.dtype)
        for head, heard in zip(self.heads, self._features, strict=True):
            found = head(heard).unflatten(-1, (self._sources, self._microphones))
            # The large network chooses which source comes first; the order that fits best is taken for its choice.
            losses = [
                (
                    functional.binary_cross_entropy_with_logits(found[..., list(order), :], share, reduction="none")
                    * weight
                )
                .flatten(1)
                .mean(1)
                for order in permutations(range(self._sources))
            ]
            total = total + torch.stack(losses).amin(0).mean()
        return total
