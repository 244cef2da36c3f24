"""The ``kb-server`` command."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import common.cli
from common.cli import warn
from common.errors import InputError
from models.manifest import DEFAULT_BUNDLE

if TYPE_CHECKING:
    from remote_server.security import Security
    from remote_server.service import HintService

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_SECURITY = "Security"  # heading of these options in the help


@app.command()
def serve(
    bundle: Annotated[str, typer.Option("--bundle", help="Name or path of the bundle to serve.")] = DEFAULT_BUNDLE,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one and prints it.")] = 50051,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:INDEX.")] = "auto",
    max_sessions: Annotated[int, typer.Option("--max-sessions", min=1, help="Devices served at once.")] = 16,
    auth_tokens: Annotated[
        Path | None,
        typer.Option("--auth-tokens", help="TOML file of the tokens that may call.", rich_help_panel=_SECURITY),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option("--tls-cert", help="Certificate for TLS, PEM.", rich_help_panel=_SECURITY),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option("--tls-key", help="Its private key, PEM.", rich_help_panel=_SECURITY)
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            "--tls-client-ca", help="Devices need a certificate of this authority, PEM.", rich_help_panel=_SECURITY
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Let other machines connect without encryption.", rich_help_panel=_SECURITY),
    ] = False,
    reflection: Annotated[
        bool | None,
        typer.Option(
            "--reflection/--no-reflection",
            help="Describe the interface to callers. [on for this machine, off for others]",
            rich_help_panel=_SECURITY,
        ),
    ] = None,
    until_stdin_ends: Annotated[
        bool, typer.Option("--until-stdin-ends", help="Stop when standard input is closed (for a parent process).")
    ] = False,
) -> None:
    """Serve a bundle's large network to devices."""
    # Read when gRPC is loaded. What goes wrong in it is told by us, once.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")

    from models.bundle import load_large
    from models.device import pick_device
    from models.manifest import UNTRAINED_NOTICE
    from remote_server.engine import HintEngine
    from remote_server.security import check_security
    from remote_server.service import HintService

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    security = check_security(
        host,
        auth_tokens=auth_tokens,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
        insecure=insecure,
        reflection=reflection,
    )
    target = pick_device(device)
    model, manifest = load_large(bundle)
    if manifest.untrained:
        warn(UNTRAINED_NOTICE)
    service = HintService(HintEngine(model, target), manifest, max_sessions)

    def ready(bound: int) -> None:
        print(f"kb-server: listening on {_address(host, bound)}, bundle {manifest.label}, device {target}", flush=True)

    asyncio.run(_serve(service, security, host, port, ready, until_stdin_ends=until_stdin_ends))


async def _serve(
    service: "HintService",
    security: "Security",
    host: str,
    port: int,
    ready: Callable[[int], None],
    *,
    until_stdin_ends: bool,
) -> None:
    import grpc
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection

    from protos.codec import SERVICE_NAME
    from protos.hints_pb2_grpc import add_HintServiceServicer_to_server
    from remote_server.service import log_event

    server = grpc.aio.server(
        interceptors=security.interceptors(),
        options=[
            # Two servers on one port would share its connections without a word.
            ("grpc.so_reuseport", 0),
            # A device that fell silent without closing its connection is noticed.
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 5_000),
        ],
    )
    add_HintServiceServicer_to_server(service, server)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    if security.reflection:
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
    try:
        bound = security.add_port(server, _address(host, port))
    except RuntimeError:
        taken = f"cannot listen on {_address(host, port)}; is the port taken? --port 0 finds a free one"
        raise InputError(taken) from None
    # Before anybody hears that the server is there, and so may end it.
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await server.start()
    for name in ("", SERVICE_NAME):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    ready(bound)
    log_event("server_started", host=host, port=bound)
    if until_stdin_ends:
        # A daemon thread: nothing may wait for it when the server stops for another reason.
        threading.Thread(target=_when_stdin_ends, args=(loop, stop.set), daemon=True).start()
    await stop.wait()
    await checks.enter_graceful_shutdown()
    await service.drain()
    await server.stop(grace=1)
    service.close()
    log_event("server_stopped")


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _when_stdin_ends(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    if sys.stdin is not None:
        with contextlib.suppress(OSError):
            while os.read(sys.stdin.fileno(), 1024):
                pass
    with contextlib.suppress(RuntimeError):  # the loop is closed already
        loop.call_soon_threadsafe(call)


def main() -> None:
    """Entry point of ``kb-server``."""
    common.cli.run(app, "kb-server")


if __name__ == "__main__":
    main()
