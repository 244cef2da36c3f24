"""The server's log: one JSON object a line on standard error, written so that nothing ever waits for its reader."""

import io
import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TextIO

_log = logging.getLogger("kb-server")

_LINES = 10_000  # that may wait for the reader
_LAST_SECONDS = 1.0  # that the reader has at the end for what still waits
_CALLERS = 1000  # whose refusals are counted apart
_KINDS = 8  # of a caller's refusals that wait to be told; further ones count as the last
_OTHERS = "others"


def log_event(event: str, **fields: object) -> None:
    """One structured log line."""
    _log.info({"event": event, **fields})


@contextmanager
def running_log() -> Iterator[None]:
    """In this block log to standard error, and let all else that writes there wait for nobody either."""
    before = sys.stderr
    sys.stderr = background = _Background(before)
    handler = logging.StreamHandler(background)
    handler.setFormatter(_JsonLines("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    try:
        yield
    finally:
        background.finish()
        sys.stderr = before


def end_log() -> None:
    """Give the reader a moment for what still waits."""
    if isinstance(sys.stderr, _Background):
        sys.stderr.finish()


class Refusals:
    """Logs calls that got nothing: of each caller at once, and then at most once a second, with a count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._callers: dict[str, _Refused] = {}

    def add(self, caller: str, event: str, **fields: object) -> None:
        """A refusal.

        Args:
            caller: whose refusals are counted together.
            event: of the log line, as its fields. Those of the same status and reason are counted in one line.
        """
        if caller not in self._callers and len(self._callers) >= _CALLERS:
            caller = _OTHERS
        known = self._callers.setdefault(caller, _Refused())
        kind = f"{event} {fields.get('status')} {fields.get('why')}"
        if kind not in known.waiting and len(known.waiting) >= _KINDS:
            kind = next(reversed(known.waiting))
        count = known.waiting[kind][0] if kind in known.waiting else 0
        known.waiting[kind] = count + 1, event, fields
        self._tell(caller)

    def flush(self) -> None:
        """Log what has been counted and is due. To be called now and then."""
        for caller in list(self._callers):
            self._tell(caller)

    def _tell(self, caller: str) -> None:
        known, now = self._callers[caller], self._clock()
        if now < known.due:
            return
        if not known.waiting:
            del self._callers[caller]
            return
        count, event, fields = known.waiting.pop(next(iter(known.waiting)))
        log_event(event, **fields, count=count)
        known.due = now + 1


class _Refused:
    """A caller's refusals that have not been told yet, by kind, and when one may be."""

    def __init__(self) -> None:
        self.waiting: dict[str, tuple[int, str, dict[str, object]]] = {}
        self.due = 0.0


class _Background(io.TextIOBase):
    """A text stream whose lines a thread of its own writes. Those that find no room are counted, and told of later."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(_LINES)
        self._lock = threading.Lock()
        self._begun, self._dropped = "", 0
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        """Leave text, which goes out once its line is whole."""
        with self._lock:
            whole, newline, self._begun = (self._begun + text).rpartition("\n")
            if newline:
                try:
                    self._lines.put_nowait(whole + newline)
                except queue.Full:
                    self._dropped += 1
        return len(text)

    def finish(self) -> None:
        """Wait, not for long, until all has been written."""
        try:
            self._lines.put(None, timeout=_LAST_SECONDS)
        except queue.Full:
            return
        self._thread.join(_LAST_SECONDS)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            with self._lock:
                dropped, self._dropped = self._dropped, 0
            if dropped:
                line = json.dumps({"event": "log_dropped", "count": dropped}) + "\n" + line
            try:
                self._write(line)
            except (OSError, ValueError):  # nobody reads it any more
                continue

    def _write(self, line: str) -> None:
        try:
            descriptor = self._stream.fileno()
        except OSError:  # it has none: a test's
            self._stream.write(line)
            self._stream.flush()
            return
        # Not by the stream, whose lock a write that never ends would keep from whoever closes it in the end.
        left = line.encode(errors="backslashreplace")
        while left:
            left = left[os.write(descriptor, left) :]


class _JsonLines(logging.Formatter):
    """An event as it is, anything else as the event ``log``."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")
        fields: dict[str, object] = {"time": time, "level": record.levelname}
        if isinstance(record.msg, dict):
            fields |= record.msg
        else:
            fields |= {"event": "log", "logger": record.name, "text": record.getMessage()}
        if record.exc_info:
            fields["trace"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)
