"""Test that devices move to the next server when their server shuts down."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.live_devices import LiveDevices
from tests.load import write_random_bundle
from tests.processes import PATIENCE, running_server

DEVICES = 3  # more of them, in one process beside two servers, can overload a small machine
SECOND = 125  # frames


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.mark.slow  # runs in real time, and needs an otherwise idle machine
def test_devices_of_a_draining_server_move_to_another_one(tmp_path: Path) -> None:
    bundle = write_random_bundle(tmp_path, "tiny")
    with running_server(bundle) as first, running_server(bundle) as second:
        live = LiveDevices(bundle, [first.address, second.address], DEVICES)
        try:
            wait_for("hints for all", lambda: all(sum(fused) > SECOND // 4 for fused in live.fused))
            assert {device.server for device in live.all} == {first.address}
            assert first.stop() == 0
            wait_for("the second server", lambda: {device.server for device in live.all} == {second.address})
            moved = live.frames
            wait_for("its hints", lambda: all(sum(fused[moved:]) > SECOND // 4 for fused in live.fused))
        finally:
            live.stop()
    for number, device in enumerate(live.all):
        # The second session began before the first one ended, so that no session was lost.
        assert [event.text for event in device.events] == [
            f"hints come from {first.address}",
            f"{first.address} shuts down; the client looks for another server",
            f"hints come from {second.address}",
        ]
        assert len(live.fused[number]) == live.frames
