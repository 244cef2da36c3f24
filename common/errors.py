"""The errors that a person is meant to read."""

import os
import stat
from pathlib import Path

_LONGEST = 1000  # characters of a message: what it quotes may be of any length


class Error(Exception):
    """The base class of this package's errors. The text is one line of limited length, whatever it quotes."""

    def __init__(self, message: str) -> None:
        line = " ".join(message.splitlines())
        if len(line) > _LONGEST:
            # What is wrong stands at the end, what it is about at the beginning.
            line = f"{line[: _LONGEST // 2]} … {line[-_LONGEST // 2 :]}"
        super().__init__(line)


class InputError(Error):
    """Something the user gave (file, flag, configuration, message, checkpoint) cannot be used.

    The message is one line that names the thing and says how to fix it; commands print it and exit with 2.
    """


class Failure(Error):
    """The input is fine, but what was asked for could not be done. One line; commands print it and exit with 1."""


def reason(error: Exception, subject: object = "") -> str:
    """An exception's text as one line, without the name of the subject that the caller prints anyway."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return text.removeprefix(str(subject)).lstrip(": ")


def existing_file(path: Path, what: str) -> Path:
    """The path again if it is a readable file.

    Raises:
        InputError: there is nothing at the path that can be opened, or it is a folder.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such file; give the path of {what}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)}); give the path of {what}") from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{path}: is a folder; {what} must be a file")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: is no file; give the path of {what}")
    return path


def printable(path: object) -> str:
    """A text as every output can hold it: bytes that are no UTF-8, and control characters, are shown as codes."""
    text = os.fsencode(str(path)).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
