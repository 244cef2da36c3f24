"""Writing files so that a reader, or a crash, never sees half of one, and that a call never destroys one of its own."""

import io
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from knowledge_boosting.common.errors import InputError, reason

STANDARD = Path("-")  # standard input, or output
_STANDARD_OUTPUTS = {STANDARD, Path("/dev/stdout"), Path("/dev/fd/1"), Path("/proc/self/fd/1")}
_STANDARD_INPUTS = {STANDARD, Path("/dev/stdin"), Path("/dev/fd/0"), Path("/proc/self/fd/0")}
_LONGEST_NAME = 100  # bytes of a name that go into that of its temporary file


def is_standard_output(path: Path) -> bool:
    """Whether the path is this process's standard output."""
    return path in _STANDARD_OUTPUTS


def is_stream(path: Path) -> bool:
    """Whether the path is a standard stream, a pipe or a device: read or written in one go, and never replaced."""
    if path in _STANDARD_OUTPUTS | _STANDARD_INPUTS:
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def open_stream(path: Path, mode: str) -> BinaryIO:
    """A stream (:func:`is_stream`), to be read (``rb``) or written (``wb``).

    Raises:
        OSError: it cannot be opened.
    """
    known = (_STANDARD_INPUTS, 0) if mode == "rb" else (_STANDARD_OUTPUTS, 1)
    # Opened by its number, a standard stream is the same on every system, and what was redirected is not cut off.
    return open(known[1], mode, closefd=False) if path in known[0] else path.open(mode)  # type: ignore[return-value]


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends without an error.

    The temporary name keeps the suffix, because audio and image writers choose their format by it. A link is followed,
    and a pipe or a device (``-``: standard output) is written to when the block has ended.

    Raises:
        InputError: the folder does not exist or cannot be written, or the disk is full.
    """
    stream = is_stream(path)
    place = Path(tempfile.gettempdir()) / path.name if stream else Path(os.path.realpath(path))
    temporary = _temporary_file(place, path)
    try:
        yield temporary
        if stream:
            with temporary.open("rb") as source, open_stream(path, "wb") as target:
                shutil.copyfileobj(source, target)
        else:
            # mkstemp makes files private; the result gets the permissions any new file would have.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(place)
    except OSError as error:
        raise InputError(f"{path}: cannot write ({reason(error)})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_file(place: Path, path: Path) -> Path:
    """A new file in the folder of ``place``, which is what ``path`` leads to."""
    # A name that the file system just about takes must not become too long.
    stem = os.fsdecode(os.fsencode(place.stem)[:_LONGEST_NAME])
    suffix = os.fsdecode(os.fsencode(place.suffix)[:_LONGEST_NAME])
    try:
        handle, name = tempfile.mkstemp(prefix=f".{stem}-", suffix=suffix, dir=place.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({reason(error)}); choose a folder you can write to") from None
    os.close(handle)
    return Path(name)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A temporary directory beside ``path`` that becomes ``path`` when the block ends without an error.

    Raises:
        InputError: ``path`` exists already and is not an empty directory, or cannot be written.
    """
    check_new_folder(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = os.fsdecode(os.fsencode(path.name)[:_LONGEST_NAME])
        temporary = Path(tempfile.mkdtemp(prefix=f".{prefix}-", dir=path.parent))
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({reason(error)}); choose a folder you can write to") from None
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            path.rmdir()
        temporary.rename(path)
    except OSError as error:
        raise InputError(f"{path}: cannot write ({reason(error)})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_by_memory(path: Path, save: Callable[[io.BytesIO], object]) -> None:
    """Write what ``save`` writes, so that a full disk is an OSError whichever library makes the bytes."""
    memory = io.BytesIO()
    save(memory)
    path.write_bytes(memory.getvalue())


def check_files(
    reads: Iterable[Path], writes: Iterable[Path], folders: Mapping[Path, Iterable[str]] | None = None
) -> None:
    """Whether a call that reads and writes these files can write all of them, and destroys none.

    Files are the same if the file system says so, whatever their paths: through links, ``..`` and other names.

    Args:
        folders: that are made if need be, and the names of the files to be written there.

    Raises:
        InputError: a file to be written is one that is read, or written a second time, or cannot be written.
    """
    taken: dict[tuple[object, ...], tuple[Path, bool]] = {}
    for path in reads:
        if (identity := _identity(path, 0)) is not None:
            taken[identity] = path, True
    writes, folders = list(writes), folders or {}
    for path in writes:
        check_writable(path)
    for folder in folders:
        check_folder(folder)
    for path in (*writes, *(folder / name for folder, names in folders.items() for name in names)):
        identity = _identity(path, 1)
        if identity is not None and identity in taken:
            other, is_read = taken[identity]
            same = "" if other == path else f" ({other})"
            if is_read:
                raise InputError(f"{path}: would overwrite an input{same}; choose another name")
            raise InputError(f"{path}: is written twice{same}; choose another name for one of the outputs")
        if identity is not None:
            taken[identity] = path, False


def check_writable(path: Path) -> None:
    """Whether a file of that name can be written, by writing an empty one beside it.

    Raises:
        InputError: it cannot, or the path is that of a folder.
    """
    if is_stream(path):
        if is_standard_output(path) and sys.stdout is not None and sys.stdout.isatty():
            raise InputError(f"{path}: standard output is a terminal; send it to a file or another program")
        return
    place = Path(os.path.realpath(path))
    if os.path.isdir(place):  # noqa: PTH112 # which has no error of its own for a name that is too long
        raise InputError(f"{path}: is a folder; give the name of a file")
    if not os.path.isdir(place.parent):  # noqa: PTH112
        raise InputError(f"{path}: no folder {path.parent}; make it first")
    try:
        place.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({reason(error)}); choose another name") from None
    _temporary_file(place, path).unlink()


def check_new_folder(path: Path) -> None:
    """Whether a folder of that name can be made, and filled.

    Raises:
        InputError: there is something there already, or it cannot be written.
    """
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"{path}: exists already; choose another name or remove it first")
        check_folder(path)
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({reason(error)}); choose another name") from None


def check_folder(path: Path) -> None:
    """Whether files can be written into a folder that is there, or that will be made with the folders above it.

    Raises:
        InputError: they cannot, or there is a file in the way.
    """
    folder = Path(os.path.realpath(path))
    try:
        while not folder.exists():
            folder = folder.parent
        if folder.is_dir():
            with tempfile.TemporaryDirectory(prefix=".", dir=folder) as probe:
                if not path.exists():
                    # Names that are too long for the file system are found out here.
                    (Path(probe) / path.name).mkdir()
            return
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({reason(error)}); choose a folder you can write to") from None
    raise InputError(f"{path}: cannot write there ({folder} is a file); choose another folder")


def _identity(path: Path, standard: int) -> tuple[object, ...] | None:
    """What tells the file from others; None for devices, which can be read and written at once."""
    try:
        status = os.fstat(standard) if path == STANDARD else path.stat()
        return None if stat.S_ISCHR(status.st_mode) else (status.st_dev, status.st_ino)
    except OSError:
        place = Path(os.path.realpath(path))
    try:
        folder = place.parent.stat()
    except OSError:
        return (str(place),)
    return folder.st_dev, folder.st_ino, place.name
