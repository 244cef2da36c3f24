"""``kb-client devices``: list the sound devices."""

from rich.table import Table

from knowledge_boosting.common.cli import console, full_table, warn
from knowledge_boosting.device_client.audio.devices import Device, Direction, default_device, list_devices

_NO_DEVICE = {
    "input": "this machine has no microphone; kb-client live needs one, or a sound file as --input",
    "output": "this machine has no loudspeaker; kb-client live needs one, or a sound file as --output",
}


def print_devices() -> None:
    """Print all devices, and mark those that ``kb-client live`` uses by default.

    Raises:
        InputError: sounddevice or PortAudio is not installed.
    """
    devices = list_devices()
    directions: tuple[Direction, Direction] = ("input", "output")
    defaults = {direction: default_device(devices, direction) for direction in directions}
    if devices:
        console().print(_table(devices, defaults))
    else:
        print("no sound devices")
    missing = [direction for direction, device in defaults.items() if device is None]
    for direction in missing:
        warn(_NO_DEVICE[direction])
    if missing:
        warn(
            "connect a device, or on Linux install a sound server and its ALSA plug-in with "
            "apt-get install pulseaudio libasound2-plugins"
        )


def _table(devices: list[Device], defaults: dict[Direction, Device | None]) -> Table:
    table = full_table("index", "name", "system", "inputs", "outputs", "Hz", "default for")
    for device in devices:
        default_for = ", ".join(direction for direction, choice in defaults.items() if choice == device)
        channels = str(device.inputs), str(device.outputs)
        table.add_row(str(device.index), device.name, device.system, *channels, str(device.rate), default_for)
    return table
