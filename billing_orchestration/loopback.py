"""The one rule for what counts as this machine."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether a host, without brackets and port, is this machine: `localhost`, or a loopback address.

    A name below `localhost` is none: resolvers may ask the network for it.
    """
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
