"""Measures how long live devices have no hints when their server shuts down and another server is available.

    python -m benchmarks.drain [--devices 10] [--times 5]

Prints one line for each repetition: how long the server took to end, and for every device the longest time without a
hint after the shutdown began, in milliseconds.
"""

import argparse
import tempfile
import time
from pathlib import Path

from tests.live_devices import LiveDevices
from tests.load import write_random_bundle
from tests.processes import running_server


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=10)
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_random_bundle(Path(folder), "tiny")
        for _ in range(options.times):
            print(_measure_once(bundle, options.devices), flush=True)


def _measure_once(bundle: Path, devices: int) -> str:
    with running_server(bundle) as first, running_server(bundle) as second:
        live = LiveDevices(bundle, [first.address, second.address], devices)
        time.sleep(4)
        left, began = live.frames, time.monotonic()
        first.stop()
        took = time.monotonic() - began
        time.sleep(3)
        live.stop()
    silences = [8 * live.longest_silence(device, left) for device in range(devices)]
    return f"server ended in {took:.2f} s; longest silence of each device (ms): {' '.join(map(str, silences))}"


if __name__ == "__main__":
    main()
