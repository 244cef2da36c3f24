"""How every command line of the project behaves: one clear line for a user's mistake, and the exit codes.

0 done; 2 the input or the call is at fault; 1 anything else (an interruption by Ctrl-C, SIGTERM or SIGHUP, and a
standard output that takes no more, included).
"""

import contextlib
import errno
import importlib.metadata
import importlib.util
import io
import os
import signal
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
import typer.core
import typer.main

from knowledge_boosting.common.errors import Failure, InputError, printable, reason

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from rich.console import Console

_INTERRUPTED = 130  # what typer makes of Ctrl-C
_FAULTS_OF_PATHS = {errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EPERM}
_CONTEXT = {"help_option_names": ["-h", "--help"]}
_OURS = "knowledge_boosting"
_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Terminated(SystemExit):
    """A signal, Ctrl-C's included, asked the command to end."""


def _terminated(_number: int, _frame: FrameType | None) -> NoReturn:
    # As an exception a signal unwinds the stack, so that helpers are stopped and temporary files removed.
    raise _Terminated(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"knowledge-boosting {importlib.metadata.version('knowledge-boosting')}")
        raise typer.Exit


def _version(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Has the option of every command; typer makes options of a function's parameters only."""


def _parameters(given: list[Any], context: Any) -> list[Any]:
    """The parameters of a command and of every command; the help shows what is to be written for their values."""
    if context.parent is None:
        only = typer.Typer(add_completion=False)
        only.command()(_version)
        (option,) = typer.main.get_command(only).params
        option.expose_value = False
        given = [*given, option]
    for parameter in given:
        if parameter.param_type_name == "argument":
            parameter.display_type_rich = lambda ctx: ""  # noqa: ARG005  # its name says what it is
        if parameter.metavar is None:
            choices, kind = parameter.type_descriptor.choices, parameter.type_descriptor.annotation
            kind = next(iter(typing.get_args(kind)), kind)  # of a list
            written = {bool: "", int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")
            parameter.metavar = "|".join(str(choice.value) for choice in choices) if choices else written
    return given


class _Command(typer.core.TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return _parameters(super().get_params(ctx), ctx)


class _Group(typer.core.TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return _parameters(super().get_params(ctx), ctx)


class Application(typer.Typer):
    """A typer application whose commands know ``-h`` and ``--version``."""

    def __init__(self, *, no_args_is_help: bool = False) -> None:
        super().__init__(
            cls=_Group, pretty_exceptions_enable=False, no_args_is_help=no_args_is_help, context_settings=_CONTEXT
        )

    def command(self, name: str | None = None, **settings: Any) -> Callable[[_Function], _Function]:
        """As typer's."""
        return super().command(name, cls=_Command, context_settings=_CONTEXT, **settings)


def end_signals() -> list[signal.Signals]:
    """The signals beside SIGINT that ask a command to end; SIGHUP is none if it is to be survived, as under nohup."""
    numbers = [signal.SIGTERM]
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


def run(app: typer.Typer, name: str, extra: str) -> NoReturn:
    """Run a typer application as the command ``name`` and leave the process with its exit code.

    Args:
        extra: of this project's package, what the command needs to be installed. A module that needs a package of it
            imports it no sooner than the application runs.
    """
    for number in end_signals():
        signal.signal(number, _terminated)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as common.start leaves it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with _forgiving_output() as trouble:
            code = _run(app, name, extra)
            sys.stdout.flush()
            if trouble and code == 0:
                code = _refuse(name, f"standard output: cannot write ({reason(trouble[0])}); all else is done", 1)
    except _Terminated:
        # All is cleaned up. A library that was interrupted in the middle of a call, as gRPC may have been, can wait for
        # its end for ever while the interpreter is taken down.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(1)
    sys.exit(code)


def _run(app: typer.Typer, name: str, extra: str) -> int:
    try:
        code = app(prog_name=name, standalone_mode=False)
    except InputError as error:
        return _refuse(name, str(error), 2)
    except typer.TyperException as error:
        # Without a message typer has printed the help already.
        message, context = error.format_message(), getattr(error, "ctx", None)
        command = context.command_path if context is not None else name
        return _refuse(name, f"{message.rstrip('.')} (see '{command} --help')", 2) if message else 2
    except Failure as error:
        return _refuse(name, str(error), 1)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", _OURS):
            raise
        return _refuse(name, f"this needs {missing}: pip install 'knowledge-boosting[{extra}]'", 1)
    except (typer.Abort, KeyboardInterrupt):
        code = _INTERRUPTED
    except OSError as error:
        if error.filename is None or error.errno not in _FAULTS_OF_PATHS:
            raise
        return _refuse(name, f"{error.filename}: cannot be used ({reason(error)})", 2)
    if code == _INTERRUPTED:
        _refuse(name, "interrupted", 1)
        raise _Terminated(1)
    return int(code or 0)


def _refuse(name: str, message: str, code: int) -> int:
    print(f"{name}: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


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
    print(f"warning: {printable(message)}", file=sys.stderr)


def console(*, stderr: bool = False, width: int | None = None) -> "Console":
    """Where tables and bars are printed: nothing in a text, such as a path with brackets, is taken for markup."""
    from rich.console import Console

    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


class _Forgiving(io.FileIO):
    """Takes what is written to a descriptor, also when it goes nowhere any more; ``trouble`` says why."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.trouble: list[OSError] = []

    def write(self, data: "ReadableBuffer", /) -> int:
        if not self.trouble:
            try:
                return super().write(data)
            except OSError as error:
                self.trouble.append(error)
        return memoryview(data).nbytes


@contextmanager
def _forgiving_output() -> Iterator[list[OSError]]:
    """In this block printing never fails: no command loses its files for a closed pipe, a full disk or a strange name.

    Yields what went wrong with standard output.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed; the next file that is opened would be taken for it
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or io.TextIOWrapper(io.BytesIO())
    sys.stderr = sys.stderr or io.TextIOWrapper(io.BytesIO())
    before, found = (sys.stdout, sys.stderr), list[_Forgiving]()
    try:
        if sys.platform != "win32":  # whose terminals take no bytes
            found = [_Forgiving(stream.fileno()) for stream in before]
    except OSError:
        pass  # a test's
    if not found:
        yield []
        return
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors="backslashreplace",
            # As it was, PYTHONUNBUFFERED included.
            line_buffering=bool(stream.line_buffering or getattr(stream, "write_through", False)),
        )
        for raw, stream in zip(found, before, strict=True)
    )
    try:
        yield found[0].trouble
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before
