"""Stacks the states of many streams, so that one step of a network can process any of them together."""

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from itertools import product
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning
from torch.nn import functional

from knowledge_boosting.common.cli import warn
from knowledge_boosting.models import cpu_step
from knowledge_boosting.models.layers import AttentionCache
from knowledge_boosting.models.pair import LargeModel, LargeState
from knowledge_boosting.models.tfgridnet import SpeakerModulation

Node = TypeVar("Node")


class StateSlots:
    """The states of up to ``count`` streams through a large network, and the steps that advance them.

    Everything except the attention rings is small, so a step gathers it and scatters it back. In the rings it writes
    one row in place. The states are on the device of the model; samples, slots and hints are on the CPU.
    """

    def __init__(self, model: LargeModel, count: int, speaker_embedding: Tensor | None = None) -> None:
        """Make empty slots. ``speaker_embedding`` is any embedding ``[1, 256]``, for a network that needs one."""
        self._model, self._count = model, count
        self._first = model.initial_state(1, speaker_embedding)
        self._stacked = _empty(self._first, count + 1)  # the last slot belongs to no stream and fills up steps
        self._tensors = state_tensors(self._stacked)
        self._device = self._tensors[0].device
        self._compiled: CompiledStep | None = None  # on a CPU
        self._traces: dict[int, Callable[..., Tensor]] = {}
        self._graphs: dict[tuple[int, int], GraphedStep] = {}  # by number of frames and size

    def put(self, slot: int, state: LargeState) -> None:
        """Put the state ``[1, ...]`` of a stream into a slot, and overwrite its old content completely."""
        for own, new in zip(self._tensors, state_tensors(state), strict=True):
            own[slot] = new[0]

    def prepare(self, lengths: Iterable[int]) -> None:
        """Prepare steps of these numbers of frames before the first stream.

        A prepared step runs without Python: on a GPU as a CUDA graph, on a CPU as compiled code or else as a trace. In
        Python, it would consist of a hundred small parts, each of which would wait for the interpreter lock.
        """
        if self._device.type == "cuda":
            self._capture(lengths)
        elif self._device.type == "cpu":
            if CompiledStep.supports(self._model) and self._compiled_is_better():
                self._compiled = CompiledStep(self._model, self._stacked)
            else:
                self._trace(lengths)

    def _compiled_is_better(self) -> bool:
        """Return whether the compiled step gives the hints of torch, and is faster. If it differs, print a warning."""
        framing = self._model.config.framing
        generator = torch.Generator().manual_seed(0)
        shape = _CHECKED_FRAMES, 1, self._model.config.microphones, framing.n_fft
        slots, windows = torch.zeros(1, dtype=torch.long), 0.1 * torch.randn(shape, generator=generator)
        results, seconds = [], []
        with torch.no_grad():
            for compiled in (False, True):
                stacked = map_state(self._first, partial(torch.clone, memory_format=torch.contiguous_format))
                step: Callable[[Tensor, Tensor], Tensor] = partial(_step, self._model, stacked)
                if compiled:
                    step = CompiledStep(self._model, stacked)
                hints, times = [], []
                for window in windows:
                    began = time.perf_counter()
                    hints.append(step(window, slots))
                    times.append(time.perf_counter() - began)
                results.append(torch.stack(hints))
                seconds.append(min(times))
        expected, actual = results
        error, loudest = float((actual - expected).abs().max()), float(expected.abs().max())
        if not error <= cpu_step.MAX_ERROR * max(loudest, 1):
            warn(f"the compiled step differs from torch by {error:.2g} (largest value {loudest:.2g}), so torch is used")
            return False
        # A trace takes somewhat less time than the same operations without one.
        return seconds[1] < cpu_step.MAX_RELATIVE_TIME * seconds[0]

    def _capture(self, lengths: Iterable[int]) -> None:
        framing, microphones = self._model.config.framing, self._model.config.microphones
        sizes = [1 << power for power in range((self._count - 1).bit_length() + 1)]
        step, pool = partial(_step, self._model, self._stacked), torch.cuda.graph_pool_handle()
        with torch.no_grad():
            for frames, size in product(lengths, sizes):
                if frames > 1 and frames * size > _MAX_GRAPHED_BACKLOG:
                    continue
                samples = torch.zeros(
                    size, microphones, framing.chunk * frames + framing.lookahead, device=self._device
                )
                self._graphs[frames, size] = GraphedStep(step, samples, spare_slot=self._count, pool=pool)

    def _trace(self, lengths: Iterable[int]) -> None:
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
                # The first calls optimise the trace, which takes some time. The first step of each size also takes
                # several times as long as later ones, because torch prepares and caches data for it.
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
            samples: ``[B, M, chunk T + lookahead]``, on the CPU.
            slots: ``[B]``, different slots, on the CPU.

        Returns:
            Hints ``[B, T, hint channels, F]``, on the CPU.
        """
        framing, streams = self._model.config.framing, len(slots)
        frames = (samples.shape[2] - framing.lookahead) // framing.chunk
        graph = self._graphs.get((frames, 1 << (streams - 1).bit_length()))
        if graph is not None:
            return _to_host(graph(samples, slots))
        if self._compiled is not None:
            starts = range(0, frames * framing.chunk, framing.chunk)
            hints = [self._compiled(samples[..., start : start + framing.n_fft], slots) for start in starts]
            return torch.cat(hints, dim=1)
        fill = step_size(streams) - streams
        if fill:
            samples = functional.pad(samples, (0, 0, 0, 0, 0, fill))
            slots = functional.pad(slots, (0, fill), value=self._count)
        trace = self._traces.get(frames)
        if trace is not None:
            traced: Tensor = trace(samples, slots)
            return traced[:streams]
        computed = _step(self._model, self._stacked, samples.to(self._device), slots.to(self._device))
        return _to_host(computed[:streams])


def step_size(streams: int) -> int:
    """Round a number of streams up to the size of a step: 1, 2, ... 7, 8, 10, 12, 14, 16, 20, ..., four an octave.

    Every size costs memory and a slow first step, so there are few. They are close enough that little is computed in
    vain.
    """
    spacing = max(1, 1 << (streams - 1).bit_length() >> 3)
    return -(-streams // spacing) * spacing


_CHECKED_FRAMES = 6  # with which the compiled step is checked and timed
_MAX_STEP_SECONDS = 0.1  # a longer step is useless in real time, so no larger steps are prepared
_MAX_GRAPHED_BACKLOG = 64  # frames of all streams in a step; larger steps for backlogs are rare, and have no graph
_TRACED_STREAMS = 3  # streams in the example input of a trace; the trace works for any number


class _Step(nn.Module):
    """A step in a form that can be traced.

    The states are buffers and not arguments. A trace releases every argument to Python after its last use, and waits
    for the interpreter lock each time.
    """

    def __init__(self, model: LargeModel, stacked: LargeState) -> None:
        super().__init__()
        self._model, self._stacked = model, stacked
        for number, tensor in enumerate(state_tensors(stacked)):
            self.register_buffer(f"state{number}", tensor)

    def forward(self, samples: Tensor, slots: Tensor) -> Tensor:
        parts = iter([self.get_buffer(f"state{number}") for number in range(len(state_tensors(self._stacked)))])
        return _step(self._model, map_state(self._stacked, lambda _: next(parts)), samples, slots)


class CompiledStep:
    """A step of one frame on a CPU, in C++."""

    def __init__(self, model: LargeModel, stacked: LargeState) -> None:
        """Pack the weights of a supported model. The steps change the states in place."""
        self._states, network = stacked, stacked.network
        blocks: list[tuple[int | None, ...]] = []
        for index, block in enumerate(network.blocks):
            rings = (block.attention.keys, block.attention.values) if block.attention is not None else (None, None)
            speaker = network.speaker[index] if index < len(network.speaker) else None
            modulation = (speaker.weight, speaker.bias) if speaker is not None else (None, None)
            blocks.append(tuple(map(_address, (block.hidden, block.cell, *rings, *modulation))))
        own = network.frames, stacked.level, network.input, network.output, stacked.encoder
        weights = {name: weight.detach().numpy() for name, weight in model.state_dict().items()}
        states = cpu_step.LargeStates(tuple(map(_address, own)), blocks)
        self._step = cpu_step.LargeStep(model.config, weights, states)
        self._shape = 1, model.config.hint_channels, model.config.framing.bins

    @staticmethod
    def supports(model: LargeModel) -> bool:
        """Return whether a model can run: in float32 on a CPU, if the C++ library is available."""
        weight = model.network.input_norm.weight
        on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
        return on_cpu and cpu_step.supports(model.config.large)

    def __call__(self, samples: Tensor, slots: Tensor) -> Tensor:
        """Advance the streams in slots, as :meth:`StateSlots.step`."""
        samples, slots = samples.contiguous(), slots.contiguous()
        hints = torch.empty(len(slots), *self._shape)
        self._step(slots.data_ptr(), len(slots), samples.data_ptr(), hints.data_ptr(), torch.get_num_threads())
        return hints


def _address(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()


class GraphedStep:
    """A step of a fixed size with its own buffers. On a GPU it is a CUDA graph, which one call of the driver starts."""

    def __init__(
        self, step: Callable[[Tensor, Tensor], Tensor], samples: Tensor, *, spare_slot: int, pool: Any = None
    ) -> None:
        """Capture a step.

        Args:
            step: computes hints from samples and slots on the device, and advances the states of the slots.
            samples: ``[size, M, chunk T + lookahead]`` on the device, the buffer for the samples.
            spare_slot: the slot that fills up a step.
            pool: the memory that this graph shares with others. They must not run at the same time.
        """
        self._run, self._samples, self._spare_slot = step, samples, spare_slot
        self._slots = torch.full((len(samples),), spare_slot, device=samples.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        if not samples.is_cuda:
            return
        # Libraries allocate their work space in the first calls, which must not be captured.
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            for _ in range(2):
                step(samples, self._slots)
        torch.cuda.current_stream().wait_stream(warm_up)
        self._graph = torch.cuda.CUDAGraph()
        # While a bundle is loaded, the engines of other bundles use the device on their own threads.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._hints = step(samples, self._slots)

    def __call__(self, samples: Tensor, slots: Tensor) -> Tensor:
        """Advance the streams in ``slots``, at most as many as the size of the step. Return their hints on the device.

        The hints are valid until the next call.
        """
        streams = len(slots)
        self._samples[:streams].copy_(_pinned(samples, self._samples), non_blocking=True)
        self._slots.fill_(self._spare_slot)
        self._slots[:streams].copy_(_pinned(slots, self._slots), non_blocking=True)
        if self._graph is None:
            return self._run(self._samples, self._slots)[:streams]
        self._graph.replay()
        return self._hints[:streams]


def _pinned(tensor: Tensor, target: Tensor) -> Tensor:
    """Return a copy in pinned memory if the target is on a GPU. Only such a copy is transferred in the background."""
    return tensor.pin_memory() if target.is_cuda else tensor


def _to_host(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU. This is the only wait for the device in a step."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    return host


def _step(model: LargeModel, stacked: LargeState, samples: Tensor, slots: Tensor) -> Tensor:
    hints, _, state = model(samples, _take(stacked, slots))
    _store(stacked, slots, state)
    return cast("Tensor", hints)


def _empty(like: LargeState, count: int) -> LargeState:
    return map_state(like, lambda tensor: tensor.new_zeros(count, *tensor.shape[1:]))


def map_state(node: Node, function: Any) -> Node:
    """Return a state, or a part of one, with ``function`` applied to each of its tensors."""
    if isinstance(node, Tensor):
        return cast("Node", function(node))
    if isinstance(node, tuple):
        return cast("Node", tuple(map_state(item, function) for item in node))
    if is_dataclass(node):
        parts = {field.name: map_state(getattr(node, field.name), function) for field in fields(node)}
        return cast("Node", replace(cast("Any", node), **parts))
    return node


def state_tensors(node: object) -> list[Tensor]:
    """Return the tensors of a state, in the order of :func:`map_state`."""
    found: list[Tensor] = []

    def add(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_state(node, add)
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
