"""``kb-client devices``: what there is to hear from and to play to."""

from rich.table import Table

from knowledge_boosting.common.cli import console, warn
from knowledge_boosting.device_client.audio.devices import Device, Direction, default_device, list_devices

_NONE = {
    "input": "there is no microphone here that can be heard; live needs one, or else sound files",
    "output": "there is no loudspeaker here that can be played to; live needs one, or else sound files",
}


def print_devices() -> None:
    """Print all devices, and mark the ones that ``kb-client live`` picks if it is not told any.

    Raises:
        InputError: PortAudio is missing.
    """
    devices = list_devices()
    directions: tuple[Direction, Direction] = ("input", "output")
    chosen = {direction: default_device(devices, direction) for direction in directions}
    if devices:
        console().print(_table(devices, chosen))
    else:
        print("no sound devices")
    missing = [direction for direction, device in chosen.items() if device is None]
    for direction in missing:
        warn(_NONE[direction])
    if missing:
        warn(
            "plug a device in, or on Linux install a sound server and its ALSA plug-in: "
            "apt-get install pulseaudio libasound2-plugins"
        )


def _table(devices: list[Device], chosen: dict[Direction, Device | None]) -> Table:
    table = Table("index", "name", "system", "inputs", "outputs", "Hz", "picked for")
    for device in devices:
        picked = [direction for direction, choice in chosen.items() if choice == device]
        channels = str(device.inputs), str(device.outputs)
        table.add_row(str(device.index), device.name, device.system, *channels, str(device.rate), ", ".join(picked))
    return table
