"""A network namespace in which every packet is seen: ``unshare --net python -m tests.quiet_network FOLDER``.

Every address leads back to this machine, so that whatever a process sends to the world is sent, and seen. Runs a
server, a live client, an export and a training beside one another, and prints as JSON their exit codes and the packets
that were none of the session's.
"""

import contextlib
import json
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.processes import PATIENCE, command

PORT = 50051
STRANGER = "somebody.example"


class Sniffer:
    """Takes down what goes over the loopback interface."""

    def __init__(self) -> None:
        self.foreign: list[str] = []
        self.sessions = 0  # packets of our own session
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))  # ETH_P_ALL
        self._socket.bind(("lo", 0))
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            packet = self._socket.recv(65536)
            version = packet[0] >> 4
            start, protocol = ((packet[0] & 15) * 4, packet[9]) if version == 4 else (40, packet[6])
            ports = struct.unpack("!HH", packet[start : start + 4])
            if protocol == socket.IPPROTO_TCP and PORT in ports:
                self.sessions += 1
            else:
                self.foreign.append(f"IPv{version}, protocol {protocol}, ports {ports}: {packet[start + 8 :][:60]!r}")


def main(folder: Path) -> None:
    for arguments in (["link", "set", "lo", "up"], ["route", "add", "local", "default", "dev", "lo"]):
        subprocess.run(["ip", *arguments], check=True)
    sniffer = Sniffer()
    server = subprocess.Popen(
        command("kb-server", "--bundle", folder / "bundle", "--port", PORT, "--device", "cpu", "--max-sessions", 2),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdout is not None
    assert "listening" in server.stdout.readline()
    calls = {
        "live": command(
            *("kb-client", "live", "--bundle", folder / "bundle", "--server", f"localhost:{PORT}"),
            *("--input", folder / "in.wav", "--output", folder / "out.wav"),
        ),
        "export": command("kb-export", "--untrained", "--config", folder / "config.json", "-o", folder / "exported"),
        "train": command("kb-train", "--config", folder / "train.json", "--run_dir", folder / "run"),
    }
    running = {name: subprocess.Popen(call, stdout=sys.stderr) for name, call in calls.items()}
    codes = {name: process.wait() for name, process in running.items()}
    server.terminate()
    codes["server"] = server.wait()
    # What a process asks of the world is seen: this comes after all that was asked before.
    with contextlib.suppress(OSError):
        socket.getaddrinfo(STRANGER, 443)
    deadline = time.monotonic() + PATIENCE
    while not any(ours := ["somebody" in packet for packet in list(sniffer.foreign)]):
        assert time.monotonic() < deadline, "a look-up of a name is not seen, so that nothing is known"
        time.sleep(0.01)
    foreign = sniffer.foreign[: ours.index(True)]
    print(json.dumps({"codes": codes, "foreign": foreign, "sessions": sniffer.sessions}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
