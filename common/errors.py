"""The exceptions whose messages are printed for the user."""

import os
import stat
from pathlib import Path

_MAX_LENGTH = 1000  # characters of a message; a value that it quotes can have any length


class Error(Exception):
    """The base class of this package's exceptions. The text is always one line of limited length."""

    def __init__(self, message: str) -> None:
        line = " ".join(message.splitlines())
        if len(line) > _MAX_LENGTH:
            # The beginning names the subject, and the end says what is wrong with it.
            line = f"{line[: _MAX_LENGTH // 2]} … {line[-_MAX_LENGTH // 2 :]}"
        super().__init__(line)


class InputError(Error):
    """A user's input (file, flag, configuration, message or checkpoint) cannot be used.

    The message is one line that names the input and says how to fix it. Commands print it and exit with 2.
    """


class Failure(Error):
    """The input is valid, but the task failed. Commands print the message, which is one line, and exit with 1."""


def reason(error: Exception, subject: object = "") -> str:
    """Return an exception's text as one line, without the leading ``subject``, which the caller prints itself."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return text.removeprefix(str(subject)).lstrip(": ")


def existing_file(path: Path, what: str) -> Path:
    """Return the path if it is that of a file.

    Args:
        path: The path to check.
        what: What the file should be, for error messages.

    Raises:
        InputError: The path does not exist or cannot be read, or it is that of a folder, a pipe or a device.
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
        raise InputError(f"{path}: is not a regular file; give the path of {what}")
    return path


def printable(path: object) -> str:
    """Return a path or text that can be printed anywhere: invalid UTF-8 and control characters become escapes."""
    text = os.fsencode(str(path)).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
