"""The log of the server: one JSON object per line on standard error. Logging never waits for the reader of the log."""

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

_MAX_LINES = 10_000  # lines that wait for the reader
_FLUSH_TIMEOUT = 1.0  # seconds for the remaining lines at the end
_MAX_CALLERS = 1000  # callers whose refusals are counted separately
_MAX_KINDS = 8  # kinds of pending refusals of a caller; further kinds are counted as the last one
_OTHERS = "others"


def log_event(event: str, **fields: object) -> None:
    """Write an event with its fields as one line of the log."""
    _log.info({"event": event, **fields})


@contextmanager
def background_log() -> Iterator[None]:
    """Log to standard error in this block. All other output to standard error is written in the background too."""
    original = sys.stderr
    sys.stderr = background = _BackgroundStream(original)
    handler = logging.StreamHandler(background)
    handler.setFormatter(_JsonLines("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    try:
        yield
    finally:
        background.finish()
        sys.stderr = original


def flush_log() -> None:
    """Wait for a short time until the remaining lines are written."""
    if isinstance(sys.stderr, _BackgroundStream):
        sys.stderr.finish()


class RefusalLog:
    """Logs refused calls. The first refusal of a caller is logged at once, further ones once a second with a count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._callers: dict[str, _PendingRefusals] = {}

    def add(self, caller: str, event: str, **fields: object) -> None:
        """Log or count a refusal.

        Args:
            caller: The caller. The rate of lines is limited for each caller.
            event: The event of the log line.
            fields: The fields of the log line. Refusals with the same event, status and reason share a line.
        """
        if caller not in self._callers and len(self._callers) >= _MAX_CALLERS:
            caller = _OTHERS
        refusals = self._callers.setdefault(caller, _PendingRefusals())
        kind = f"{event} {fields.get('status')} {fields.get('why')}"
        if kind not in refusals.pending and len(refusals.pending) >= _MAX_KINDS:
            kind = next(reversed(refusals.pending))
        count = refusals.pending[kind][0] if kind in refusals.pending else 0
        refusals.pending[kind] = count + 1, event, fields
        self._log_if_due(caller)

    def flush(self) -> None:
        """Log the counted refusals that are due. This must be called regularly."""
        for caller in list(self._callers):
            self._log_if_due(caller)

    def _log_if_due(self, caller: str) -> None:
        refusals, now = self._callers[caller], self._clock()
        if now < refusals.due:
            return
        if not refusals.pending:
            del self._callers[caller]
            return
        count, event, fields = refusals.pending.pop(next(iter(refusals.pending)))
        log_event(event, **fields, count=count)
        refusals.due = now + 1


class _PendingRefusals:
    """The refusals of a caller that are not logged yet, by kind, and the time at which the next line is due."""

    def __init__(self) -> None:
        self.pending: dict[str, tuple[int, str, dict[str, object]]] = {}
        self.due = 0.0


class _BackgroundStream(io.TextIOBase):
    """A text stream that writes its lines on a thread. If its buffer is full, lines are dropped, and then counted."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(_MAX_LINES)
        self._lock = threading.Lock()
        self._partial_line, self._dropped = "", 0
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        """Add text. A line is written when it is complete."""
        with self._lock:
            lines, newline, self._partial_line = (self._partial_line + text).rpartition("\n")
            if newline:
                try:
                    self._lines.put_nowait(lines + newline)
                except queue.Full:
                    self._dropped += 1
        return len(text)

    def finish(self) -> None:
        """Wait for a short time until all lines are written."""
        try:
            self._lines.put(None, timeout=_FLUSH_TIMEOUT)
        except queue.Full:
            return
        self._thread.join(_FLUSH_TIMEOUT)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            with self._lock:
                dropped, self._dropped = self._dropped, 0
            if dropped:
                line = json.dumps({"event": "log_dropped", "count": dropped}) + "\n" + line
            try:
                self._write(line)
            except (OSError, ValueError):  # the reader has closed the log
                continue

    def _write(self, line: str) -> None:
        try:
            descriptor = self._stream.fileno()
        except OSError:  # the stream of a test has no descriptor
            self._stream.write(line)
            self._stream.flush()
            return
        # A write that blocks forever would hold the lock of the stream, and so block whoever closes it.
        remaining = line.encode(errors="backslashreplace")
        while remaining:
            remaining = remaining[os.write(descriptor, remaining) :]


class _JsonLines(logging.Formatter):
    """Formats events as JSON. Records of other loggers become the event ``log``."""

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
