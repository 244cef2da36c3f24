"""A network between device and server, simulated: when would a packet sent now arrive?

Each direction is one link. A packet waits for the ones before it to leave (bandwidth), travels (delay and jitter), may
be lost and sent again (loss), and is never delivered before an earlier one, because gRPC runs over TCP.
Times are integer nanoseconds, so that equal inputs give equal results everywhere.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from knowledge_boosting.common.errors import InputError, existing_file, reason

PACKET_OVERHEAD = 80  # bytes of TCP/IP, HTTP/2, gRPC and message headers around a payload
_LEAST_TIMEOUT = 200_000_000  # ns; TCP's usual least retransmission timeout


@dataclass(frozen=True)
class NetworkConditions:
    """A network, both directions alike. Delay and jitter are of the round trip, half of it each way."""

    delay_ms: float = 0.0
    jitter_ms: float = 0.0  # mean of an exponentially distributed extra delay
    loss: float = 0.0  # probability that a packet is lost
    bandwidth_mbit: float | None = None  # per direction; None: no limit


PRESETS = {
    "lan": NetworkConditions(delay_ms=1, jitter_ms=0.2, bandwidth_mbit=1000),
    "wifi": NetworkConditions(delay_ms=8, jitter_ms=6, loss=0.001, bandwidth_mbit=50),
    "5g": NetworkConditions(delay_ms=20, jitter_ms=6, loss=0.0005, bandwidth_mbit=50),
    "lte": NetworkConditions(delay_ms=45, jitter_ms=15, loss=0.002, bandwidth_mbit=10),
    "satellite": NetworkConditions(delay_ms=600, jitter_ms=20, loss=0.005, bandwidth_mbit=5),
}


class Link:
    """One direction of a network. Ask once per packet, in the order of sending."""

    def __init__(
        self,
        conditions: NetworkConditions,
        *,
        delay_ns: int,
        spacing_ns: int,
        seed: Sequence[int],
        recorded_ns: Sequence[int] | None = None,
    ) -> None:
        """A link with nothing on its way.

        Args:
            conditions: of the network.
            delay_ns: this direction's share of the fixed delay.
            spacing_ns: time between packets; a receiver finds a loss by the three packets that follow it.
            seed: of jitter and loss.
            recorded_ns: delays of successive packets from a recording, repeated when it ends; they replace fixed
                delay, jitter and loss.
        """
        self._conditions = conditions
        self._delay = delay_ns
        self._retransmit = round(conditions.delay_ms * 1e6) + 3 * spacing_ns
        self._random = np.random.default_rng(seed)
        self._recorded = recorded_ns
        self._packets = 0
        self._idle_at = 0
        self._last_arrival = 0

    def arrival(self, sent_at: int, payload_bytes: int) -> int:
        """When a packet arrives that is handed to the link at ``sent_at``, both in nanoseconds."""
        conditions = self._conditions
        if self._recorded is not None:
            leaves, travel = sent_at, self._recorded[self._packets % len(self._recorded)]
        else:
            leaves = max(sent_at, self._idle_at)
            if conditions.bandwidth_mbit is not None:
                leaves += round((payload_bytes + PACKET_OVERHEAD) * 8e3 / conditions.bandwidth_mbit)
            self._idle_at = leaves
            # Both are drawn for every packet, so that one setting does not shift the draws of the other.
            extra, fate = self._random.standard_exponential(), self._random.random()
            travel = self._delay + round(extra * conditions.jitter_ms / 2 * 1e6) + self._stall(fate)
        self._packets += 1
        self._last_arrival = max(leaves + travel, self._last_arrival)
        return self._last_arrival

    def _stall(self, fate: float) -> int:
        """Time that retransmissions add: the first after three duplicate acknowledgements, then doubling timeouts."""
        loss, stall, wait = self._conditions.loss, 0, self._retransmit
        while fate < loss:
            stall += wait
            wait = max(2 * wait, _LEAST_TIMEOUT)
            fate /= loss  # uniform again, given that it was below
        return stall


@dataclass(frozen=True)
class Trace:
    """Recorded one-way delays of successive packets, nanoseconds."""

    up: tuple[int, ...]
    down: tuple[int, ...]


def make_links(
    conditions: NetworkConditions, *, spacing_ns: int, seed: int, trace: Trace | None = None
) -> tuple[Link, Link]:
    """Uplink and downlink of a network, or of a recording of one."""
    total = round(conditions.delay_ms * 1e6)
    recorded = (trace.up, trace.down) if trace is not None else (None, None)
    up, down = (
        Link(conditions, delay_ns=share, spacing_ns=spacing_ns, seed=(seed, way), recorded_ns=recorded[way])
        for way, share in enumerate((total // 2, total - total // 2))
    )
    return up, down


def read_trace(path: Path) -> Trace:
    """A CSV file of one-way delays: header ``up_ms,down_ms``, then a line a packet.

    Raises:
        InputError: the file cannot be read, lacks the header or a value, or a delay is negative.
    """
    existing_file(path, "a trace")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: not readable as CSV ({reason(error)})") from None
    if not rows:
        raise InputError(f"{path}: holds no delays; write a header 'up_ms,down_ms' and one line a packet")
    delays: dict[str, list[int]] = {"up_ms": [], "down_ms": []}
    for number, row in enumerate(rows, start=2):
        for column, values in delays.items():
            try:
                delay = float(row[column])
                if not 0 <= delay < float("inf"):
                    raise ValueError
            except (KeyError, TypeError, ValueError):
                text = "needs columns up_ms and down_ms with delays in milliseconds, 0 or more"
                raise InputError(f"{path}: line {number} {text}") from None
            values.append(round(delay * 1e6))
    return Trace(tuple(delays["up_ms"]), tuple(delays["down_ms"]))


def conditions_of(
    preset: str | None,
    *,
    delay_ms: float | None,
    jitter_ms: float | None,
    loss: float | None,
    bandwidth_mbit: float | None,
) -> NetworkConditions:
    """A preset's conditions, each of which a value given replaces.

    Raises:
        InputError: no such preset.
    """
    if preset is not None and preset not in PRESETS:
        raise InputError(f"--network {preset}: must be one of {', '.join(PRESETS)}")
    base = PRESETS[preset] if preset is not None else NetworkConditions()
    given = {"delay_ms": delay_ms, "jitter_ms": jitter_ms, "loss": loss, "bandwidth_mbit": bandwidth_mbit}
    return replace(base, **{name: value for name, value in given.items() if value is not None})
