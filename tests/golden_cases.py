"""The parity vectors of ``tests/golden``: what the published computation gives."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knowledge_boosting.models.checkpoint import read_checkpoint
from knowledge_boosting.models.pair import BoostedPair
from knowledge_boosting.models.published import config_from_published

FOLDER = Path(__file__).parent / "golden"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/io.npz"))
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Golden:
    """One case, its arrays in our layout."""

    folder: Path
    pair: BoostedPair
    mixture: Tensor  # [B, M, N]
    speaker_embedding: Tensor | None  # [B, 256]
    large_output: Tensor  # [B, S, M, N]
    large_embedding: Tensor  # [B, T, F, 2S']
    hint: Tensor  # [B, T, channels, F]
    small_output: Tensor  # [B, S, M, N]
    small_output_without_hints: Tensor  # [B, S, M, N]


@torch.inference_mode(False)  # whoever asks first, others may want gradients
def load(name: str) -> Golden:
    folder = FOLDER / name
    config = config_from_published(json.loads((folder / "config.json").read_text()), name)
    pair = read_checkpoint(folder / "joint.ckpt", config)
    assert isinstance(pair, BoostedPair)
    arrays = {key: torch.from_numpy(value) for key, value in np.load(folder / "io.npz").items()}
    return Golden(
        folder=folder,
        pair=pair,
        mixture=arrays["mixture"],
        speaker_embedding=arrays.get("speaker_embedding"),
        large_output=arrays["large_output"],
        large_embedding=arrays["large_embedding"].permute(0, 3, 2, 1),
        hint=arrays["hint"].permute(0, 3, 1, 2),
        small_output=arrays["small_output"],
        small_output_without_hints=arrays["small_output_without_hints"],
    )


def worst(actual: Tensor | NDArray[np.float32], expected: Tensor | NDArray[np.float32]) -> float:
    """Largest absolute difference of two arrays of equal shape."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert torch.isfinite(actual).all()
    return float((actual - expected).abs().max())
