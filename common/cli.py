"""How every command line of the project behaves: one clear line for a user's mistake, and the exit codes.

0 done; 2 the input or the call is at fault; 1 anything else (an interruption by Ctrl-C or SIGTERM included).
"""

import importlib.util
import signal
import sys
from types import FrameType
from typing import NoReturn

import typer

from common.errors import Failure, InputError

_INTERRUPTED = 130  # what typer makes of Ctrl-C
_OURS = {"common", "device_client", "models", "protos", "remote_server", "training"}


def _terminated(_number: int, _frame: FrameType | None) -> NoReturn:
    # As an exception SIGTERM unwinds the stack, so that helpers are stopped and temporary files removed.
    raise SystemExit(1)


def run(app: typer.Typer, name: str, extra: str) -> NoReturn:
    """Run a typer application as the command ``name`` and leave the process with its exit code.

    Args:
        extra: of this project's package, what the command needs to be installed. A module that needs a package of it
            imports it no sooner than the application runs.
    """
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = app(prog_name=name, standalone_mode=False)
    except InputError as error:
        _leave(name, str(error), 2)
    except typer.TyperException as error:
        # Without a message typer has printed the help already.
        message = error.format_message()
        _leave(name, f"{message} (see '{name} --help')", 2) if message else sys.exit(2)
    except Failure as error:
        _leave(name, str(error), 1)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if not missing or missing in _OURS:
            raise
        _leave(name, f"this needs {missing}: pip install 'knowledge-boosting[{extra}]'", 1)
    except (typer.Abort, KeyboardInterrupt):
        _leave(name, "interrupted", 1)
    if code == _INTERRUPTED:
        _leave(name, "interrupted", 1)
    sys.exit(code or 0)


def _leave(name: str, message: str, code: int) -> NoReturn:
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def check_installed(*modules: str) -> None:
    """Find out before a long work whether what it imports only later is there.

    Raises:
        ModuleNotFoundError: it is not; :func:`run` says what to install.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def warn(message: str) -> None:
    """Print one warning line on stderr."""
    print(f"warning: {message}", file=sys.stderr)
