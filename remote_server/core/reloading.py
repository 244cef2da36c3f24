"""Read files again when they change while the server runs."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from knowledge_boosting.common.errors import InputError

_log = logging.getLogger("kb-server")

_CHECK_INTERVAL = 1.0  # seconds

T = TypeVar("T")


class Reloading(Generic[T]):
    """A value that is read from files, again when they change. An invalid change is logged once and has no effect."""

    def __init__(self, paths: Sequence[Path], read: Callable[[], T]) -> None:
        """Read the files.

        Args:
            paths: The files that are checked for changes.
            read: Reads the value from the files. It raises InputError if they are invalid.

        Raises:
            InputError: From ``read``.
        """
        self._paths, self._read = paths, read
        self._lock = threading.Lock()
        self._stamps = self._read_stamps()
        self._value = read()
        self._checked_at = time.monotonic()

    def get(self) -> T:
        """Return the value, which can be up to one second old. This can be called from any thread."""
        with self._lock:
            if time.monotonic() - self._checked_at >= _CHECK_INTERVAL:
                self._checked_at = time.monotonic()
                # The stamps are taken before the files are read, so that a change during the reading is noticed later.
                stamps = self._read_stamps()
                if stamps != self._stamps:
                    self._stamps = stamps
                    self._reload()
            return self._value

    def _reload(self) -> None:
        names = ", ".join(map(str, self._paths))
        try:
            self._value = self._read()
        except (InputError, OSError) as error:
            _log.error("%s: the change is invalid and has no effect (%s)", names, error)
        else:
            _log.info("%s: changed and read again", names)

    def _read_stamps(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in self._paths]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
