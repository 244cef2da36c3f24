"""Write files atomically, and check in advance that the outputs of a command do not overwrite any of its files."""

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

STANDARD = Path("-")  # standard input or output
_STANDARD_OUTPUTS = {STANDARD, Path("/dev/stdout"), Path("/dev/fd/1"), Path("/proc/self/fd/1")}
_STANDARD_INPUTS = {STANDARD, Path("/dev/stdin"), Path("/dev/fd/0"), Path("/proc/self/fd/0")}
_MAX_NAME_BYTES = 100  # of a file name that are used in the name of its temporary file


def is_standard_output(path: Path) -> bool:
    """Return whether a path is the standard output of this process."""
    return path in _STANDARD_OUTPUTS


def is_stream(path: Path) -> bool:
    """Return whether a path is a standard stream, a pipe or a device. Such a path is never replaced by a new file."""
    if path in _STANDARD_OUTPUTS | _STANDARD_INPUTS:
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def open_stream(path: Path, mode: str) -> BinaryIO:
    """Open a stream (see :func:`is_stream`) with the mode ``rb`` or ``wb``.

    Raises:
        OSError: The stream cannot be opened.
    """
    paths, descriptor = (_STANDARD_INPUTS, 0) if mode == "rb" else (_STANDARD_OUTPUTS, 1)
    # A descriptor works on every system, and does not truncate the file to which a standard stream is redirected.
    return open(descriptor, mode, closefd=False) if path in paths else path.open(mode)  # type: ignore[return-value]


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which replaces ``path`` when the block ends without an error.

    The temporary name keeps the suffix, because audio and image writers choose their format by it. Symbolic links are
    followed. A pipe, a device or standard output (``-``) receives the content when the block has ended.

    Raises:
        InputError: The folder does not exist or cannot be written, or the disk is full.
    """
    stream = is_stream(path)
    real_path = Path(tempfile.gettempdir()) / path.name if stream else Path(os.path.realpath(path))
    temporary = _temporary_file(real_path, path)
    try:
        yield temporary
        if stream:
            with temporary.open("rb") as source, open_stream(path, "wb") as target:
                shutil.copyfileobj(source, target)
        else:
            # mkstemp makes private files. The result must have the usual permissions of a new file.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(real_path)
    except OSError as error:
        raise InputError(f"{path}: cannot write ({reason(error)})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_file(real_path: Path, path: Path) -> Path:
    """Create a file in the folder of ``real_path``. ``path`` is the path that the user gave, for messages."""
    # The temporary name is longer than the original, which can already have the maximum length.
    stem = os.fsdecode(os.fsencode(real_path.stem)[:_MAX_NAME_BYTES])
    suffix = os.fsdecode(os.fsencode(real_path.suffix)[:_MAX_NAME_BYTES])
    try:
        handle, name = tempfile.mkstemp(prefix=f".{stem}-", suffix=suffix, dir=real_path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({reason(error)}); choose a folder you can write to") from None
    os.close(handle)
    return Path(name)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory in the same folder, which becomes ``path`` when the block ends without an error.

    Raises:
        InputError: ``path`` already exists and is not an empty directory, or it cannot be written.
    """
    check_new_folder(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = os.fsdecode(os.fsencode(path.name)[:_MAX_NAME_BYTES])
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


def write_buffered(path: Path, save: Callable[[io.BytesIO], object]) -> None:
    """Write a file whose content ``save`` writes into a buffer in memory.

    A full disk then raises OSError, whichever library makes the content.
    """
    buffer = io.BytesIO()
    save(buffer)
    path.write_bytes(buffer.getvalue())


def check_files(
    reads: Iterable[Path], writes: Iterable[Path], folders: Mapping[Path, Iterable[str]] | None = None
) -> None:
    """Check that a command can write all its outputs, and that none of them overwrites an input or another output.

    Files are compared by their identity in the file system, so that links and ``..`` in their paths do not matter.

    Args:
        reads: The files that the command reads.
        writes: The files that it writes.
        folders: The folders that it creates if necessary, with the names of the files that it writes there.

    Raises:
        InputError: An output is also an input or another output, or it cannot be written.
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
            raise InputError(f"{path}: two outputs have this name{same}; choose another name for one of them")
        if identity is not None:
            taken[identity] = path, False


def check_writable(path: Path) -> None:
    """Check that a file can be written at a path, by creating an empty file in the same folder.

    Raises:
        InputError: The file cannot be written, or the path is that of a folder.
    """
    if is_stream(path):
        if is_standard_output(path) and sys.stdout is not None and sys.stdout.isatty():
            raise InputError(f"{path}: standard output is a terminal; redirect it to a file or to another program")
        return
    real_path = Path(os.path.realpath(path))
    if os.path.isdir(real_path):  # noqa: PTH112 # Path.is_dir raises an error if the name is too long
        raise InputError(f"{path}: is a folder; give the name of a file")
    if not os.path.isdir(real_path.parent):  # noqa: PTH112
        raise InputError(f"{path}: there is no folder {path.parent}; create it first")
    try:
        real_path.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({reason(error)}); choose another name") from None
    _temporary_file(real_path, path).unlink()


def check_new_folder(path: Path) -> None:
    """Check that a new folder can be created at a path and filled with files.

    Raises:
        InputError: The path already exists and is not an empty folder, or it cannot be written.
    """
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"{path}: exists already; choose another name or remove it first")
        check_folder(path)
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({reason(error)}); choose another name") from None


def check_folder(path: Path) -> None:
    """Check that files can be written into a folder. Missing folders of its path are created later.

    Raises:
        InputError: The folder cannot be written or created, or a part of its path is a file.
    """
    folder = Path(os.path.realpath(path))
    try:
        while not folder.exists():
            folder = folder.parent
        if folder.is_dir():
            with tempfile.TemporaryDirectory(prefix=".", dir=folder) as probe:
                if not path.exists():
                    # This fails if the name is too long for the file system.
                    (Path(probe) / path.name).mkdir()
            return
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({reason(error)}); choose a folder you can write to") from None
    raise InputError(f"{path}: cannot write there ({folder} is a file); choose another folder")


def _identity(path: Path, standard: int) -> tuple[object, ...] | None:
    """Return a key that identifies a file. None for a device, which can be an input and an output at the same time."""
    try:
        status = os.fstat(standard) if path == STANDARD else path.stat()
        return None if stat.S_ISCHR(status.st_mode) else (status.st_dev, status.st_ino)
    except OSError:
        real_path = Path(os.path.realpath(path))
    try:
        folder = real_path.parent.stat()
    except OSError:
        return (str(real_path),)
    return folder.st_dev, folder.st_ino, real_path.name
