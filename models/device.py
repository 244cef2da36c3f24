"""Interprets the flags ``--device`` and ``--precision`` of commands."""

import torch

from knowledge_boosting.common.errors import InputError

_TYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,  # products have 10 bits of mantissa
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


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


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the type of weights and features for a precision, and set how torch multiplies float32 in this process.

    Raises:
        InputError: the name is not ``float32``, ``tf32``, ``float16`` or ``bfloat16``, or the device is a CPU, which
            only supports ``float32``.
    """
    if name not in _TYPES:
        raise InputError(f"--precision {name}: must be one of {', '.join(_TYPES)}")
    if device.type == "cpu" and name != "float32":
        raise InputError(f"--precision {name}: is for a GPU; leave it out")
    # The default of torch for LSTMs and convolutions is TF32.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    return _TYPES[name]
