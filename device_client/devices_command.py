"""``kb-client devices``: what there is to hear from and to play to."""

from rich.console import Console
from rich.table import Table

from device_client.device_audio import find_device, list_devices


def print_devices() -> None:
    """Print all devices, and mark the ones that ``kb-client live`` picks if it is not told any.

    Raises:
        InputError: PortAudio is missing, or there is no device to hear from or to play to.
    """
    devices, source, target = list_devices(), find_device(None, "input"), find_device(None, "output")
    table = Table("index", "name", "system", "inputs", "outputs", "Hz", "picked for")
    for device in devices:
        picked = [way for way, choice in (("input", source), ("output", target)) if choice == device]
        channels = str(device.inputs), str(device.outputs)
        table.add_row(str(device.index), device.name, device.system, *channels, str(device.rate), ", ".join(picked))
    Console().print(table)
