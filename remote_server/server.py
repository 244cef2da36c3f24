"""A server process: the gRPC server around the service, its health, signals and log."""

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
from knowledge_boosting.remote_server.core.access import ANYBODY
from knowledge_boosting.remote_server.core.hint_server import HintServer
from knowledge_boosting.remote_server.core.limits import Limits
from knowledge_boosting.remote_server.core.log import end_log, log_event
from knowledge_boosting.remote_server.health import Health
from knowledge_boosting.remote_server.security import Security
from knowledge_boosting.remote_server.service import HintService

_STOPPING_SECONDS = 3.0  # that connections have to end
# What one connection may cost before anybody knows whose it is.
_CONNECTION = [
    # A device may ping once a second, and no more; at the third time too many its connection ends.
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 2),
    ("grpc.keepalive_permit_without_calls", 1),
    # As many as devices behind one gateway can be.
    ("grpc.max_concurrent_streams", 256),
    ("grpc.http2.max_requests_per_read", 8),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_metadata_size", 8192),
]


@dataclass(frozen=True)
class Listening:
    """Where and how a server process listens."""

    host: str
    port: int
    drain_seconds: float
    until_stdin_ends: bool = False
    shared_port: bool = False  # with other processes of the same server


async def serve(
    hints: HintServer, limits: Limits, security: Security, where: Listening, ready: Callable[[int], None]
) -> None:
    """Serve until SIGTERM or SIGINT. SIGHUP looks at the bundles again.

    Args:
        ready: called with the port once calls are answered.

    Raises:
        InputError: the port cannot be had.
        Failure: a network has stopped.
    """
    # The event loop needs the interpreter several times a message, and would wait 5 ms for it each time.
    sys.setswitchinterval(0.0005)
    server = grpc.aio.server(
        interceptors=security.interceptors(partial(hints.refused, ANYBODY)),
        options=[
            # Two servers on one port would share its connections without a word.
            ("grpc.so_reuseport", int(where.shared_port)),
            ("grpc.max_receive_message_length", limits.message_bytes),
            # A device that fell silent without closing its connection is noticed.
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            *_CONNECTION,
        ],
    )
    add_HintServiceServicer_to_server(HintService(hints), server)
    checks = Health("", SERVICE_NAME)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    if security.reflection:
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
    address = address_of(where.host, where.port)
    try:
        bound = security.add_port(server, address)
    except RuntimeError:
        raise InputError(why_not_listening(where.host, where.port)) from None
    # Before anybody hears that the server is there, and so may end it.
    stop, at_once = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def asked_to_stop() -> None:
        (at_once if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked_to_stop)
    asked_to_reload = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, asked_to_reload.set)
    reloading = loop.create_task(_reload_when(asked_to_reload, hints))
    await server.start()
    # A full collection goes through all that the libraries have made, and holds everybody up for that long.
    gc.collect()
    gc.freeze()
    ready(bound)
    slots = {served.manifest.name: served.slots for served in hints.bundles.served if served.loaded is not None}
    log_event("server_started", host=where.host, port=bound, sessions=slots)
    if where.until_stdin_ends:
        # A daemon thread: nothing may wait for it when the server stops for another reason.
        threading.Thread(target=_when_stdin_ends, args=(loop, stop.set), daemon=True).start()
    else:  # one client of our own wants the speaker encoder at once, or never
        hints.load_speaker_encoder()
    watching, stopping = loop.create_task(hints.watch()), loop.create_task(stop.wait())
    await asyncio.wait({watching, stopping}, return_when=asyncio.FIRST_COMPLETED)
    failure = watching.exception() if watching.done() else None
    if failure is not None:
        where = replace(where, drain_seconds=0)
    log_event("server_draining", seconds=where.drain_seconds)
    checks.stop_serving()
    draining = loop.create_task(hints.drain(where.drain_seconds))
    # A second signal ends it at once.
    hurry = loop.create_task(at_once.wait())
    await asyncio.wait({draining, hurry}, return_when=asyncio.FIRST_COMPLETED)
    if not draining.done():
        draining.cancel()
        await hints.drain(0)
    for task in (watching, stopping, hurry, reloading):
        task.cancel()
    abandoned = False
    try:
        async with asyncio.timeout(_STOPPING_SECONDS):
            await server.stop(grace=1)
    except TimeoutError:
        abandoned = True
    hints.close()
    log_event("server_stopped", **({"why": str(failure)} if failure is not None else {}))
    if abandoned:
        # A connection whose peer sends without end does not let go of gRPC, which waits for it as the process ends.
        end_log()
        os._exit(0 if failure is None else 1)
    if failure is not None:
        raise failure


def why_not_listening(host: str, port: int) -> str:
    """Why a host and port cannot be listened on, and what to do; gRPC does not tell."""
    where = f"cannot listen on {address_of(host, port)}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except (socket.gaierror, UnicodeError):
        return f"--host {host}: no host of that name is known here; give an address of this machine, or 0.0.0.0 for all"
    except PermissionError:
        return f"{where}: this user may not have that port; give --port one above 1023"
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            return f"--host {host}: is no address of this machine; give one that is, or 0.0.0.0 for all"
        if error.errno != errno.EADDRINUSE:
            return f"{where} ({reason(error)})"
    return f"{where}; is the port taken? --port 0 finds a free one"


def address_of(host: str, port: int) -> str:
    """``HOST:PORT``, as gRPC wants it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _reload_when(asked: asyncio.Event, hints: HintServer) -> None:
    while True:
        await asked.wait()
        asked.clear()
        try:
            found = await asyncio.to_thread(hints.bundles.load_new)
            added, retired = hints.bundles.take_in(found)
        except InputError as error:
            log_event("reload_failed", why=str(error))
            continue
        except Exception as error:  # whatever a file of somebody else can bring about: the next signal finds us here
            log_event("reload_failed", why=f"{type(error).__name__}: {reason(error)[:500]}")
            continue
        log_event("reloaded", added=added, retired=retired)


def _when_stdin_ends(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    if sys.stdin is not None:
        with contextlib.suppress(OSError):
            while os.read(sys.stdin.fileno(), 1024):
                pass
    with contextlib.suppress(RuntimeError):  # the loop is closed already
        loop.call_soon_threadsafe(call)
