"""The common behaviour of all commands: one clear line for each error, and the exit codes.

The exit code is 0 on success and 2 if the input or the call is at fault. It is 1 for every other failure. An
interruption by Ctrl-C, SIGTERM or SIGHUP, and a standard output that cannot be written, are such failures.
"""

import contextlib
import errno
import importlib.metadata
import importlib.util
import io
import os
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
import typer.core
import typer.main

from knowledge_boosting.common.errors import Failure, InputError, printable, reason

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

    from _typeshed import ReadableBuffer
    from rich.console import Console
    from rich.table import Table

_REPEAT_AFTER = 0.5  # seconds; a command that ends because of the failed callback has ended by then
_INTERRUPTED = 130  # typer's exit code for Ctrl-C
_PATH_ERRORS = {errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EPERM}
_CONTEXT = {"help_option_names": ["-h", "--help"]}
_PACKAGE = "knowledge_boosting"
_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Terminated(SystemExit):
    """A signal asked the command to end."""


def _raise_terminated(_number: int, _frame: FrameType | None) -> NoReturn:
    # An exception unwinds the stack, so that child processes are stopped and temporary files are removed.
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
    """Declare ``--version``. Typer creates options only from the parameters of a function."""


def _with_common_parameters(parameters: list[Any], context: Any) -> list[Any]:
    """Add ``--version`` to the top-level command, and give every parameter a placeholder that the help shows."""
    if context.parent is None:
        holder = typer.Typer(add_completion=False)
        holder.command()(_version)
        (option,) = typer.main.get_command(holder).params
        option.expose_value = False
        parameters = [*parameters, option]
    for parameter in parameters:
        if parameter.param_type_name == "argument":
            parameter.display_type_rich = lambda ctx: ""  # noqa: ARG005  # the name of an argument is enough
        if parameter.metavar is None:
            choices, kind = parameter.type_descriptor.choices, parameter.type_descriptor.annotation
            kind = next(iter(typing.get_args(kind)), kind)  # the type of a list's items
            placeholder = {bool: "", int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")
            parameter.metavar = "|".join(str(choice.value) for choice in choices) if choices else placeholder
    return parameters


class _Command(typer.core.TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return _with_common_parameters(super().get_params(ctx), ctx)


class _Group(typer.core.TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return _with_common_parameters(super().get_params(ctx), ctx)


class Application(typer.Typer):
    """A typer application whose commands accept ``-h`` and ``--version``."""

    def __init__(self, *, no_args_is_help: bool = False) -> None:
        super().__init__(
            cls=_Group, pretty_exceptions_enable=False, no_args_is_help=no_args_is_help, context_settings=_CONTEXT
        )

    def command(self, name: str | None = None, **settings: Any) -> Callable[[_Function], _Function]:
        """Register a command, like :meth:`typer.Typer.command`."""
        return super().command(name, cls=_Command, context_settings=_CONTEXT, **settings)


def termination_signals() -> list[signal.Signals]:
    """Return the signals other than SIGINT that end a command. SIGHUP is omitted if it is ignored, as under nohup."""
    numbers = [signal.SIGTERM]
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


def run(app: typer.Typer, name: str, extra: str) -> NoReturn:
    """Run a typer application as the command ``name`` and exit the process with its exit code.

    Args:
        app: The application. It must import the packages of ``extra`` only while it runs, so that a missing one is
            reported here.
        name: The name of the command.
        extra: The extra of this package that installs what the command needs.
    """
    for number in termination_signals():
        signal.signal(number, _raise_terminated)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set by common.start
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with _tolerant_output() as write_errors, _lost_interruptions() as lost:
            code = _run(app, name, extra, lost)
            sys.stdout.flush()
            if write_errors and code == 0:
                text = f"standard output: cannot write ({reason(write_errors[0])}); everything else succeeded"
                code = _print_error(name, text, 1)
    except _Terminated:
        # Cleanup is complete. A library that was interrupted in a call, for example gRPC, could block the shutdown of
        # the interpreter forever.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(1)
    sys.exit(code)


def _run(app: typer.Typer, name: str, extra: str, lost: Sequence[BaseException]) -> int:
    try:
        try:
            code = app(prog_name=name, standalone_mode=False)
        except Exception:
            if lost:
                # A library saw a failed callback where the command was interrupted.
                raise lost[0] from None
            raise
    except InputError as error:
        return _print_error(name, str(error), 2)
    except typer.TyperException as error:
        # If there is no message, typer has already printed the help.
        # Pydantic, by which typer checks values, adds the name of its exception.
        message, context = error.format_message().replace("Value error, ", ""), getattr(error, "ctx", None)
        command = context.command_path if context is not None else name
        return _print_error(name, f"{message.rstrip('.')} (see '{command} --help')", 2) if message else 2
    except Failure as error:
        return _print_error(name, str(error), 1)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", _PACKAGE):
            raise
        text = f"the package {missing} is not installed; run pip install 'knowledge-boosting[{extra}]'"
        return _print_error(name, text, 1)
    except (typer.Abort, KeyboardInterrupt):
        code = _INTERRUPTED
    except OSError as error:
        if error.filename is None or error.errno not in _PATH_ERRORS:
            raise
        return _print_error(name, f"{error.filename}: cannot be used ({reason(error)})", 2)
    if code == _INTERRUPTED:
        _print_error(name, "interrupted", 1)
        raise _Terminated(1)
    return int(code or 0)


@contextmanager
def _lost_interruptions() -> Iterator[list[BaseException]]:
    """Repeat an interruption that was raised where nothing can be raised, and yield a list of those so far.

    Python calls a signal handler wherever the main thread is. In a destructor, or in a callback from C such as those of
    libsndfile, its exception is printed and ignored.
    """
    lost: list[BaseException] = []
    timers: list[threading.Timer] = []
    before = sys.unraisablehook

    def repeat(unraisable: "UnraisableHookArgs") -> None:
        if not isinstance(unraisable.exc_value, KeyboardInterrupt | _Terminated):
            before(unraisable)
            return
        lost.append(unraisable.exc_value)
        number = signal.SIGINT if isinstance(unraisable.exc_value, KeyboardInterrupt) else signal.SIGTERM
        timers.append(threading.Timer(_REPEAT_AFTER, os.kill, (os.getpid(), number)))
        timers[-1].start()

    sys.unraisablehook = repeat
    try:
        yield lost
    finally:
        sys.unraisablehook = before
        for timer in timers:
            timer.cancel()


def _print_error(name: str, message: str, code: int) -> int:
    print(f"{name}: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


def check_installed(*modules: str) -> None:
    """Check, before a long task begins, that the modules it imports later are installed.

    Raises:
        ModuleNotFoundError: A module is missing. :func:`run` prints how to install it.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def warn(message: str) -> None:
    """Print a warning as one line on standard error."""
    print(f"warning: {printable(message)}", file=sys.stderr)


def console(*, stderr: bool = False, width: int | None = None) -> "Console":
    """Return a console for tables and progress bars. It prints brackets in a text, such as a path, as they are."""
    from rich.console import Console

    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


@contextmanager
def progress_bar(total: int, done: int = 0) -> Iterator[Callable[[], None]]:
    """Show a progress bar if standard error is a terminal. Yields the function that advances it by one."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    terminal = console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        bar = progress.add_task("", total=total, completed=done)
        yield lambda: progress.advance(bar)


def full_table(*headings: str, **options: Any) -> "Table":
    """Return a table whose cells go on in the next line if the terminal is narrow, so that no name loses its end."""
    from rich.table import Column, Table

    return Table(*(Column(heading, overflow="fold") for heading in headings), **options)


class _TolerantFile(io.FileIO):
    """A file descriptor whose writes never fail. The first error goes to ``errors``; later data is discarded."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.errors: list[OSError] = []

    def write(self, data: "ReadableBuffer", /) -> int:
        if not self.errors:
            try:
                return super().write(data)
            except OSError as error:
                self.errors.append(error)
        return memoryview(data).nbytes


@contextmanager
def _tolerant_output() -> Iterator[list[OSError]]:
    """Make printing never fail in this block.

    A closed pipe, a full disk or an unprintable file name must not cost a command the files that it writes. The block
    gets a list to which the errors of standard output are added.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The descriptor is closed. The next opened file would get its number, and would receive the output.
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or io.TextIOWrapper(io.BytesIO())
    sys.stderr = sys.stderr or io.TextIOWrapper(io.BytesIO())
    originals, files = (sys.stdout, sys.stderr), list[_TolerantFile]()
    try:
        if sys.platform != "win32":  # terminals on Windows do not accept bytes
            files = [_TolerantFile(stream.fileno()) for stream in originals]
    except OSError:
        pass  # the streams of a test have no descriptors
    if not files:
        yield []
        return
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors="backslashreplace",
            # PYTHONUNBUFFERED sets write_through.
            line_buffering=bool(stream.line_buffering or getattr(stream, "write_through", False)),
        )
        for raw, stream in zip(files, originals, strict=True)
    )
    try:
        yield files[0].errors
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = originals
