"""States of many streams, stacked, so that one step of a network serves any of them."""

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

from torch import Tensor

from models.layers import AttentionCache
from models.pair import LargeModel, LargeState
from models.tfgridnet import SpeakerModulation

Node = TypeVar("Node")


class StateSlots:
    """The states of up to ``count`` streams through a large network.

    Everything but the attention's rings is small: a step takes it out, and puts it back. Of the rings it writes one
    row in place.
    """

    def __init__(self, model: LargeModel, count: int, speaker_embedding: Tensor | None = None) -> None:
        """Empty slots; ``speaker_embedding`` ``[1, 256]`` is any, for a network that takes one."""
        first = model.initial_state(1, speaker_embedding)
        self._stacked = _map(first, lambda tensor: tensor.new_zeros(count, *tensor.shape[1:]))

    def put(self, slot: int, state: LargeState) -> None:
        """Fill a slot with the state ``[1, ...]`` of a stream; nothing of an earlier one is left in it."""
        for own, new in zip(_tensors(self._stacked), _tensors(state), strict=True):
            own[slot] = new[0]

    def take(self, slots: Tensor) -> LargeState:
        """The state of the streams in slots ``[B]``, for one step; its rings are views."""
        return _take(self._stacked, slots)

    def store(self, slots: Tensor, state: LargeState) -> None:
        """Keep the state after the step that had :meth:`take`'s."""
        _store(self._stacked, slots, state)


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
