"""Files that are read again while the server runs."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from knowledge_boosting.common.errors import InputError

_log = logging.getLogger("kb-server")

_LOOK_EVERY = 1.0  # seconds

T = TypeVar("T")


class Reloading(Generic[T]):
    """What files hold, read again once they have changed. What cannot be used is logged once, and changes nothing."""

    def __init__(self, paths: Sequence[Path], read: Callable[[], T]) -> None:
        """Read the files.

        Args:
            read: what to make of them; raises InputError if they cannot be used.

        Raises:
            InputError: from ``read``.
        """
        self._paths, self._read = paths, read
        self._lock = threading.Lock()
        self._stamps = self._look()
        self._value = read()
        self._looked_at = time.monotonic()

    def get(self) -> T:
        """What the files hold now, or held a second ago. From any thread."""
        with self._lock:
            if time.monotonic() - self._looked_at >= _LOOK_EVERY:
                self._looked_at = time.monotonic()
                # Before they are read: what changes meanwhile is seen next time.
                stamps = self._look()
                if stamps != self._stamps:
                    self._stamps = stamps
                    self._reload()
            return self._value

    def _reload(self) -> None:
        names = ", ".join(map(str, self._paths))
        try:
            self._value = self._read()
        except InputError as error:
            _log.error("%s: changed, and cannot be used; what was read before stays (%s)", names, error)
        else:
            _log.info("%s: changed, and read again", names)

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in self._paths]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
