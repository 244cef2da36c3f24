"""A virtual microphone that other programs can select, with PulseAudio or PipeWire on Linux."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from knowledge_boosting.common.errors import InputError

OUTPUT_DEVICE = "pulse"  # name of the sound server in PortAudio, through ALSA


@contextmanager
def virtual_mic(name: str, rate: int) -> Iterator[None]:
    """Create a virtual microphone for the duration of the block.

    It is a source that is fed by a null sink. Streams that this process opens in the block play to that sink.

    Args:
        name: The name of the microphone: letters, digits, ``-`` and ``_``.
        rate: The sample rate of sink and source, Hz.

    Raises:
        InputError: The name cannot be used, or there is no sound server.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise InputError(f"--virtual-mic {name}: the name can contain only letters, digits, - and _")
    if shutil.which("pactl") is None:
        raise InputError(
            "--virtual-mic needs Linux with PulseAudio or PipeWire, and pactl; run apt-get install pulseaudio-utils"
        )
    for line in _pactl("list", "short", "sources").splitlines():
        if line.split("\t")[1:2] == [name]:
            raise InputError(f"--virtual-mic {name}: a microphone with this name exists already; choose another name")
    sink = f"{name}-feed"
    with ExitStack() as stack:
        for module in (
            ["module-null-sink", f"sink_name={sink}", f"rate={rate}", "channels=2", "format=float32le"],
            ["module-remap-source", f"source_name={name}", f"master={sink}.monitor"],
        ):
            kind = "sink" if "null" in module[0] else "source"
            number = _pactl("load-module", *module, f"{kind}_properties=device.description={name}").strip()
            stack.callback(_pactl, "unload-module", number)
        original = os.environ.get("PULSE_SINK")
        os.environ["PULSE_SINK"] = sink  # the client library of the sound server plays to this sink
        try:
            yield
        finally:
            if original is None:
                del os.environ["PULSE_SINK"]
            else:
                os.environ["PULSE_SINK"] = original


def _pactl(*arguments: str) -> str:
    result = subprocess.run(["pactl", *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        text = (result.stderr.strip() or "no answer").splitlines()[0]
        raise InputError(f"--virtual-mic: pactl {arguments[0]}: {text}; check that PulseAudio or PipeWire is running")
    return result.stdout
