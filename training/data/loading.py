"""Training examples: how they are addressed, put in order and loaded in batches.

An example is addressed by (epoch, index), and every random draw follows from seed, epoch and index alone. A run can be
interrupted, resumed and spread over any number of workers and devices without a change to what it sees.
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
    """Where examples come from."""

    speakers: frozenset[str]

    def __len__(self) -> int: ...

    def example(self, address: Address) -> dict[str, Any]: ...

    def speaker_embeddings(self) -> Tensor: ...


class Batch(TypedDict):
    """Examples, batch axis first. The sources of TSE are the target alone."""

    names: list[str]
    mixture: NotRequired[Tensor]  # [B, M, N]
    sources: NotRequired[Tensor]  # [B, S, M, N]
    embedding: NotRequired[Tensor]  # [B, T, F, 2S'], of stored hints
    speaker_embedding: NotRequired[Tensor]  # [B, 256], TSE; of dynamic mixing [B, 2, 256], of both talkers
    # Of dynamic mixing, before `render` makes mixture and sources of them:
    speech: NotRequired[Tensor]  # [B, 2, N], dry
    responses: NotRequired[Tensor]  # [B, 2, M, K]
    noise: NotRequired[Tensor]  # [B, 2, N], from two places in a room of its own
    noise_responses: NotRequired[Tensor]  # [B, 2, M, K]
    noise_db: NotRequired[Tensor]  # [B], of the voices' mixture over it
    level_difference_db: NotRequired[Tensor]  # [B], of talkers
    ear_difference_db: NotRequired[Tensor]  # [B]
    level_change_db: NotRequired[Tensor]  # [B]
    level_dbfs: NotRequired[Tensor]  # [B]


@dataclass(frozen=True)
class _Fault:
    """What was wrong with an example."""

    message: str


class _Batches(Dataset[Batch | _Fault]):
    """Examples by lists of addresses, collated."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, addresses: Sequence[Address]) -> Batch | _Fault:
        try:
            return self._collate([self._examples.example(address) for address in addresses])
        except InputError as error:
            # As a value: an exception would leave a worker process with its traceback for a message.
            return _Fault(str(error))

    def _collate(self, examples: list[dict[str, Any]]) -> Batch:
        batch: dict[str, Any] = {"names": [example["names"] for example in examples]}
        for key in examples[0].keys() - {"names"}:
            values = [example[key] for example in examples]
            if len({value.shape for value in values}) > 1:
                raise InputError(f"{examples[0]['names']}: its length differs from others of its batch; cut all alike")
            batch[key] = torch.stack(values)
        return batch  # type: ignore[return-value]


class EpochOrder(Sampler[list[Address]]):
    """The batches of one epoch for one of several devices, as lists of addresses.

    Device r of R takes every R-th example of each batch, so that the batches are the same however many devices share
    them. An epoch begun and interrupted can be gone on with at a later batch.
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
        """The order of ``items`` examples.

        Args:
            batch_size: over all devices; the last batch of an epoch may be smaller unless shuffled, when what is left
                over is for another epoch.
            first_batch: of the first epoch that is gone through.
        """
        self._items, self._batch_size, self._seed, self._shuffle = items, batch_size, seed, shuffle
        self._rank, self._devices = rank, devices
        self.first_batch = first_batch
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is gone through next."""
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
            # A device left without one repeats the first, because all must take as many steps.
            yield [(self._epoch, int(index)) for index in (own if len(own) else batch[:1])]


class _Signals:
    """What a worker does with the signals that its whole group gets: it leaves them to the trainer, which ends it.

    A trainer that leaves while an epoch is under way ends it by SIGTERM, and waits until it has ended.
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
    """Batches in an order that can be gone on with; the order's place is the trainer's step, so it keeps no state."""

    def __init__(self, examples: Examples, order: EpochOrder, workers: int) -> None:
        """Batches of examples, read by ``workers`` processes (0: by this one)."""
        super().__init__(
            _Batches(examples),
            sampler=order,
            batch_size=None,
            num_workers=workers,
            worker_init_fn=_Signals() if workers else None,
            persistent_workers=workers > 0,  # which keep the d-vectors they have made
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
