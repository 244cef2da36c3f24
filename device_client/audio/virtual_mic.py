"""A microphone that other programs can pick, and that hears what is played here. Linux, PulseAudio or PipeWire."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from knowledge_boosting.common.errors import InputError

OUTPUT_DEVICE = "pulse"  # PortAudio's name of the sound server, through ALSA


@contextmanager
def virtual_mic(name: str, rate: int) -> Iterator[None]:
    """A null sink, which streams opened in this block play to, and a source that is fed by it; gone afterwards.

    Args:
        rate: of both, hertz.

    Raises:
        InputError: the name cannot be used, or there is no sound server to ask.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise InputError(f"--virtual-mic {name}: must be of letters, digits, - and _")
    if shutil.which("pactl") is None:
        raise InputError(
            "--virtual-mic needs Linux with PulseAudio or PipeWire, and pactl: apt-get install pulseaudio-utils"
        )
    for line in _pactl("list", "short", "sources").splitlines():
        if line.split("\t")[1:2] == [name]:
            raise InputError(f"--virtual-mic {name}: there is a microphone of that name already; choose another")
    sink = f"{name}-feed"
    with ExitStack() as stack:
        for module in (
            ["module-null-sink", f"sink_name={sink}", f"rate={rate}", "channels=2", "format=float32le"],
            ["module-remap-source", f"source_name={name}", f"master={sink}.monitor"],
        ):
            kind = "sink" if "null" in module[0] else "source"
            number = _pactl("load-module", *module, f"{kind}_properties=device.description={name}").strip()
            stack.callback(_pactl, "unload-module", number)
        before = os.environ.get("PULSE_SINK")
        os.environ["PULSE_SINK"] = sink  # the sound server's client library looks there for where to play
        try:
            yield
        finally:
            if before is None:
                del os.environ["PULSE_SINK"]
            else:
                os.environ["PULSE_SINK"] = before


def _pactl(*arguments: str) -> str:
    result = subprocess.run(["pactl", *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        words = (result.stderr.strip() or "no answer").splitlines()[0]
        raise InputError(f"--virtual-mic: pactl {arguments[0]}: {words}; is PulseAudio or PipeWire running?")
    return result.stdout
