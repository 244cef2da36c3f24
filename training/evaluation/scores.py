"""Computes the figures of every system on every item. Worker processes compute the slow ones."""

import math
import multiprocessing
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from knowledge_boosting.common.errors import Failure
from knowledge_boosting.training.evaluation.metrics import METRICS, MetricName
from knowledge_boosting.training.evaluation.results import SYSTEMS, Values
from knowledge_boosting.training.workers import end_with_parent

if TYPE_CHECKING:  # a worker does not need to import the networks
    from knowledge_boosting.training.evaluation.systems import EvaluationItem, Key

_QUEUED_PER_WORKER = 4  # estimates that wait for each worker


_QUICK = [name for name, metric in METRICS.items() if not metric.slow]  # all in dB


def quick_figures(estimates: Tensor, item: "EvaluationItem") -> dict[MetricName, float]:
    """Return the figures of the estimates of an item that are quick to compute, in dB."""
    return _figures(_QUICK, estimates, item.sources, item.mixture)


def _figures(
    metrics: Sequence[MetricName], estimates: Tensor, sources: Tensor, mixture: Tensor
) -> dict[MetricName, float]:
    """Return the figures of estimates and sources ``[1, S, M, N]`` and a mixture ``[1, M, N]``.

    A figure that needs speech is NaN if there is none.
    """
    figures: dict[MetricName, float] = {}
    for metric in metrics:
        with warnings.catch_warnings():
            # If less than 0.4 s remains without the silence, pystoi warns and returns an arbitrary figure.
            warnings.simplefilter("error", RuntimeWarning)
            try:
                figures[metric] = float(METRICS[metric].measure(estimates, sources, mixture))
            except RuntimeWarning:
                figures[metric] = math.nan
    return figures


def _figures_of_arrays(metrics: Sequence[MetricName], *signals: npt.NDArray[np.float32]) -> dict[MetricName, float]:
    return _figures(metrics, *map(torch.from_numpy, signals))


class Scores:
    """The figures of every system and item."""

    def __init__(self, metrics: Sequence[MetricName], items: Sequence[str], workers: int) -> None:
        self.items = items
        self.figures: dict[Key, dict[MetricName, Values]] = {}
        self._metrics = metrics
        self._slow = [metric for metric in metrics if METRICS[metric].slow]
        self._max_running = _QUEUED_PER_WORKER * workers
        self._running: dict[Future[dict[MetricName, float]], tuple[Key, int]] = {}
        self._pool: ProcessPoolExecutor | None = None
        if workers and self._slow:
            self._pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)

    def add(self, key: "Key", index: int, estimates: Tensor, item: "EvaluationItem") -> dict[MetricName, float]:
        """Measure the estimates ``[1, S, M, N]`` of a system for an item.

        Returns:
            The quick figures, in dB. The slow ones are stored when a worker has computed them.

        Raises:
            Failure: the estimates are not finite, or a worker process died.
        """
        if not bool(estimates.isfinite().all()):
            raise Failure(
                f"{key.model}: the output of {SYSTEMS[key.system]} for item {self.items[index]} is not finite"
            )
        nothing = np.full(len(self.items), np.nan)
        self.figures.setdefault(key, {metric: nothing.copy() for metric in self._metrics})
        quick = quick_figures(estimates, item)
        self._store(key, index, quick)
        if self._slow:
            signals = estimates, item.sources, item.mixture
            if self._pool is None:
                self._store(key, index, _figures(self._slow, *signals))
            else:
                self._collect(self._max_running - 1)
                arrays = [signal.numpy() for signal in signals]
                self._running[self._pool.submit(_figures_of_arrays, self._slow, *arrays)] = key, index
        return quick

    def finish(self) -> None:
        """Wait until the workers have computed all figures.

        Raises:
            Failure: a worker process died.
        """
        self._collect(0)

    def close(self) -> None:
        """End the workers, even if figures are missing."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _store(self, key: "Key", index: int, figures: Mapping[MetricName, float]) -> None:
        for metric, value in figures.items():
            if metric in self._metrics:
                self.figures[key][metric][index] = value

    def _collect(self, limit: int) -> None:
        """Store finished figures until at most ``limit`` estimates are waiting or being measured."""
        while len(self._running) > limit:
            done, _ = wait(self._running, return_when=FIRST_COMPLETED)
            for future in done:
                try:
                    self._store(*self._running.pop(future), future.result())
                except BrokenProcessPool:
                    raise Failure("a worker process died (out of memory?); try fewer --workers") from None


def _start_worker() -> None:
    torch.set_num_threads(1)
    end_with_parent()
