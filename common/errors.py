"""The errors that a person is meant to read."""

from pathlib import Path


class InputError(Exception):
    """Something the user gave (file, flag, configuration, message, checkpoint) cannot be used.

    The message is one line that names the thing and says how to mend it; commands print it and exit with 2.
    """


class Failure(Exception):
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
        InputError: there is nothing at the path, or it is a folder.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder; {what} must be a file")
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the path of {what}")
    return path
