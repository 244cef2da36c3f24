"""Stacks the states of many streams, so that one step of a network can process any of them together."""

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning
from torch.nn import functional

from knowledge_boosting.models.layers import AttentionCache
from knowledge_boosting.models.pair import LargeModel, LargeState
from knowledge_boosting.models.tfgridnet import SpeakerModulation

Node = TypeVar("Node")


class StateSlots:
    """The states of up to ``count`` streams through a large network, and the steps that advance them.

    Everything except the attention rings is small, so a step gathers it and scatters it back. In the rings it writes
    one row in place.
    """

    def __init__(self, model: LargeModel, count: int, speaker_embedding: Tensor | None = None) -> None:
        """Make empty slots. ``speaker_embedding`` is any embedding ``[1, 256]``, for a network that needs one."""
        self._model, self._count = model, count
        self._first = model.initial_state(1, speaker_embedding)
        self._stacked = _empty(self._first, count + 1)  # the last slot belongs to no stream and fills up steps
        self._tensors = _tensors(self._stacked)
        self._traces: dict[int, Callable[..., Tensor]] = {}

    def put(self, slot: int, state: LargeState) -> None:
        """Put the state ``[1, ...]`` of a stream into a slot, and overwrite its old content completely."""
        for own, new in zip(self._tensors, _tensors(state), strict=True):
            own[slot] = new[0]

    def prepare(self, lengths: Iterable[int]) -> None:
        """Trace steps of these numbers of frames before the first stream. This is implemented only for the CPU.

        A traced step runs without Python. In Python, it would consist of a hundred small parts, each of which would
        wait for the interpreter lock. The first step of each size takes several times as long as later ones, because
        torch prepares and caches data for it; that also happens here.
        """
        if self._tensors[0].device.type != "cpu":
            return
        framing, slots = self._model.config.framing, torch.arange(_TRACED_STREAMS).clamp(max=self._count)
        step = _Step(self._model, self._stacked)
        # The tracer warns of values that become constants; none of them depends on the streams. The filters are not
        # restored afterwards. They are global, and another thread could restore them at the wrong time.
        warnings.filterwarnings("ignore", category=TracerWarning)
        warnings.filterwarnings("ignore", r"`torch\.jit", DeprecationWarning)
        with torch.no_grad():
            for frames in lengths:
                samples = torch.zeros(
                    _TRACED_STREAMS, self._model.config.microphones, framing.chunk * frames + framing.lookahead
                )
                trace: Any = torch.jit.trace(step, (samples, slots), check_trace=False)
                # The first calls optimise the trace, which takes some time.
                for streams in (1, _TRACED_STREAMS, 2):
                    trace(samples[:streams], slots[:streams])
                self._traces[frames] = trace
                for size in sorted({step_size(streams + 1) for streams in range(self._count)}):
                    samples = samples[:1].expand(size, -1, -1).contiguous()
                    began = time.perf_counter()
                    trace(samples, torch.full((size,), self._count))
                    if time.perf_counter() - began > _MAX_STEP_SECONDS:
                        break

    def step(self, samples: Tensor, slots: Tensor) -> Tensor:
        """Advance the streams in slots ``[B]`` by T frames.

        Args:
            samples: ``[B, M, chunk T + lookahead]``.
            slots: ``[B]``, different slots.

        Returns:
            Hints ``[B, T, hint channels, F]``.
        """
        framing, streams = self._model.config.framing, len(slots)
        fill = step_size(streams) - streams
        if fill:
            samples = functional.pad(samples, (0, 0, 0, 0, 0, fill))
            slots = functional.pad(slots, (0, fill), value=self._count)
        trace = self._traces.get((samples.shape[2] - framing.lookahead) // framing.chunk)
        if trace is not None:
            return trace(samples, slots)[:streams]
        return _step(self._model, self._stacked, samples, slots)[:streams]


def step_size(streams: int) -> int:
    """Round a number of streams up to the size of a step: 1, 2, ... 7, 8, 10, 12, 14, 16, 20, ..., four an octave.

    Every size costs memory and a slow first step, so there are few. They are close enough that little is computed in
    vain.
    """
    spacing = max(1, 1 << (streams - 1).bit_length() >> 3)
    return -(-streams // spacing) * spacing


_MAX_STEP_SECONDS = 0.1  # a longer step is useless in real time, so no larger steps are prepared
_TRACED_STREAMS = 3  # streams in the example input of a trace; the trace works for any number


class _Step(nn.Module):
    """A step in a form that can be traced.

    The states are buffers and not arguments. A trace releases every argument to Python after its last use, and waits
    for the interpreter lock each time.
    """

    def __init__(self, model: LargeModel, stacked: LargeState) -> None:
        super().__init__()
        self._model, self._stacked = model, stacked
        for number, tensor in enumerate(_tensors(stacked)):
            self.register_buffer(f"state{number}", tensor)

    def forward(self, samples: Tensor, slots: Tensor) -> Tensor:
        parts = iter([self.get_buffer(f"state{number}") for number in range(len(_tensors(self._stacked)))])
        return _step(self._model, _map(self._stacked, lambda _: next(parts)), samples, slots)


def _step(model: LargeModel, stacked: LargeState, samples: Tensor, slots: Tensor) -> Tensor:
    hints, _, state = model(samples, _take(stacked, slots))
    _store(stacked, slots, state)
    return cast("Tensor", hints)


def _empty(like: LargeState, count: int) -> LargeState:
    return _map(like, lambda tensor: tensor.new_zeros(count, *tensor.shape[1:]))


def _map(node: Node, function: Any) -> Node:
    if isinstance(node, Tensor):
        return cast("Node", function(node))
    if isinstance(node, tuple):
        return cast("Node", tuple(_map(item, function) for item in node))
    if is_dataclass(node):
        parts = {field.name: _map(getattr(node, field.name), function) for field in fields(node)}
        return cast("Node", replace(cast("Any", node), **parts))
    return node


def _tensors(node: object) -> list[Tensor]:
    found: list[Tensor] = []

    def add(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map(node, add)
    return found


def _take(node: Node, slots: Tensor) -> Node:
    if isinstance(node, AttentionCache):
        return cast("Node", replace(node, streams=slots))
    if isinstance(node, Tensor):
        return cast("Node", node.index_select(0, slots))
    if isinstance(node, tuple):
        return cast("Node", tuple(_take(item, slots) for item in node))
    if is_dataclass(node):
        parts = {field.name: _take(getattr(node, field.name), slots) for field in fields(node)}
        return cast("Node", replace(cast("Any", node), **parts))
    return node


def _store(own: object, slots: Tensor, new: object) -> None:
    if isinstance(own, AttentionCache | SpeakerModulation):
        return  # written in place, or constant
    if isinstance(own, Tensor):
        own.index_copy_(0, slots, cast("Tensor", new))
    elif isinstance(own, tuple):
        for mine, theirs in zip(own, cast("tuple[object, ...]", new), strict=True):
            _store(mine, slots, theirs)
    elif is_dataclass(own):
        for field in fields(own):
            _store(getattr(own, field.name), slots, getattr(new, field.name))
