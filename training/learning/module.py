"""The computations of one step of training, validation and test."""

from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor, nn

from knowledge_boosting.common.errors import Failure
from knowledge_boosting.models.arrival_fusion import NEVER
from knowledge_boosting.models.checkpoint import OUTPUT_GAIN, TRAINING_SPEAKERS, read_weights
from knowledge_boosting.models.config import SPEAKER_EMBEDDING_SIZE
from knowledge_boosting.models.framing import pad_to_frames
from knowledge_boosting.models.pair import BoostedPair, LargeModel, SmallModel
from knowledge_boosting.training.config import StoredData, TrainingConfig
from knowledge_boosting.training.data.dynamic_mixing import render
from knowledge_boosting.training.data.hint_arrivals import draw_arrivals
from knowledge_boosting.training.data.loading import Batch
from knowledge_boosting.training.data.stored_hints import STORED_LARGE, large_digest
from knowledge_boosting.training.evaluation.metrics import METRICS, USUAL_METRICS, si_sdr_improvement
from knowledge_boosting.training.evaluation.si_sdr import match_sources
from knowledge_boosting.training.learning.guidance import (
    IDEAL_GAIN,
    Guidance,
    ideal_embedding,
    in_order_of,
    source_spectra,
)
from knowledge_boosting.training.learning.losses import level_error, negative_si_sdr
from knowledge_boosting.training.learning.separation import Separation
from knowledge_boosting.training.learning.speaker_whitening import SpeakerWhitening
from knowledge_boosting.training.weights import initial_model, initial_speakers, load_if_it_fits

MONITOR = "validation/si_sdri"


