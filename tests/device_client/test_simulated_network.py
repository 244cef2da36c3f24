"""Tests for the simulated links, whose arrival times are compared with closed forms."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from knowledge_boosting.common.links import (
    PACKET_OVERHEAD,
    PRESETS,
    Link,
    NetworkConditions,
    Trace,
    make_links,
    network_conditions,
    read_trace,
)

SPACING = 8_000_000  # ns


def arrivals(conditions: NetworkConditions, packets: int, size: int = 1000, seed: int = 0) -> NDArray[np.int64]:
    uplink, _ = make_links(conditions, spacing_ns=SPACING, seed=seed)
    return np.array([uplink.arrival(n * SPACING, size) for n in range(packets)])


def test_the_round_trip_is_half_up_and_half_down() -> None:
    up, down = make_links(NetworkConditions(delay_ms=33), spacing_ns=SPACING, seed=0)
    assert up.arrival(0, 100) == 16_500_000
    assert down.arrival(16_500_000, 100) == 33_000_000


def test_jitter_is_exponential_with_half_the_mean_each_way() -> None:
    # Packets that are a second apart never wait for each other.
    link, _ = make_links(NetworkConditions(delay_ms=10, jitter_ms=20), spacing_ns=SPACING, seed=7)
    extra = [(link.arrival(n * 10**9, 100) - n * 10**9) / 1e6 - 5 for n in range(4000)]
    assert stats.kstest(extra, "expon", args=(0, 10)).pvalue > 0.001


def test_a_lost_packet_delays_everything_behind_it() -> None:
    times = arrivals(NetworkConditions(delay_ms=20, loss=0.01), 5000)
    sent = np.arange(5000) * SPACING
    late = times - (sent + 10_000_000)
    assert late.min() == 0
    # A loss is detected by the three packets that follow, so the retransmission takes a round trip and three spacings.
    stall = 20_000_000 + 3 * SPACING
    lost = np.flatnonzero(late == stall)
    behind = np.arange(1, 6)  # packets that are sent before the retransmission arrives, 5.5 spacings later
    assert all((late[first + behind] >= stall - behind * SPACING).all() for first in lost[:-1])
    alone = [first for first in lost[:-1] if late[first + 6] == 0]
    assert all((times[first + behind] == times[first]).all() for first in alone)
    # About one packet in a hundred is lost. A few losses are hidden behind an earlier one.
    assert 25 < len(alone) <= len(lost) < 70


def test_bandwidth_makes_packets_queue() -> None:
    size = 10_000
    times = arrivals(NetworkConditions(bandwidth_mbit=1), 50, size)
    one = (size + PACKET_OVERHEAD) * 8 * 1000  # ns at 1 Mbit/s, more than the spacing
    assert times.tolist() == [(n + 1) * one for n in range(50)]


@given(
    seed=st.integers(0, 2**31),
    jitter=st.floats(0, 50),
    loss=st.floats(0, 0.5),
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=60),
)
def test_delivery_is_in_order_never_early_and_repeatable(
    seed: int, jitter: float, loss: float, sizes: list[int]
) -> None:
    conditions = NetworkConditions(delay_ms=10, jitter_ms=jitter, loss=loss, bandwidth_mbit=20)

    def once() -> list[int]:
        link, _ = make_links(conditions, spacing_ns=SPACING, seed=seed)
        return [link.arrival(n * SPACING, size) for n, size in enumerate(sizes)]

    times = once()
    assert times == sorted(times)
    assert all(time >= n * SPACING + 5_000_000 for n, time in enumerate(times))
    assert once() == times


def test_the_two_directions_and_seeds_differ() -> None:
    conditions = NetworkConditions(jitter_ms=20)
    up, down = make_links(conditions, spacing_ns=SPACING, seed=0)
    other, _ = make_links(conditions, spacing_ns=SPACING, seed=1)
    assert len({link.arrival(0, 100) for link in (up, down, other)}) == 3


def test_a_trace_replaces_the_simulation_and_repeats() -> None:
    trace = Trace(up=(5, 100, 0), down=(7,))
    up, down = make_links(NetworkConditions(), spacing_ns=10, seed=0, trace=trace)
    assert [up.arrival(10 * n, 1) for n in range(5)] == [5, 110, 110, 110, 140]
    assert [down.arrival(10 * n, 1) for n in range(3)] == [7, 17, 27]


def test_flags_override_a_preset() -> None:
    conditions = network_conditions("lte", delay_ms=30, jitter_ms=None, loss=0, bandwidth_mbit=None)
    assert conditions == NetworkConditions(30, PRESETS["lte"].jitter_ms, 0, PRESETS["lte"].bandwidth_mbit)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_enough_bandwidth(preset: str) -> None:
    """Every preset must have the bandwidth for uncompressed hints, otherwise all hints would be late."""
    payload = 8 * 97 * 4 + PACKET_OVERHEAD
    bandwidth = PRESETS[preset].bandwidth_mbit
    assert bandwidth is not None
    assert payload * 8 / (SPACING / 1e9) < bandwidth * 1e6
    assert isinstance(make_links(PRESETS[preset], spacing_ns=SPACING, seed=0)[0], Link)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_trace_can_begin_with_a_byte_order_mark(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("up_ms,down_ms\n1,2\n3,4.5\n", encoding=encoding)
    trace = read_trace(tmp_path / "trace.csv")
    assert (trace.up, trace.down) == ((1_000_000, 3_000_000), (2_000_000, 4_500_000))
