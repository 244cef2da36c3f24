"""The entry points of all installed commands. Ctrl-C ends a command quietly even while its modules are loading."""

import importlib
import signal
from typing import NoReturn


def _start(module: str) -> NoReturn:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Nothing needs cleanup yet. Later, common.cli installs its own handler.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    importlib.import_module(module).main()
    raise AssertionError("every main() exits the process")


def kb_client() -> NoReturn:
    """Entry point of ``kb-client``."""
    _start("knowledge_boosting.device_client.main")


def kb_evaluate() -> NoReturn:
    """Entry point of ``kb-evaluate``."""
    _start("knowledge_boosting.training.commands.evaluate")


def kb_export() -> NoReturn:
    """Entry point of ``kb-export``."""
    _start("knowledge_boosting.models.export")


def kb_make_dataset() -> NoReturn:
    """Entry point of ``kb-make-dataset``."""
    _start("knowledge_boosting.training.commands.make_dataset")


def kb_make_voices() -> NoReturn:
    """Entry point of ``kb-make-voices``."""
    _start("knowledge_boosting.training.commands.make_voices")


def kb_server() -> NoReturn:
    """Entry point of ``kb-server``."""
    _start("knowledge_boosting.remote_server.main")


def kb_store_hints() -> NoReturn:
    """Entry point of ``kb-store-hints``."""
    _start("knowledge_boosting.training.commands.store_hints")


def kb_train() -> NoReturn:
    """Entry point of ``kb-train``."""
    _start("knowledge_boosting.training.commands.train")