class TrainingModule(lightning.LightningModule):
    """A pair, which is trained for the output of its small network only, or one network alone.

    Its checkpoints store the weights under ``model.small.…`` and ``model.large.…``.
    """

    def __init__(self, config: TrainingConfig) -> None:
        """Build the networks, and load the initial weights that the configuration names.

        Raises:
            InputError: a checkpoint cannot be used.
        """
        super().__init__()
        self.config = config
        self.model = initial_model(config)
        # Gains by part, for every source and microphone. Validation measures them, because the loss does not depend on
        # the level and the sign of the output.
        self.output_gain: dict[str, list[float]] = {}
        self._products: dict[str, Tensor] = {}
        # All speakers whose speech affected the weights; the model must be measured on others.
        self.training_speakers = initial_speakers(config)
        if config.freeze_large:
            self.pair.large.network.requires_grad_(False)
        # The digest is computed before whitening changes the speaker layers.
        self.stored_large: str | None = None
        if isinstance(config.train, StoredData):
            self.stored_large = large_digest(config.model, self.pair.large.network)
        self.guidance = Guidance(self._small) if config.guidance else None
        earlier = config.initial_checkpoint
        if self.guidance is not None and earlier is not None and Path(earlier).is_file():  # a bundle has no such layers
            load_if_it_fits(self.guidance, read_weights(Path(earlier), "guidance"), Path(earlier))
        self.separation = Separation(self._small) if config.separation else None
        source = config.warm_start or config.initial_checkpoint
        if self.separation is not None and source is not None and Path(source).is_file():
            self.separation.start_from(Path(source))
        self.whitening = SpeakerWhitening() if config.speaker_components else None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[TRAINING_SPEAKERS] = sorted(self.training_speakers)
        checkpoint[OUTPUT_GAIN] = self.output_gain
        if self.stored_large is not None:
            checkpoint[STORED_LARGE] = self.stored_large

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.training_speakers |= set(checkpoint.get(TRAINING_SPEAKERS, ()))
        self.output_gain = checkpoint.get(OUTPUT_GAIN, {})

    @property
    def pair(self) -> BoostedPair:
        """The pair. The configuration must be that of a pair."""
        assert isinstance(self.model, BoostedPair)
        return self.model

    @property
    def _small(self) -> SmallModel:
        small = self.model.get_submodule("small")
        assert isinstance(small, SmallModel)
        return small

    def whiten_speakers(self, embeddings: Tensor) -> None:
        """Fit the whitening to embeddings ``[N, 256]``, and use it. Call this before the first step."""
        assert self.whitening is not None
        self.whitening.fit(embeddings, self.config.speaker_components)
        for part in self.model.children():
            assert isinstance(part, SmallModel | LargeModel)
            self.whitening.compensate(part.network)

    def estimates(self, batch: Batch, ready_at: Tensor | None = None) -> dict[str, Tensor]:
        """Return the estimates ``[B, S, M, N]`` of the trained network, ``small``, and for a pair also ``large``.

        Args:
            batch: a rendered batch.
            ready_at: when hints are ready for use, see :meth:`BoostedPair.forward`.
        """
        mixture, speaker = batch["mixture"], batch.get("speaker_embedding")
        if isinstance(self.model, BoostedPair):
            output = self.model(mixture, speaker, ready_at)
            return {"small": output.small, "large": output.large}
        samples = pad_to_frames(mixture, self.config.model.framing)
        estimate, _ = self._small(samples, self._small.initial_state(len(mixture), speaker))
        return {"small": estimate[..., : mixture.shape[-1]]}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        # Dynamic mixtures are rendered on the training device.
        with torch.autocast(self.device.type, enabled=False):
            rendered = render(batch)
        if self.whitening is not None:
            rendered["speaker_embedding"] = self.whitening(rendered["speaker_embedding"])
            if self.training and self.config.speaker_noise:
                rendered["speaker_embedding"] += self._speaker_noise(len(rendered["speaker_embedding"]))
        return rendered

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        ready_at = self._ready_at(batch["mixture"])
        if self.guidance is not None:
            self.guidance.reset()
        estimate, embedding = self._small_estimate(batch, ready_at)
        loss = negative_si_sdr(estimate.float(), batch["sources"], self.config.permutation)
        if not torch.isfinite(loss):
            raise Failure(
                f"the loss is {loss.item()} at step {self.global_step}, on {', '.join(batch['names'])}; "
                "check these items, or lower learning_rate"
            )
        self.log("train/loss", loss, prog_bar=True, batch_size=len(estimate))
        if self.config.level_weight:
            error = level_error(estimate.float(), batch["sources"])
            self.log("train/level_error", error, batch_size=len(estimate))
            loss = loss + self.config.level_weight * error
        if self.separation is not None:
            separation = self.separation.loss(batch["sources"], batch["mixture"])
            self.log("train/separation", separation, batch_size=len(estimate))
            loss = loss + self.config.separation * separation
        if self.guidance is not None:
            stft = self._small.stft
            mixture = source_spectra(stft, batch["mixture"][:, None])[..., 0, :]
            spectra = source_spectra(stft, batch["sources"])
            if embedding is not None:
                spectra = in_order_of(embedding, spectra)
            guidance = self.guidance.loss(spectra, mixture, ordered=embedding is not None)
            self.log("train/guidance", guidance, batch_size=len(estimate))
            loss = loss + self.config.guidance * guidance
        return loss

    def _small_estimate(self, batch: Batch, ready_at: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the estimate of the trained network, and of a pair the spectral estimate of the large network.

        The large network runs only if its hints are needed.
        """
        if self.config.ideal_hints:
            embedding = self._ideal_embedding(batch)
        elif "embedding" in batch:
            embedding = batch["embedding"]
        elif isinstance(self.model, BoostedPair):
            output = self.model(batch["mixture"], batch.get("speaker_embedding"), ready_at)
            return output.small, output.embedding
        else:
            return self.estimates(batch, ready_at)["small"], None
        hints = self.pair.large.encode(embedding)
        return self.pair.estimate_small(batch["mixture"], hints, batch.get("speaker_embedding"), ready_at), embedding

    def _ideal_embedding(self, batch: Batch) -> Tensor:
        """Return the spectral estimate of a perfect large network."""
        large = self.pair.large
        embedding = ideal_embedding(source_spectra(large.stft, batch["sources"]))
        if large.level is not None:
            # With a running level, a large network gives its estimate at the reference level, without its own gain.
            spectrum = large.stft.analyse(pad_to_frames(batch["mixture"], self.config.model.framing))
            embedding = embedding / (IDEAL_GAIN * large.level(spectrum, spectrum.new_zeros(len(spectrum))).scale)
        return embedding

    def _speaker_noise(self, batch: int) -> Tensor:
        """Return noise ``[B, 256]`` for the speaker embeddings, which makes a few speakers act like many."""
        components = self.config.speaker_components
        noise = self._rng(1).normal(0, self.config.speaker_noise, (batch, components)).astype(np.float32)
        # The principal components are the last ones.
        before = SPEAKER_EMBEDDING_SIZE - components
        return nn.functional.pad(torch.from_numpy(noise), (before, 0)).to(self.device)

    def _rng(self, *what: int) -> np.random.Generator:
        """Return a random generator for one purpose.

        It depends only on seed, step and device, so a resumed run draws the same values.
        """
        return np.random.default_rng([self.config.seed, self.global_step, self.global_rank, *what])

    def _ready_at(self, mixture: Tensor) -> Tensor | None:
        """Draw when the hints of each example are ready, ``[B, T]``. None if all are in time for a fixed delay."""
        model, rng = self.config.model, self._rng()
        if not self.config.hint_dropout and not model.on_arrival:
            return None
        batch, frames = len(mixture), model.framing.frames(mixture.shape[-1])
        lost = torch.from_numpy(rng.random((batch, 1)) < self.config.hint_dropout)
        ready_at = torch.zeros(batch, frames, dtype=torch.long)
        if model.on_arrival:
            ready_at = torch.stack([draw_arrivals(rng, frames, model) for _ in range(batch)])
        return ready_at.masked_fill(lost, NEVER).to(self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        estimates = self.estimates(batch)
        for name, estimate in estimates.items():
            figure = si_sdr_improvement(estimate.float(), batch["sources"], batch["mixture"]).mean()
            key = MONITOR if name == "small" else f"{MONITOR}_{name}"
            self.log(key, figure, prog_bar=True, sync_dist=True, batch_size=len(estimate))
            sources = match_sources(batch["sources"], estimate.float())
            pairs = ((estimate, sources), (estimate, estimate), (sources, sources))
            products = torch.stack([(one * other).sum((0, 3)) for one, other in pairs])  # [3, S, M]
            self._products[name] = self._products.get(name, torch.zeros_like(products)) + products
        if batch_idx == 0:
            self._log_audio(batch, estimates)

    def on_validation_epoch_end(self) -> None:
        for name, products in self._products.items():
            gathered = self.all_gather(products)
            assert isinstance(gathered, Tensor)
            with_source, estimated, wanted = gathered.view(-1, *products.shape).sum(0).flatten(1)
            # The gain gives the estimate the energy of the source. A least-squares gain would attenuate bad estimates.
            gain = with_source.sign() * (wanted / estimated).sqrt()
            self.output_gain[name] = torch.where(gain.isfinite() & (gain != 0), gain, 1.0).tolist()
        self._products.clear()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        references, mixture = batch["sources"], batch["mixture"]
        for name, estimate in self.estimates(batch).items():
            for metric in USUAL_METRICS:
                values = METRICS[metric].measure(estimate, references, mixture)
                self.log(f"test/{name}_{metric}", values.nanmean(), sync_dist=True, batch_size=len(estimate))

    def configure_optimizers(self) -> Any:
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        optimiser = torch.optim.Adam(weights, lr=self.config.learning_rate)
        schedule = self.config.schedule
        if schedule.kind == "cosine":
            steps = int(self.trainer.estimated_stepping_batches)
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=schedule.minimum)
            return {"optimizer": optimiser, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimiser, mode="max", patience=schedule.patience, factor=schedule.factor, min_lr=schedule.minimum
        )
        # A run that is stopped in its first epoch has no figure to monitor.
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": plateau, "monitor": MONITOR, "strict": False}}

    def _log_audio(self, batch: Batch, estimates: dict[str, Tensor]) -> None:
        """Log the left channels of the first example for listening: mixture, sources and estimates."""
        add_audio = getattr(getattr(self.logger, "experiment", None), "add_audio", None)
        if add_audio is None or self.trainer.sanity_checking:
            return
        signals = {"mixture": batch["mixture"][0, :1]}
        for name, voices in {"source": batch["sources"], **estimates}.items():
            signals |= {f"{name}{number}": voice[:1] for number, voice in enumerate(voices[0], start=1)}
        rate = self.config.model.framing.sample_rate
        for name, signal in signals.items():
            add_audio(f"validation/{name}", signal.float().clamp(-1, 1).cpu(), self.global_step, rate)
