"""Interprets the flag ``--device`` of commands."""

import torch

from knowledge_boosting.common.errors import InputError


def pick_device(name: str) -> torch.device:
    """Return the device that ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>`` denotes on this machine.

    Raises:
        InputError: the name is none of these, or the device does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if name != "cuda" and not (kind == "cuda" and index.isascii() and index.isdecimal()):
        raise InputError(f"--device {name}: must be auto, cpu, cuda or cuda:INDEX")
    if int(index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; try --device cpu"
        )
    return torch.device(name)
