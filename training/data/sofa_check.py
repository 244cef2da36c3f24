"""Checks that a SOFA file can be used: ``python -m knowledge_boosting.training.data.sofa_check FILE``.

The check runs in a separate process, because a damaged file can make HDF5 crash or read endlessly. It prints the fault
as a JSON string, which is empty for a good file.
"""

import json
import sys
from pathlib import Path

import numpy as np

from knowledge_boosting.common.errors import reason

_FIELDS = ("Data.IR", "Data.SamplingRate", "Data.Delay", "SourcePosition", "ReceiverPosition")
_SECONDS = 20  # of processor time; a file with ten thousand directions takes two


def find_fault(path: Path) -> str:
    """Return why pyroomacoustics cannot read a file correctly and what to do; an empty string if it can."""
    import netCDF4

    try:
        with netCDF4.Dataset(path) as file:
            missing = [name for name in _FIELDS if name not in file.variables]
            if missing:
                return unusable_message(f"lacks {', '.join(missing)}")
            responses, delay, position = (file[name][:] for name in ("Data.IR", "Data.Delay", "SourcePosition"))
            spherical = getattr(file["SourcePosition"], "Type", "") == "spherical"
    except Exception as error:  # HDF5 raises exceptions of many types for damaged files
        return unusable_message(reason(error))
    if responses.ndim != 3 or responses.shape[1] != 2:
        return f"Data.IR is {list(responses.shape)}; give [directions, 2 ears, samples]"
    if not np.issubdtype(responses.dtype, np.floating) or position.ndim != 2 or position.shape[1] != 3:
        return unusable_message("Data.IR or SourcePosition has another type or shape")
    if not np.isfinite(responses).all() or not responses.any():
        return "Data.IR is zero, NaN or infinite; give another file"
    if delay.any():
        return "stores the delay between the ears in Data.Delay; give a file that includes it in Data.IR"
    # If no elevation is negative, pyroomacoustics interprets elevations as colatitudes.
    if not spherical or position[:, 1].min() >= 0:
        return "needs SourcePosition in spherical coordinates, some of them below the horizon; give another file"
    return ""


def unusable_message(why: str) -> str:
    """Return the message that a file is no usable SOFA file, for the reason ``why``."""
    return f"not usable as head-related responses ({why}); give a SOFA file (SimpleFreeFieldHRIR)"


if __name__ == "__main__":
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    print(json.dumps(find_fault(Path(sys.argv[1]))))
