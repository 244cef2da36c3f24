"""A simulation of the links between device and server, which computes the arrival time of each packet.

Each direction is one link. A packet waits until the packets before it have left (bandwidth), and travels (delay and
jitter). It can be lost and sent again (loss). It never arrives before an earlier packet, because gRPC uses TCP. Times
are integer nanoseconds, so that the same input gives the same result on every machine.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from knowledge_boosting.common.errors import InputError, existing_file, reason

PACKET_OVERHEAD = 80  # bytes of TCP/IP, HTTP/2, gRPC and message headers around a payload
_MIN_RETRANSMISSION_TIMEOUT = 200_000_000  # ns; the usual minimum of TCP


@dataclass(frozen=True)
class NetworkConditions:
    """The conditions of both links. Delay and jitter are those of the round trip, half in each direction."""

    delay_ms: float = 0.0
    jitter_ms: float = 0.0  # mean of an exponentially distributed extra delay
    loss: float = 0.0  # probability that a packet is lost
    bandwidth_mbit: float | None = None  # for each direction; None: no limit


PRESETS = {
    "lan": NetworkConditions(delay_ms=1, jitter_ms=0.2, bandwidth_mbit=1000),
    "wifi": NetworkConditions(delay_ms=8, jitter_ms=6, loss=0.001, bandwidth_mbit=50),
    "5g": NetworkConditions(delay_ms=20, jitter_ms=6, loss=0.0005, bandwidth_mbit=50),
    "lte": NetworkConditions(delay_ms=45, jitter_ms=15, loss=0.002, bandwidth_mbit=10),
    "satellite": NetworkConditions(delay_ms=600, jitter_ms=20, loss=0.005, bandwidth_mbit=5),
}


_SETTINGS = {"delay": "delay_ms", "jitter": "jitter_ms", "loss": "loss"}


def parse_conditions(text: str) -> NetworkConditions:
    """Return the network conditions that a text describes: a preset, or settings such as ``delay=48+loss=0.01``.

    Raises:
        InputError: There is no such preset or setting, or a value is impossible.
    """
    if text in PRESETS:
        return PRESETS[text]
    values: dict[str, float] = {}
    for part in text.split("+"):
        name, _, value = part.partition("=")
        try:
            number = float(value)
            if name not in _SETTINGS or not 0 <= number <= (0.5 if name == "loss" else 60_000):
                raise ValueError
        except ValueError:
            raise InputError(
                f"--networks {text}: give one of {', '.join(PRESETS)}, or delay and jitter in ms and loss up to 0.5, "
                "such as delay=48+jitter=20+loss=0.01"
            ) from None
        values[_SETTINGS[name]] = number
    return NetworkConditions(**values)


class Link:
    """One direction of the connection. Call :meth:`arrival` once for each packet, in the order of sending."""

    def __init__(
        self,
        conditions: NetworkConditions,
        *,
        delay_ns: int,
        spacing_ns: int,
        seed: Sequence[int],
        recorded_ns: Sequence[int] | None = None,
    ) -> None:
        """Create an idle link.

        Args:
            conditions: The network conditions.
            delay_ns: The part of the fixed delay that belongs to this direction.
            spacing_ns: The time between packets. A receiver detects a loss by the three packets that follow.
            seed: The seed for jitter and loss.
            recorded_ns: Recorded delays of successive packets, which repeat at the end. They replace the fixed delay,
                jitter and loss. None: no recording.
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
        """Return when a packet arrives that is sent at ``sent_at``, both in nanoseconds."""
        conditions = self._conditions
        if self._recorded is not None:
            departure, travel = sent_at, self._recorded[self._packets % len(self._recorded)]
        else:
            departure = max(sent_at, self._idle_at)
            if conditions.bandwidth_mbit is not None:
                departure += round((payload_bytes + PACKET_OVERHEAD) * 8e3 / conditions.bandwidth_mbit)
            self._idle_at = departure
            # Both are drawn for every packet, so that the jitter does not depend on the loss rate or vice versa.
            jitter, loss_draw = self._random.standard_exponential(), self._random.random()
            retransmission = self._retransmission_delay(loss_draw)
            travel = self._delay + round(jitter * conditions.jitter_ms / 2 * 1e6) + retransmission
        self._packets += 1
        self._last_arrival = max(departure + travel, self._last_arrival)
        return self._last_arrival

    def _retransmission_delay(self, draw: float) -> int:
        """Return the nanoseconds that retransmissions add, for a draw from the uniform distribution on [0, 1).

        The first one follows three duplicate acknowledgements, and each further one a timeout that doubles.
        """
        loss, delay, wait = self._conditions.loss, 0, self._retransmit
        while draw < loss:
            delay += wait
            wait = max(2 * wait, _MIN_RETRANSMISSION_TIMEOUT)
            draw /= loss  # given that it was below the loss rate, it is uniform on [0, 1) again
        return delay


@dataclass(frozen=True)
class Trace:
    """Recorded one-way delays of successive packets, in nanoseconds."""

    up: tuple[int, ...]
    down: tuple[int, ...]


def make_links(
    conditions: NetworkConditions, *, spacing_ns: int, seed: int, trace: Trace | None = None
) -> tuple[Link, Link]:
    """Create the uplink and the downlink for network conditions or for a recorded trace."""
    total = round(conditions.delay_ms * 1e6)
    recorded = (trace.up, trace.down) if trace is not None else (None, None)
    up, down = (
        Link(conditions, delay_ns=delay, spacing_ns=spacing_ns, seed=(seed, direction), recorded_ns=recorded[direction])
        for direction, delay in enumerate((total // 2, total - total // 2))
    )
    return up, down


def read_trace(path: Path) -> Trace:
    """Read a CSV file of one-way delays: the header ``up_ms,down_ms``, then one line for each packet.

    Raises:
        InputError: The file cannot be read, the header or a value is missing, or a delay is negative.
    """
    existing_file(path, "a trace")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: not readable as CSV ({reason(error)})") from None
    if not rows:
        raise InputError(f"{path}: contains no delays; write a header 'up_ms,down_ms' and one line for each packet")
    delays: dict[str, list[int]] = {"up_ms": [], "down_ms": []}
    for number, row in enumerate(rows, start=2):
        for column, values in delays.items():
            try:
                delay = float(row[column])
                if not 0 <= delay < float("inf"):
                    raise ValueError
            except (KeyError, TypeError, ValueError):
                text = "must have delays of 0 ms or more in the columns up_ms and down_ms"
                raise InputError(f"{path}: line {number} {text}") from None
            values.append(round(delay * 1e6))
    return Trace(tuple(delays["up_ms"]), tuple(delays["down_ms"]))


def network_conditions(
    preset: str | None,
    *,
    delay_ms: float | None,
    jitter_ms: float | None,
    loss: float | None,
    bandwidth_mbit: float | None,
) -> NetworkConditions:
    """Return the network conditions of a preset, in which every value that is not None replaces that of the preset.

    Raises:
        InputError: There is no such preset.
    """
    if preset is not None and preset not in PRESETS:
        raise InputError(f"--network {preset}: must be one of {', '.join(PRESETS)}")
    base = PRESETS[preset] if preset is not None else NetworkConditions()
    overrides = {"delay_ms": delay_ms, "jitter_ms": jitter_ms, "loss": loss, "bandwidth_mbit": bandwidth_mbit}
    return replace(base, **{name: value for name, value in overrides.items() if value is not None})
