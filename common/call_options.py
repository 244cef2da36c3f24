"""The security flags of every command that calls a server. :mod:`common.call_credentials` interprets them."""

from pathlib import Path
from typing import Annotated

import typer

_SECURITY = "Security"  # the heading of these flags in the help
Tls = Annotated[
    bool,
    typer.Option(
        "--tls",
        help="Encrypt. This machine must trust the server's certificate.",
        rich_help_panel=_SECURITY,
    ),
]
TlsCa = Annotated[
    Path | None,
    typer.Option("--tls-ca", help="Encrypt and trust this PEM certificate or authority.", rich_help_panel=_SECURITY),
]
TlsCert = Annotated[
    Path | None,
    typer.Option(
        "--tls-cert",
        help="PEM certificate of this client, for servers that require one.",
        rich_help_panel=_SECURITY,
    ),
]
TlsKey = Annotated[
    Path | None, typer.Option("--tls-key", help="Private key of --tls-cert, PEM.", rich_help_panel=_SECURITY)
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        help="File with the token for the server. [default: the variable KB_TOKEN]",
        rich_help_panel=_SECURITY,
    ),
]
