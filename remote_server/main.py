"""The ``kb-server`` command."""

import asyncio
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from knowledge_boosting.common import cli
from knowledge_boosting.common.call_options import Tls, TlsCa, TlsCert, TlsKey, TokenFile
from knowledge_boosting.common.cli import warn
from knowledge_boosting.common.environment import prepare_to_serve
from knowledge_boosting.common.errors import InputError

app = cli.Application()

_SECURITY = "Security"  # the heading of these flags in the help


@app.callback(invoke_without_command=True)
def serve(
    context: typer.Context,
    bundle: Annotated[
        list[str] | None,
        typer.Option(
            "--bundle",
            help="Name or path of a bundle, or a folder of bundles. Can be repeated. "
            "[default: all shipped bundles, loaded on demand]",
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 selects a free port and prints it.")] = 50051,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:INDEX.")] = "auto",
    precision: Annotated[
        str, typer.Option("--precision", help="float32, or on a GPU also tf32, float16 or bfloat16.")
    ] = "float32",
    max_sessions: Annotated[
        str,
        typer.Option(
            "--max-sessions", help="Maximum number of sessions of each bundle. auto measures what the device can serve."
        ),
    ] = "auto",
    max_wait_ms: Annotated[
        float,
        typer.Option("--max-wait-ms", min=0, max=100, help="Time that a step waits for the audio of other sessions."),
    ] = 1.0,
    workers: Annotated[
        int,
        typer.Option(
            "--workers", min=1, max=256, help="Number of processes that share the port, each with its own cores."
        ),
    ] = 1,
    limit: Annotated[
        list[str] | None,
        typer.Option("--limit", help="A limit NAME=VALUE, see docs/operations.md. Can be repeated."),
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option("--metrics-port", min=0, max=65535, help="Serve Prometheus metrics on this port.")
    ] = None,
    metrics_host: Annotated[
        str, typer.Option("--metrics-host", help="Address on which metrics are served.")
    ] = "127.0.0.1",
    drain_seconds: Annotated[
        float,
        typer.Option("--drain-seconds", min=0, help="Time for devices to move to another server after SIGTERM."),
    ] = 10.0,
    auth_tokens: Annotated[
        Path | None,
        typer.Option("--auth-tokens", help="TOML file with the accepted tokens.", rich_help_panel=_SECURITY),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option("--tls-cert", help="PEM certificate of the server, for TLS.", rich_help_panel=_SECURITY),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option("--tls-key", help="Private key of --tls-cert, PEM.", rich_help_panel=_SECURITY)
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            "--tls-client-ca",
            help="Require a client certificate from this PEM authority.",
            rich_help_panel=_SECURITY,
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure", help="Allow other machines to connect without encryption.", rich_help_panel=_SECURITY
        ),
    ] = False,
    reflection: Annotated[
        bool | None,
        typer.Option(
            "--reflection/--no-reflection",
            help="Provide gRPC reflection. [default: only if the server listens on a loopback address]",
            rich_help_panel=_SECURITY,
        ),
    ] = None,
    worker: Annotated[int | None, typer.Option("--worker", hidden=True)] = None,
    until_stdin_ends: Annotated[
        bool, typer.Option("--until-stdin-ends", help="Stop when standard input ends, for use by a parent process.")
    ] = False,
) -> None:
    """Serve hints to devices with the large networks of bundles."""
    if context.invoked_subcommand is not None:
        return
    if sys.platform == "win32":
        raise InputError("kb-server needs Linux or macOS; on Windows, run it in WSL")
    prepare_to_serve()
    if workers > 1 and worker is None:
        from knowledge_boosting.remote_server.workers import run_workers

        raise typer.Exit(run_workers(workers, host, port, sys.argv[1:]))

    from knowledge_boosting.models.device import pick_device, pick_precision
    from knowledge_boosting.models.manifest import UNTRAINED_NOTICE
    from knowledge_boosting.remote_server.core.bundles import Bundles
    from knowledge_boosting.remote_server.core.hint_server import HintServer
    from knowledge_boosting.remote_server.core.limits import read_limits
    from knowledge_boosting.remote_server.core.log import background_log
    from knowledge_boosting.remote_server.core.metrics import Metrics
    from knowledge_boosting.remote_server.security import check_security
    from knowledge_boosting.remote_server.server import ListenOptions, join_address
    from knowledge_boosting.remote_server.server import serve as run_server
    from knowledge_boosting.remote_server.workers import pin_to_cores, worker_device

    limits, session_count = read_limits(limit or []), _session_count(max_sessions)
    if worker is not None:
        pin_to_cores(worker, workers)
        device = worker_device(device, worker)
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
    kind = pick_precision(precision, target)
    metrics = Metrics()
    bundles = Bundles(
        bundle, target, dtype=kind, max_sessions=session_count, max_wait=max_wait_ms / 1e3, metrics=metrics
    )
    if any(served.manifest.untrained for served in bundles.served):
        warn(UNTRAINED_NOTICE)
    if metrics_port is not None:
        metrics_port = metrics.serve(metrics_host, metrics_port + (worker or 0) if metrics_port else 0)

    def ready(bound: int) -> None:
        names = ", ".join(served.manifest.label for served in bundles.served)
        print(f"kb-server: listening on {join_address(host, bound)}, bundle {names}, device {target}", flush=True)
        if metrics_port is not None:
            print(f"kb-server: metrics on http://{join_address(metrics_host, metrics_port)}/metrics", flush=True)

    options = ListenOptions(host, port, drain_seconds, until_stdin_ends, shared_port=worker is not None)
    with background_log():
        asyncio.run(run_server(HintServer(bundles, limits, metrics), limits, security, options, ready))


@app.command()
def status(
    server: Annotated[str, typer.Argument(metavar="HOST:PORT", help="A running kb-server.")],
    tls: Tls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
) -> None:
    """Show the bundles of a server and their open sessions. The exit code is 1 if the server is shutting down."""
    from knowledge_boosting.common.call_credentials import read_credentials
    from knowledge_boosting.remote_server.status import print_status

    credentials = read_credentials(
        [server], tls=tls, tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key, token_file=token_file
    )
    if not print_status(server, credentials):
        raise typer.Exit(1)


def _session_count(value: str) -> int | None:
    if value == "auto":
        return None
    if not value.isdecimal() or not int(value):
        raise InputError(f"--max-sessions {value}: must be auto, or a number of 1 or more")
    return int(value)


def main() -> None:
    """Entry point of ``kb-server``."""
    if hasattr(signal, "SIGHUP"):
        # By default, the signal would end the process. Later it makes the server scan its bundles again.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    cli.run(app, "kb-server", "server")


if __name__ == "__main__":
    main()
