"""The additional loss of target speech extraction, with which a network learns to know voices."""

import pytest
import torch
from torch import Tensor, nn

from knowledge_boosting.models.checkpoint import build
from knowledge_boosting.models.config import MODEL
from knowledge_boosting.models.framing import pad_to_frames
from knowledge_boosting.models.pair import SmallModel
from knowledge_boosting.training.learning.guidance import source_spectra
from knowledge_boosting.training.learning.identification import COMPONENTS, Identification


def network(blocks: int = 3) -> SmallModel:
    torch.manual_seed(0)
    model = build(MODEL.validate_python({"task": "tse", "small": {"channels": 6, "hidden": 5, "blocks": blocks}}))
    small = model.get_submodule("small")
    assert isinstance(small, SmallModel)
    return small


def loss_of(small: SmallModel, identification: Identification, sources: Tensor, embeddings: Tensor) -> Tensor:
    """Return the loss for mixtures of two sources ``[B, 2, M, N]`` and embeddings ``[B, 2, 256]``."""
    mixture = sources.sum(1).repeat_interleave(2, 0)
    speakers = embeddings.flatten(0, 1)
    small(pad_to_frames(mixture, small.config.framing), small.initial_state(len(mixture), speakers))
    spectra = source_spectra(small.stft, sources.flatten(0, 1)[:, None])
    return identification.loss(speakers, spectra, source_spectra(small.stft, mixture[:, None])[..., 0, :])


def set_answer(identification: Identification, answer: Tensor) -> None:
    """Let every layer give the same answer for every bin."""
    for head in identification.heads:
        nn.init.zeros_(head.get_parameter("weight"))
        head.get_parameter("bias").data.copy_(answer)


def test_a_bin_has_the_voice_of_the_speaker_who_is_heard_in_it() -> None:
    small = network()
    identification = Identification(small)
    assert len(identification.heads) == 2
    sources, embeddings = torch.randn(2, 2, 2, 3000), torch.randn(2, 2, 256)
    main = embeddings[..., -COMPONENTS:].flip(2)  # the last components of an embedding are the main ones
    # If one speaker is silent, all bins have the other, whoever of them is the target.
    sources[:, 1] = 0
    set_answer(identification, torch.zeros(COMPONENTS))
    for _ in range(2):  # an earlier run does not count
        loss = loss_of(small, identification, sources, embeddings)
        assert float(loss.detach()) == pytest.approx(2 * float(main[:, 0].square().mean()), rel=1e-3)
    # If both are equally loud in every bin, half of the error is that of each.
    sources[:, 1] = sources[:, 0]
    loss = loss_of(small, identification, sources, embeddings)
    assert float(loss.detach()) == pytest.approx(2 * float(main.square().mean()), rel=1e-3)


def test_the_right_answer_has_no_loss() -> None:
    small = network(blocks=2)
    identification = Identification(small)
    sources, embeddings = torch.randn(1, 2, 2, 3000), torch.randn(1, 2, 256)
    sources[:, 0] = 0
    set_answer(identification, embeddings[0, 1, -COMPONENTS:].flip(0))
    assert float(loss_of(small, identification, sources, embeddings).detach()) == pytest.approx(0, abs=1e-6)
    set_answer(identification, embeddings[0, 0, -COMPONENTS:].flip(0))
    assert float(loss_of(small, identification, sources, embeddings).detach()) > 0.1


def test_it_trains_the_blocks_before_the_last_one() -> None:
    small = network()
    identification = Identification(small)
    loss_of(small, identification, torch.randn(1, 2, 2, 3000), torch.randn(1, 2, 256)).backward()
    trained = [any(weight.grad is not None for weight in block.parameters()) for block in small.network.blocks]
    assert trained == [True, True, False]
