"""Measures the latency of live sound and compares it with what is shown: ``python -m benchmarks.live_latency``.

Needs PulseAudio. The microphone is the monitor of a null sink, and the loudspeaker is the same sink. ``kb-client live``
plays its input (``--play bypass``), so a click that another program plays into the sink comes back again and again. The
time between two of these echoes is the latency from microphone to loudspeaker.
"""

import argparse
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.processes import command

_READY_FRAMES = 400  # of the session, before the click is played
_ECHO_SECONDS = 2.0
_THRESHOLD = 0.2


@contextmanager
def sound_server(folder: Path, rate: int) -> Iterator[dict[str, str]]:
    """Run a daemon with one null sink, and yield the environment of programs that use it."""
    environment = {
        **os.environ,
        **dict.fromkeys(("HOME", "XDG_RUNTIME_DIR", "PULSE_RUNTIME_PATH"), str(folder)),
        "PULSE_SERVER": f"unix:{folder}/socket",
        "PULSE_SOURCE": "room.monitor",
        "PULSE_SINK": "room",
    }
    call = ["pulseaudio", "-n", "--daemonize=no", "--exit-idle-time=-1", "--use-pid-file=no", "--disable-shm=yes"]
    call += ["-L", f"module-native-protocol-unix auth-anonymous=1 socket={folder}/socket"]
    call += ["-L", f"module-null-sink rate={rate} channels=2 format=float32le sink_name=room"]
    daemon = subprocess.Popen(call, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while subprocess.run(["pactl", "info"], env=environment, capture_output=True, check=False).returncode:
            time.sleep(0.1)
        yield environment
    finally:
        daemon.kill()
        daemon.wait()


def measure(rate: int, buffer_ms: float) -> tuple[float, float, int]:
    """Return the shown and the measured latency in ms, and the number of echoes."""
    form = ["--raw", "--rate", str(rate), "--channels", "2", "--format", "float32le"]
    with tempfile.TemporaryDirectory() as name, sound_server(Path(name), rate) as environment:
        folder = Path(name)
        click = np.zeros((rate // 2, 2), np.float32)
        click[rate // 4 : rate // 4 + rate // 1000] = 0.5
        (folder / "click.raw").write_bytes(click.tobytes())
        (folder / "silence.raw").write_bytes(bytes(8 * rate * 300))
        play = ["pacat", "--playback", "--device", "room", *form, "--latency-msec", "20"]
        recording = ["parec", "--device", "room.monitor", *form, "--latency-msec", "4", str(folder / "recorded.raw")]
        flags = ["--bundle", "ss-alone", "--input", "pulse", "--output", "pulse", "--rate", rate, "--play", "bypass"]
        live = command("kb-client", "live", "--json-lines", "--buffer-ms", buffer_ms, *flags)
        with (
            # A null sink works in blocks of two seconds unless a program asks for a lower latency.
            subprocess.Popen([*play, str(folder / "silence.raw")], env=environment) as keeper,
            subprocess.Popen(recording, env=environment) as recorder,
            subprocess.Popen(live, env=environment, stdout=subprocess.PIPE, text=True) as session,
        ):
            assert session.stdout is not None
            for line in session.stdout:
                figures = json.loads(line)
                if figures.get("frames", 0) > _READY_FRAMES:
                    break
            subprocess.run([*play, str(folder / "click.raw")], env=environment, check=True)
            time.sleep(_ECHO_SECONDS)
            session.send_signal(signal.SIGINT)
            figures = json.loads(session.stdout.read().splitlines()[-1])
            for process in (recorder, keeper):
                process.send_signal(signal.SIGINT)
        content = (folder / "recorded.raw").read_bytes()
    left = np.frombuffer(content[: len(content) // 8 * 8], "<f4").reshape(-1, 2)[:, 0]
    loud = np.flatnonzero(np.abs(left) > _THRESHOLD)
    echoes = loud[np.diff(loud, prepend=-rate) > rate // 200]
    spacing = float(np.median(np.diff(echoes))) if len(echoes) > 1 else np.nan
    return float(figures["latency_ms"]), 1e3 * spacing / rate, len(echoes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=int, nargs="+", default=[16000, 44100, 48000])
    parser.add_argument("--buffers-ms", type=float, nargs="+", default=[20.0, 40.0])
    parser.add_argument("--json", type=Path, default=Path("out/live_latency.json"))
    options = parser.parse_args()
    table = Table("rate, Hz", "--buffer-ms", "shown, ms", "measured, ms", "echoes")
    results = []
    for rate in options.rates:
        for buffer_ms in options.buffers_ms:
            shown, measured, echoes = measure(rate, buffer_ms)
            table.add_row(str(rate), f"{buffer_ms:g}", f"{shown:.1f}", f"{measured:.1f}", str(echoes))
            figures = {"rate": rate, "buffer_ms": buffer_ms, "shown_ms": shown, "measured_ms": round(measured, 2)}
            results.append(figures)
    Console(width=80).print(table)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
