"""Compiles the C++ libraries for a CPU when they are first needed, and keeps them in the user's cache folder.

The compiler is ``$CXX``, or ``c++`` by default. ``$CXXFLAGS`` are added to its flags, so ``CXXFLAGS=-march=x86-64-v3``
builds for AVX2.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from knowledge_boosting.common.cli import warn
from knowledge_boosting.common.errors import InputError, reason
from knowledge_boosting.common.files import atomic_file

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Library:
    """A library and its C++ sources."""

    name: str
    sources: tuple[str, ...]
    without: str  # what happens without it


TRAINING = Library(
    "training",
    ("cpu_lstm.cpp", "cpu_attention.cpp"),
    "training and evaluation take two to four times as long",
)
STEP = Library("step", ("cpu_step.cpp",), "the large network takes several times as long on this CPU")
_HEADER = "vectors.h"
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-std=c++17")


_WHOLE = 16  # frames
_for_whole_signals = False


def use_for_whole_signals() -> None:
    """From now on, use the library for training also without gradients, where a call has many frames.

    This is for commands that process many signals. Others would spend more time on compiling the library.
    """
    global _for_whole_signals
    _for_whole_signals = True


def is_wanted(frames: int, *, trains: bool) -> bool:
    """Return whether to use the library for training in a call of a number of frames, with or without gradients."""
    return trains or (_for_whole_signals and frames >= _WHOLE)


def library(wanted: Library = TRAINING, *, quiet: bool = False) -> ctypes.CDLL | None:
    """Return a library, or None if it cannot be compiled or loaded.

    Unless ``quiet``, the first call without a library prints a warning.
    """
    found = _library(wanted, os.environ.get("CXX", "c++"), os.environ.get("CXXFLAGS", ""))
    if isinstance(found, ctypes.CDLL):
        return found
    if not quiet:
        _warn_once(f"{wanted.without} without the C++ library: {found}")
    return None


def required_library(wanted: Library = TRAINING) -> ctypes.CDLL:
    """Return a library, which must be available."""
    found = library(wanted)
    assert found is not None
    return found


def pointer(tensor: "Tensor | None") -> ctypes.c_void_p:
    """Return the address of a contiguous float32 tensor for the library; a null pointer for None."""
    if tensor is None:
        return ctypes.c_void_p()
    assert tensor.is_contiguous()
    assert tensor.is_floating_point()
    assert tensor.element_size() == 4
    return ctypes.c_void_p(tensor.data_ptr())


_warn_once = functools.cache(warn)


@functools.cache
def _library(wanted: Library, compiler: str, more_flags: str) -> ctypes.CDLL | str:
    """Return a library, or what is wrong."""
    try:
        flags = [*_FLAGS, *shlex.split(more_flags)]
        # The macros identify the compiler and the processor, because both affect the result.
        macros = _output([compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull])
        units = [Path(__file__).with_name(name) for name in wanted.sources]
        sources = [*units, Path(__file__).with_name(_HEADER)]
        parts = (macros, shlex.join(flags).encode(), *(source.read_bytes() for source in sources))
        digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
        with _folder() as folder:
            path = folder / f"{wanted.name}-{digest}.so"
            if not _is_safe(path):
                path.unlink(missing_ok=True)  # without this, writing the file would follow a link
                with atomic_file(path) as temporary:
                    _output([compiler, *flags, *map(str, units), "-o", str(temporary)])
                path.chmod(0o600)
            found = ctypes.CDLL(str(path))
        found.instructions.restype = ctypes.c_char_p
        return found
    except (OSError, ValueError, RuntimeError, InputError) as error:
        return reason(error)


def _output(call: list[str]) -> bytes:
    try:
        result = subprocess.run(call, capture_output=True, check=False)
    except OSError as error:
        raise InputError(f"there is no C++ compiler {call[0]} ({reason(error)}); install one, or set CXX") from None
    if result.returncode:
        lines = result.stderr.decode(errors="replace").splitlines()
        said = next((line for line in lines if "error" in line), f"exit code {result.returncode}")
        raise InputError(f"the C++ compiler {call[0]} fails ({said}); set CXX to another one")
    return result.stdout


@contextmanager
def _folder() -> Iterator[Path]:
    """Yield the folder for the library: the cache folder, or a temporary one if others can write to the cache."""
    if sys.platform == "win32":
        raise InputError("compiled code needs Linux or macOS")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "knowledge-boosting"
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        cache = cache.resolve()
        if cache.stat().st_uid == os.getuid():
            cache.chmod(0o700)
    except OSError as error:
        raise InputError(
            f"{cache}: cannot write there ({reason(error)}); set XDG_CACHE_HOME to a folder you can write to"
        ) from None
    unsafe = next((folder for folder in (cache, *cache.parents) if not _is_safe(folder)), None)
    if unsafe is None:
        yield cache
        return
    warn(f"{unsafe}: others can write there, so the library is not kept; set XDG_CACHE_HOME to another folder")
    with tempfile.TemporaryDirectory() as private:
        yield Path(private)


def _is_safe(path: Path) -> bool:
    """Return whether only this user or the system can have written a path.

    A file must belong to this user. A folder can also belong to the system, and others can have write access if its
    sticky bit prevents them from replacing files.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    is_folder = stat.S_ISDIR(status.st_mode)
    owners = (os.getuid(), 0) if is_folder else (os.getuid(),)
    shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not (is_folder and status.st_mode & stat.S_ISVTX)
    return (is_folder or stat.S_ISREG(status.st_mode)) and status.st_uid in owners and not shared
