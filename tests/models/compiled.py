"""The compiled part of training, as any of this processor's instruction sets would have it, for tests."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from knowledge_boosting.models.compiled import library

needs_compiler = pytest.mark.skipif(library() is None, reason="no C++ compiler that serves, torch is used instead")


def builds() -> dict[str, str]:
    """Instruction sets that this processor has, and the compiler's name for what has them."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {"NEON": "native"}
    capability = torch.backends.cpu.get_cpu_capability()
    found = {"SSE": "x86-64"}
    if capability in ("AVX2", "AVX512"):
        found["AVX2"] = "x86-64-v3"
    if capability == "AVX512":
        found["AVX-512"] = "x86-64-v4"
    return found


def set_build(instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the compiled part as a processor with these instructions would have it."""
    monkeypatch.setenv("CXXFLAGS", f"-march={builds()[instructions]}")
    compiled = library()
    assert compiled is not None
    assert compiled.instructions().decode() == instructions


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """A number of torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def outcome(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs, and the gradients of a random weighting of all of them."""
    generator = torch.Generator().manual_seed(1)
    total = sum((torch.randn(output.shape, generator=generator) * output).sum() for output in outputs)
    assert isinstance(total, Tensor)
    return [*(output.detach() for output in outputs), *torch.autograd.grad(total, inputs)]


def assert_near(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Each within 1e-5 of its largest value, or of 1 where that is smaller."""
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1.0, float(other.abs().max())))
