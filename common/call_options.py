"""The flags of every command that calls a server; what they mean: :mod:`common.call_credentials`."""

from pathlib import Path
from typing import Annotated

import typer

_SECURITY = "Security"  # their heading in the help
Tls = Annotated[
    bool,
    typer.Option(
        "--tls", help="Encrypt; the server's certificate must be one this machine trusts.", rich_help_panel=_SECURITY
    ),
]
TlsCa = Annotated[
    Path | None,
    typer.Option("--tls-ca", help="Encrypt; trust this certificate or authority, PEM.", rich_help_panel=_SECURITY),
]
TlsCert = Annotated[
    Path | None,
    typer.Option(
        "--tls-cert", help="This device's certificate, PEM, for servers that want one.", rich_help_panel=_SECURITY
    ),
]
TlsKey = Annotated[Path | None, typer.Option("--tls-key", help="Its private key, PEM.", rich_help_panel=_SECURITY)]
TokenFile = Annotated[
    Path | None,
    typer.Option("--token-file", help="File with the server's token; else KB_TOKEN.", rich_help_panel=_SECURITY),
]
