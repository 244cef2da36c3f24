"""Separation: an additional training loss for target speech extraction.

A network that is to extract one speaker must still separate both. If it starts from a network that separates two
speakers, and has only the loss of extraction, it first loses that ability: for a wrong speaker, the mixture is a better
output than a well separated voice. A second output layer, used only in training, estimates both speakers from the
features of the last block, so that these stay separated while the network learns which one to extract.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from knowledge_boosting.models.checkpoint import read_weights
from knowledge_boosting.models.layers import CausalConv2d
from knowledge_boosting.models.pair import SmallModel
from knowledge_boosting.training.evaluation.si_sdr import permuted_si_sdr
from knowledge_boosting.training.weights import load_if_it_fits


class Separation(nn.Module):
    """The output layer for both speakers: the target, and the rest of the mixture."""

    def __init__(self, model: SmallModel) -> None:
        super().__init__()
        self._stft, self._microphones = model.stft, model.config.microphones
        self.output_conv = CausalConv2d(model.network.channels, 2 * model.config.spectrum_channels)
        self._features: Tensor | None = None
        self._gain: Tensor | None = None
        model.network.output_conv.register_forward_pre_hook(self._record_features)
        if model.level is not None:
            model.level.register_forward_hook(self._record_gain)

    def start_from(self, path: Path) -> None:
        """Continue the layer of an earlier run, or take that of a network that separates two speakers.

        Other checkpoints change nothing.

        Raises:
            InputError: the file is no checkpoint, or the layer in it is damaged.
        """
        if load_if_it_fits(self, read_weights(path, "separation"), path):
            return
        separated = {name.removeprefix("small.network."): value for name, value in read_weights(path).items()}
        load_if_it_fits(self, separated, path)

    def _record_features(self, module: nn.Module, inputs: Any) -> None:
        self._features = inputs[0] if module.training else None

    def _record_gain(self, module: nn.Module, inputs: Any, levels: Any) -> None:
        self._gain = levels.gain

    def loss(self, target: Tensor, mixture: Tensor) -> Tensor:
        """Return the negative SI-SDR of both estimates in their best order, dB. Call this after the network has run.

        Args:
            target: the speaker to extract, ``[B, 1, M, N]``.
            mixture: ``[B, M, N]``.
        """
        assert self._features is not None
        batch, _, bins, _ = self._features.shape
        embedding, _ = self.output_conv(self._features, self.output_conv.initial_past(batch, bins))
        if self._gain is not None:
            embedding = embedding * self._gain
        self._features = self._gain = None
        signals = 2 * self._microphones
        samples, _ = self._stft.synthesise(embedding.float(), self._stft.initial_overlap(batch, signals))
        estimates = samples.view(batch, 2, self._microphones, -1)[..., : mixture.shape[-1]]
        references = torch.cat([target, mixture[:, None] - target], dim=1)
        return -permuted_si_sdr(estimates, references, "joint").mean()
