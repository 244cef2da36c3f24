"""A server process: the gRPC server with its services, signals and log."""

import asyncio
import contextlib
import errno
import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from knowledge_boosting.common.errors import InputError, reason
from knowledge_boosting.protos.codec import SERVICE_NAME
from knowledge_boosting.protos.hints_pb2_grpc import add_HintServiceServicer_to_server
from knowledge_boosting.remote_server.core.access import ANONYMOUS
from knowledge_boosting.remote_server.core.hint_server import HintServer
from knowledge_boosting.remote_server.core.limits import Limits
from knowledge_boosting.remote_server.core.log import flush_log, log_event
from knowledge_boosting.remote_server.health import Health
from knowledge_boosting.remote_server.security import Security
from knowledge_boosting.remote_server.service import HintService

_STOP_TIMEOUT = 3.0  # seconds until all connections must have ended
# Limits for each connection, which also apply before its caller is authenticated.
_CONNECTION_LIMITS = [
    # A device can ping once a second. Its connection ends when it exceeds this for the third time.
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 2),
    ("grpc.keepalive_permit_without_calls", 1),
    # Many devices behind one gateway can share a connection.
    ("grpc.max_concurrent_streams", 256),
    ("grpc.http2.max_requests_per_read", 8),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_metadata_size", 8192),
]


@dataclass(frozen=True)
class ListenOptions:
    """The address of a server process, and the conditions under which it stops."""

    host: str
    port: int
    drain_seconds: float
    until_stdin_ends: bool = False
    shared_port: bool = False  # whether other processes of the same server use the port too


async def serve(
    hints: HintServer, limits: Limits, security: Security, options: ListenOptions, ready: Callable[[int], None]
) -> None:
    """Serve until SIGTERM or SIGINT. On SIGHUP, scan the bundles again.

    Args:
        hints: The server core.
        limits: The limits of messages.
        security: The security settings.
        options: The address, and the conditions under which the server stops.
        ready: Called with the port when the server accepts calls.

    Raises:
        InputError: The server cannot listen on the port.
        Failure: The thread of an engine has ended.
    """
    # The event loop takes the interpreter's lock several times for each message, and would wait up to 5 ms each time.
    sys.setswitchinterval(0.0005)
    server = grpc.aio.server(
        interceptors=security.interceptors(partial(hints.refused, ANONYMOUS)),
        options=[
            # Otherwise, two independent servers on one port would share its connections without an error.
            ("grpc.so_reuseport", int(options.shared_port)),
            ("grpc.max_receive_message_length", limits.message_bytes),
            # Keepalive pings detect a device that has vanished without closing its connection.
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            *_CONNECTION_LIMITS,
        ],
    )
    add_HintServiceServicer_to_server(HintService(hints), server)
    health_service = Health("", SERVICE_NAME)
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    if security.reflection:
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
    address = join_address(options.host, options.port)
    try:
        bound = security.add_port(server, address)
    except RuntimeError:
        raise InputError(listen_error(options.host, options.port)) from None
    # A signal can arrive as soon as the server announces that it is ready, so the handlers are installed before.
    stop, stop_at_once = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def request_stop() -> None:
        (stop_at_once if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, request_stop)
    reload_requested = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, reload_requested.set)
    reloading = loop.create_task(_reload_on(reload_requested, hints))
    await server.start()
    # A full collection would visit all objects of the libraries, and delay all sessions for that time.
    gc.collect()
    gc.freeze()
    ready(bound)
    slots = {served.manifest.name: served.slots for served in hints.bundles.served if served.loaded is not None}
    log_event("server_started", host=options.host, port=bound, sessions=slots)
    if options.until_stdin_ends:
        # As a daemon, the thread does not delay the end of the process if the server stops for another reason.
        threading.Thread(target=_when_stdin_ends, args=(loop, stop.set), daemon=True).start()
    else:  # the parent process enrolls at once or never, so that loading the encoder in advance is of no use there
        hints.load_speaker_encoder()
    watching, stopping = loop.create_task(hints.watch()), loop.create_task(stop.wait())
    await asyncio.wait({watching, stopping}, return_when=asyncio.FIRST_COMPLETED)
    failure = watching.exception() if watching.done() else None
    if failure is not None:
        options = replace(options, drain_seconds=0)
    log_event("server_draining", seconds=options.drain_seconds)
    health_service.stop_serving()
    draining = loop.create_task(hints.drain(options.drain_seconds))
    # A second signal ends the draining at once.
    second_signal = loop.create_task(stop_at_once.wait())
    await asyncio.wait({draining, second_signal}, return_when=asyncio.FIRST_COMPLETED)
    if not draining.done():
        draining.cancel()
        await hints.drain(0)
    for task in (watching, stopping, second_signal, reloading):
        task.cancel()
    timed_out = False
    try:
        async with asyncio.timeout(_STOP_TIMEOUT):
            await server.stop(grace=1)
    except TimeoutError:
        timed_out = True
    hints.close()
    log_event("server_stopped", **({"why": str(failure)} if failure is not None else {}))
    if timed_out:
        # While a peer sends without pause, gRPC would block the end of the process.
        flush_log()
        os._exit(0 if failure is None else 1)
    if failure is not None:
        raise failure


def listen_error(host: str, port: int) -> str:
    """Return why the server cannot listen on a host and port, and how to fix it. gRPC does not report the reason."""
    text = f"cannot listen on {join_address(host, port)}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except (socket.gaierror, UnicodeError):
        return f"--host {host}: the host name is unknown; give an address of this machine, or 0.0.0.0 for all addresses"
    except PermissionError:
        return f"{text}: this user has no permission for that port; give a --port above 1023"
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            return f"--host {host}: is not an address of this machine; give one of its addresses, or 0.0.0.0 for all"
        if error.errno != errno.EADDRINUSE:
            return f"{text} ({reason(error)})"
    return f"{text}: the port is in use; give another --port, or --port 0 for a free one"


def join_address(host: str, port: int) -> str:
    """Return ``HOST:PORT``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _reload_on(requested: asyncio.Event, hints: HintServer) -> None:
    while True:
        await requested.wait()
        requested.clear()
        try:
            scanned = await asyncio.to_thread(hints.bundles.scan)
            added, retired = hints.bundles.apply(scanned)
        except InputError as error:
            log_event("reload_failed", why=str(error))
            continue
        except Exception as error:  # an unexpected fault of a file must not end this task
            log_event("reload_failed", why=f"{type(error).__name__}: {reason(error)[:500]}")
            continue
        log_event("reloaded", added=added, retired=retired)


def _when_stdin_ends(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    if sys.stdin is not None:
        with contextlib.suppress(OSError):
            while os.read(sys.stdin.fileno(), 1024):
                pass
    with contextlib.suppress(RuntimeError):  # the loop is already closed
        loop.call_soon_threadsafe(call)
