"""The one rule for `UI_AUTH`: who may use the Dagster UI.

`basic:USER:HASH` asks for a password; several users stand separated by commas. `header:NAME` believes a login proxy on
this machine, `header:NAME from ADDRESS` one elsewhere (addresses or networks, separated by commas). A fault quotes no
part of the text: a password may stand in it by mistake.
"""

from __future__ import annotations

import hmac
import re
import secrets
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

_PASSWORD_BYTES = 20
_USER = re.compile(r"[\w.@+-]+")
_HASH = re.compile(r"[0-9a-f]{64}")
_HEADER = re.compile(r"[A-Za-z0-9-]+")
_THIS_MACHINE = (ip_network("127.0.0.0/8"), ip_network("::1"))
_FORMS = "write basic:USER:HASH (billing-orchestration webserver --new-login USER makes it) or header:X-Forwarded-User"


@dataclass(frozen=True, slots=True)
class Passwords:
    """HTTP Basic authentication.

    The hashes are fast ones on purpose: `new_login` draws passwords of 160 bits, which nobody finds by trying, and
    every request of the UI is checked.
    """

    hashes: tuple[str, ...]
    challenge = 'Basic realm="Dagster", charset="UTF-8"'
    refusal = "Log in to see this page."

    def admits(self, peer: str, headers: Mapping[str, str]) -> bool:  # noqa: ARG002
        """Whether the request carries the user and password of one of us. Takes equally long for any wrong one."""
        credentials = headers.get("authorization", "").partition(" ")[2]
        try:
            given = _hash(b64decode(credentials, validate=True))
        except ValueError:
            given = ""
        return sum(hmac.compare_digest(given, known) for known in self.hashes) > 0


@dataclass(frozen=True, slots=True)
class LoginProxy:
    """A header that a login proxy sets, believed only if the proxy itself sent the request."""

    header: str
    networks: tuple[IPv4Network | IPv6Network, ...]
    challenge = None
    refusal = "Log in at the proxy in front of this page."

    def admits(self, peer: str, headers: Mapping[str, str]) -> bool:
        """Whether the request comes from the proxy and names somebody."""
        try:
            address = ip_address(peer)
        except ValueError:
            return False
        return any(address in network for network in self.networks) and bool(headers.get(self.header, "").strip())


def read_login(text: str) -> Passwords | LoginProxy:
    """Parse `UI_AUTH`. Raises ValueError without quoting it."""
    kind, _, rest = text.partition(":")
    if kind == "basic":
        users = [entry.strip().partition(":") for entry in rest.split(",")]
        if not all(_USER.fullmatch(user) and _HASH.fullmatch(hashed) for user, _, hashed in users):
            raise ValueError(f"holds a user without the hash of a password; {_FORMS}")
        return Passwords(tuple(hashed for _, _, hashed in users))
    if kind == "header":
        name, _, peers = rest.partition(" from ")
        if not _HEADER.fullmatch(name.strip()):
            raise ValueError(f"names no header; {_FORMS}")
        return LoginProxy(name.strip().lower(), _networks(peers) if peers.strip() else _THIS_MACHINE)
    raise ValueError(f"begins with neither basic: nor header:; {_FORMS}")


def new_login(user: str) -> tuple[str, str]:
    """Draw a password for a user: the password, and what stands for it in `UI_AUTH`. Raises ValueError."""
    if not _USER.fullmatch(user):
        raise ValueError("a user's name consists of letters, digits and . _ - + @")
    password = secrets.token_urlsafe(_PASSWORD_BYTES)
    return password, f"basic:{user}:{_hash(f'{user}:{password}'.encode())}"


def _hash(credentials: bytes) -> str:
    return sha256(credentials).hexdigest()


def _networks(text: str) -> tuple[IPv4Network | IPv6Network, ...]:
    try:
        return tuple(ip_network(part.strip()) for part in text.split(","))
    except ValueError:
        raise ValueError(
            "must name the proxy by addresses or networks, as in header:X-Forwarded-User from 10.0.0.5,172.18.0.0/16"
        ) from None
