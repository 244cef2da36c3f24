"""How a worker process begins, so that it ends with the process that started it."""

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait


def end_with_parent() -> None:
    """Call first in a worker: it leaves Ctrl-C to its parent, and ends when the parent does, killed or not."""
    # Ctrl-C reaches every process of a terminal; the first one ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(parent: int) -> None:
    # A killed parent cannot end its workers, and they would wait for it for ever.
    wait([parent])
    os._exit(1)
