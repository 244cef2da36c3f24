"""Loads training examples in batches, in an order that can be reproduced.

An example is addressed by (epoch, index), and every random value depends only on seed, epoch and index. So a run can be
interrupted, resumed, and shared by any number of workers and devices, and still sees the same examples.
"""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from knowledge_boosting.common.cli import termination_signals
from knowledge_boosting.common.errors import InputError

Address = tuple[int, int]  # epoch, index


class Examples(Protocol):
    """A source of training examples."""

    speakers: frozenset[str]

    def __len__(self) -> int: ...

    def example(self, address: Address) -> dict[str, Any]: ...

    def speaker_embeddings(self) -> Tensor: ...


class Batch(TypedDict):
    """A batch of examples, with the batch axis first. For TSE ``sources`` has the target only."""

    names: list[str]
    mixture: NotRequired[Tensor]  # [B, M, N]
    sources: NotRequired[Tensor]  # [B, S, M, N]
    embedding: NotRequired[Tensor]  # [B, T, F, 2S'], only from stored hints
    speaker_embedding: NotRequired[Tensor]  # [B, 256], TSE; from dynamic mixing [B, 2, 256], of both speakers
    # Only from dynamic mixing, before `render` makes the mixture and the sources:
    speech: NotRequired[Tensor]  # [B, 2, N], dry
    responses: NotRequired[Tensor]  # [B, 2, M, K]
    noise: NotRequired[Tensor]  # [B, 2, N], from two places in another room
    noise_responses: NotRequired[Tensor]  # [B, 2, M, K]
    noise_db: NotRequired[Tensor]  # [B], level of the speech over the noise
    level_difference_db: NotRequired[Tensor]  # [B], speaker 1 over speaker 2
    ear_difference_db: NotRequired[Tensor]  # [B]
    level_change_db: NotRequired[Tensor]  # [B]
    level_dbfs: NotRequired[Tensor]  # [B]


@dataclass(frozen=True)
class _Fault:
    """The fault of an example."""

    message: str


class _Batches(Dataset[Batch | _Fault]):
    """Maps lists of addresses to batches."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, addresses: Sequence[Address]) -> Batch | _Fault:
        try:
            return self._collate([self._examples.example(address) for address in addresses])
        except InputError as error:
            # An exception would leave the worker process with its traceback as its message.
            return _Fault(str(error))

    def _collate(self, examples: list[dict[str, Any]]) -> Batch:
        batch: dict[str, Any] = {"names": [example["names"] for example in examples]}
        for key in examples[0].keys() - {"names"}:
            values = [example[key] for example in examples]
            if len({value.shape for value in values}) > 1:
                raise InputError(
                    f"{examples[0]['names']}: its length differs from others in its batch; make all items equally long"
                )
            batch[key] = torch.stack(values)
        return batch  # type: ignore[return-value]


class EpochOrder(Sampler[list[Address]]):
    """The batches of one epoch for one of several devices, as lists of addresses.

    Device r of R takes every R-th example of each batch, so the batches do not depend on the number of devices. An
    interrupted epoch can be continued at a later batch.
    """

    def __init__(
        self,
        items: int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        devices: int = 1,
        first_batch: int = 0,
    ) -> None:
        """Order ``items`` examples.

        Args:
            items: the number of examples.
            batch_size: the size of a batch over all devices. If ``shuffle`` is true, the examples that do not fill a
                batch are left out of the epoch; else the last batch is smaller.
            seed: the seed of the order.
            shuffle: whether every epoch has a random order.
            rank: the index of this device.
            devices: the number of devices.
            first_batch: the batch at which the first epoch begins.
        """
        self._items, self._batch_size, self._seed, self._shuffle = items, batch_size, seed, shuffle
        self._rank, self._devices = rank, devices
        self.first_batch = first_batch
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self._epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self._items, self._batch_size)
        return max(whole, 1) if self._shuffle else whole + bool(rest)

    def __iter__(self) -> Iterator[list[Address]]:
        order = np.arange(self._items)
        if self._shuffle:
            order = np.random.default_rng([self._seed, self._epoch]).permutation(self._items)
        first, self.first_batch = self.first_batch, 0
        for number in range(first, len(self)):
            batch = order[number * self._batch_size : (number + 1) * self._batch_size]
            own = batch[self._rank :: self._devices]
            # All devices must take the same number of steps, so a device without an example repeats the first one.
            yield [(self._epoch, int(index)) for index in (own if len(own) else batch[:1])]


class _WorkerSignals:
    """Sets how a worker process reacts to signals.

    A terminal or a service manager sends its signals to the whole process group. A worker ignores them, because the
    trainer ends its workers itself: when it exits during an epoch, it sends SIGTERM and waits for them.
    """

    def __init__(self) -> None:
        self._trainer_leaves = multiprocessing.Event()
        atexit.register(self._trainer_leaves.set)

    def __call__(self, _worker: int) -> None:
        for number in (signal.SIGINT, *termination_signals()):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._end)

    def _end(self, _number: int, _frame: FrameType | None) -> None:
        if self._trainer_leaves.is_set():
            os._exit(0)


class Loader(DataLoader[Any]):
    """Loads batches in an order that can be continued.

    It stores no state in checkpoints, because the position in the order follows from the trainer's step.
    """

    def __init__(self, examples: Examples, order: EpochOrder, workers: int) -> None:
        """Load batches of examples with ``workers`` processes; 0 loads them in this process."""
        super().__init__(
            _Batches(examples),
            sampler=order,
            batch_size=None,
            num_workers=workers,
            worker_init_fn=_WorkerSignals() if workers else None,
            persistent_workers=workers > 0,  # keeps the d-vectors that they have cached
            pin_memory=torch.cuda.is_available(),
        )
        self.order = order

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            if isinstance(batch, _Fault):
                raise InputError(batch.message)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
