"""Where an address leads."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether a host, by name or number, is this machine under an address that no other machine can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False
