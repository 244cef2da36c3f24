"""Parse and classify the network addresses of servers, proxies and peers."""

import ipaddress
import os
from collections.abc import Iterable
from urllib.parse import unquote, urlsplit

from knowledge_boosting.common.errors import InputError


def is_loopback(host: str) -> bool:
    """Return whether a host name or IP address is a loopback address, which no other machine can reach."""
    if host.lower().removesuffix(".") == "localhost":
        return True
    try:
        address = ipaddress.ip_address(without_brackets(host))
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def without_brackets(host: str) -> str:
    """Remove the brackets that an IPv6 address has in front of a port."""
    return host.removeprefix("[").removesuffix("]")


def split_address(server: str) -> tuple[str, int]:
    """Split the address ``HOST:PORT`` of a server into the host, without brackets, and the port.

    Raises:
        InputError: The address has another form. The message shows the expected one.
    """
    scheme, separator, rest = server.partition("://")
    if separator:
        expected = rest.strip("/") or "HOST:PORT"
        raise InputError(f"--server {server}: must be an address without {scheme}://; give {expected}")
    if _is_ipv6(server):
        raise InputError(f"--server {server}: an IPv6 address needs brackets and a port; give [{server}]:50051")
    host, separator, port = server.rpartition(":")
    if not separator and server:
        raise InputError(f"--server {server}: must be HOST:PORT; give {server}:50051 if 50051 is the port")
    if _is_ipv6(host):
        raise InputError(f"--server {server}: an IPv6 address needs brackets; give [{host}]:{port}")
    bracketed = host.startswith("[") and host.endswith("]") and _is_ipv6(without_brackets(host))
    if not bracketed and (not host or any(character in "[]/:@ \t" for character in host)):
        raise InputError(f"--server {server}: must be HOST:PORT, such as gpu-host:50051")
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise InputError(f"--server {server}: must be HOST:PORT, with a port from 1 to 65535")
    return without_brackets(host), int(port)


def proxy_of(host: str) -> tuple[str, str] | None:
    """Return the proxy that gRPC uses for a host.

    Returns:
        The proxy as ``HOST:PORT`` and the environment variable that names it. None if gRPC connects directly.
    """
    if is_loopback(host):
        return None
    # gRPC reads the variables in this order.
    variable = _first_set("grpc_proxy", "https_proxy", "http_proxy")
    exceptions = _first_set("no_grpc_proxy", "no_proxy")
    if variable is None or (exceptions is not None and _is_excepted(host, os.environ[exceptions].split(","))):
        return None
    value = os.environ[variable]
    # The value can contain a user name and a password, which must not be printed.
    return urlsplit(value if "//" in value else f"//{value}").netloc.rpartition("@")[2], variable


def _first_set(*variables: str) -> str | None:
    return next((variable for variable in variables if os.environ.get(variable)), None)


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 6
    except ValueError:
        return False


def _is_excepted(host: str, entries: Iterable[str]) -> bool:
    for entry in filter(None, (entry.strip().lower() for entry in entries)):
        if host.lower().endswith(entry):
            return True
        try:
            if ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False):
                return True
        except ValueError:
            continue
    return False


def host_of(peer: str) -> str:
    """Return the host of a gRPC peer such as ``ipv4:192.0.2.1:54321``.

    For IPv6 this is the /64 network, because one host usually owns all addresses of such a network.
    """
    kind, _, rest = unquote(peer).partition(":")
    address = rest.rpartition(":")[0].removeprefix("[").removesuffix("]") or rest
    if kind != "ipv6" or is_loopback(address):
        return address
    try:
        return str(ipaddress.ip_network((address.partition("%")[0], 64), strict=False))
    except ValueError:
        return address
