"""Builds the C++ libraries for every instruction set of this processor, for tests."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from knowledge_boosting.models.compiled import TRAINING, Library, library

needs_compiler = pytest.mark.skipif(library() is None, reason="no usable C++ compiler, torch is used instead")


def builds() -> dict[str, str]:
    """Return the instruction sets of this processor, with the name of each for the compiler flag -march."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {"NEON": "native"}
    capability = torch.backends.cpu.get_cpu_capability()
    found = {"SSE": "x86-64"}
    if capability in ("AVX2", "AVX512"):
        found["AVX2"] = "x86-64-v3"
    if capability == "AVX512":
        found["AVX-512"] = "x86-64-v4"
    return found


def set_build(instructions: str, monkeypatch: pytest.MonkeyPatch, wanted: Library = TRAINING) -> None:
    """Use the library that is compiled for these instructions."""
    monkeypatch.setenv("CXXFLAGS", f"-march={builds()[instructions]}")
    compiled = library(wanted)
    assert compiled is not None
    assert compiled.instructions().decode() == instructions


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def outcome(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the outputs, and the gradients of a random weighted sum of them."""
    generator = torch.Generator().manual_seed(1)
    total = sum((torch.randn(output.shape, generator=generator) * output).sum() for output in outputs)
    assert isinstance(total, Tensor)
    return [*(output.detach() for output in outputs), *torch.autograd.grad(total, inputs)]


def assert_near(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Check that each tensor differs by at most 1e-5 of its largest value, or 1e-5 if that value is below 1."""
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1.0, float(other.abs().max())))
