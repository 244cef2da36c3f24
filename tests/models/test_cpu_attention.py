"""The forward and backward pass of self-attention for training on a CPU equal the formulas in torch."""

import pytest
import torch
from torch import Tensor, nn

from knowledge_boosting.models import cpu_attention
from knowledge_boosting.models.layers import AttentionCache, FusionState, HintFusion, SelfAttention, window_of
from tests.models.compiled import assert_near, builds, needs_compiler, outcome, set_build, torch_threads

pytestmark = needs_compiler


def formula(query: Tensor, key: Tensor, value: Tensor, past: tuple[Tensor, Tensor], unseen: Tensor) -> Tensor:
    """Compute attention with a mask over all frames. Returns ``[B, L, T, value size]``."""
    window, steps = past[0].shape[2], query.shape[2]
    keys, values = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
    distance = torch.arange(window + steps) - torch.arange(steps)[:, None]
    seen = (distance >= 1) & (distance <= window)
    seen = seen & (torch.arange(window + steps) >= unseen[:, None, None, None])
    scores = query @ keys.transpose(-1, -2) / query.shape[-1] ** 0.5
    attended: Tensor = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
    return attended


@pytest.mark.parametrize("build", builds())
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("batch", "heads", "steps", "window", "bins", "key", "size"),
    [(2, 4, 25, 10, 9, 6, 8), (1, 1, 2, 50, 3, 1, 1), (3, 2, 6, 1, 5, 2, 3), (1, 3, 130, 50, 2, 12, 4)],
)
def test_attention_equals_its_formula(
    batch: int,
    heads: int,
    steps: int,
    window: int,
    bins: int,
    key: int,
    size: int,
    threads: int,
    build: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_build(build, monkeypatch)
    torch.manual_seed(0)
    shapes = [
        (steps, bins * key),
        (steps, bins * key),
        (steps, bins * size),
        (window, bins * key),
        (window, bins * size),
    ]
    query, keys, values, *past = tensors = [torch.randn(batch, heads, *each, requires_grad=True) for each in shapes]
    unseen = torch.arange(batch) * window // batch
    expected = formula(query, keys, values, (past[0], past[1]), unseen)
    expected = expected.unflatten(-1, (bins, size)).permute(0, 2, 3, 1, 4).flatten(-2)
    with torch_threads(threads):
        actual = cpu_attention.window_attention(query, keys, values, past[0], past[1], unseen, bins)
        assert_near(outcome((actual,), (*tensors,)), outcome((expected,), (*tensors,)))


@pytest.mark.parametrize("build", builds())
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("sections", "residual"),
    [([(4, 6), (4, 6), (4, 8)], False), ([(2, 3), (1, 1)], False), ([(1, 32)], False), ([(1, 32)], True)],
)
def test_norms_of_heads_equal_their_formula(
    sections: list[tuple[int, int]], residual: bool, threads: int, build: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_build(build, monkeypatch)
    torch.manual_seed(0)
    columns = sum(heads * size for heads, size in sections)
    x, added = (torch.randn(2, 5, 7, columns, requires_grad=True) for _ in range(2))
    slope = torch.randn(columns, requires_grad=True)
    scale, shift = (torch.randn(7, columns, requires_grad=True) for _ in range(2))
    activated = torch.where(x > 0, x, x * slope)
    expected = []
    first = 0
    for heads, size in sections:
        own = slice(first, first := first + heads * size)
        each = activated[..., own].unflatten(-1, (heads, size)).transpose(2, 3)  # [B, T, heads, F, size]
        normal = (each - each.mean((3, 4), keepdim=True)) / (each.var((3, 4), correction=0, keepdim=True) + 1e-5).sqrt()
        affine = [part[:, own].unflatten(-1, (heads, size)).transpose(0, 1) for part in (scale, shift)]
        expected.append((normal * affine[0] + affine[1]).transpose(1, 2).flatten(3))
    inputs = [x, slope, scale, shift]
    if residual:
        expected[0] = expected[0] + added.flatten(2)[:, None]
        inputs.append(added)
    with torch_threads(threads):
        actual = cpu_attention.normalised_heads(x, sections, slope, scale, shift, added if residual else None)
        assert_near(outcome((*actual,), (*inputs,)), outcome((*expected,), (*inputs,)))


@pytest.mark.parametrize("steps", [2, 7, 60])
@pytest.mark.parametrize("kind", ["self-attention", "hints"])
def test_layers_are_the_same_with_the_library_and_without(
    kind: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare output, next state and the gradients of all weights, for streams at different frames."""
    torch.manual_seed(0)
    bins, window, channels = 5, 20, 8
    if kind == "hints":
        fusion = HintFusion(channels, bins, 2, window, 3, 2)
        layer: HintFusion | SelfAttention = fusion
        like = fusion.initial_state(2).cache
    else:
        layer = attention = SelfAttention(channels, bins, 2, window)
        like = attention.initial_cache(2)
    for weight in layer.parameters():
        nn.init.normal_(weight, std=0.3)
    x, hint, delayed = (torch.randn(2, count, bins, size) for count, size in ((steps, 8), (steps, 3), (2, 8)))
    rings = [torch.randn(ring.shape, requires_grad=True) for ring in (like.keys, like.values)]
    inputs = (x.requires_grad_(), *rings, *layer.parameters())

    def run() -> list[Tensor]:
        frames, cache = window_of(torch.tensor([3, 41]), steps, window), AttentionCache(rings[0], rings[1])
        if isinstance(layer, HintFusion):
            y, state = layer(x, hint, FusionState(delayed, cache), frames)
            cache = state.cache
        else:
            y, cache = layer(x, cache, frames)
        return outcome((y, cache.keys, cache.values), inputs)

    actual = run()
    monkeypatch.setattr(cpu_attention, "fits", lambda *_: False)
    assert_near(actual, run())


def test_unsupported_inputs_are_left_to_torch() -> None:
    assert cpu_attention.fits(torch.zeros(1, 2, 5, 8), 2)
    assert not cpu_attention.fits(torch.zeros(1, 2, 5, 8, dtype=torch.float64), 2)
    assert not cpu_attention.fits(torch.zeros(1, 2, 5, 1025), 2)
    with torch.no_grad():
        assert not cpu_attention.fits(torch.zeros(1, 2, 5, 8), 2)
    with torch.autocast("cpu"):
        assert not cpu_attention.fits(torch.zeros(1, 2, 5, 8), 2)
