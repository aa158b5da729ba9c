"""GET on a list: its filters, its page size and its cursor."""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from billing_orchestration.sandbox.provider.answers import invalid
from billing_orchestration.sandbox.provider.clock import milliseconds
from billing_orchestration.sandbox.provider.methods import METHOD_TYPES
from billing_orchestration.sandbox.provider.records import REFUND_STATUSES
from billing_orchestration.sandbox.provider.switches import Switches

INSTANT = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2})(\.[0-9]{1,3})?(Z|[+-][0-9]{2}:[0-9]{2})")
BOUNDS = ("gte", "gt", "lte", "lt")
LARGEST_PAGE = 100
DEFAULT_PAGE = 10
BEGINNING_OF_TIME = -(2**62)
END_OF_TIME = 2**62


@dataclass(frozen=True, slots=True)
class ListFilters:
    """What narrows a list: instants, each with its four bounds, and names with the values they take (None: any)."""

    instants: tuple[str, ...]
    exact: Mapping[str, frozenset[str] | None]

    @property
    def bounds(self) -> frozenset[str]:
        return frozenset(f"{name}.{bound}" for name in self.instants for bound in BOUNDS)


PAYMENTS = ListFilters(
    ("created_at", "captured_at"),
    {
        "status": frozenset({"pending", "waiting_for_capture", "succeeded", "canceled"}),
        "payment_method": METHOD_TYPES,
    },
)
REFUNDS = ListFilters(("created_at",), {"status": REFUND_STATUSES, "payment_id": None})


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a list goes on: strictly after this position, for the same filters."""

    position: int
    sequence: int
    page: int
    filters: int

    def encode(self) -> str:
        """Opaque to a client."""
        text = f"{self.position}.{self.sequence}.{self.page}.{self.filters}"
        return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def decode_cursor(text: str) -> Cursor:
    """The position, or a refusal."""
    try:
        padded = text + "=" * (-len(text) % 4)
        position, sequence, page, filters = base64.b64decode(padded, altchars=b"-_", validate=True).decode().split(".")
        return Cursor(int(position), int(sequence), int(page), int(filters))
    except (binascii.Error, ValueError):
        raise invalid("Cursor is not one that the list gave", "cursor") from None


@dataclass(frozen=True, slots=True)
class ListRequest:
    """A list request that passed every check. Bounds are inclusive milliseconds since 1970."""

    created_from: int
    created_to: int
    captured_from: int
    captured_to: int
    by_captured: bool
    exact: Mapping[str, str]
    limit: int
    cursor: Cursor | None
    filters: int

    @property
    def page(self) -> int:
        """1 for the first page of a scan."""
        return self.cursor.page if self.cursor else 1


def list_request(query: Sequence[tuple[str, str]], filters: ListFilters, switches: Switches) -> ListRequest:
    """Check the query of a list, parameter by parameter."""
    given: dict[str, str] = {}
    bound_names = filters.bounds
    for name, value in query:
        if name in given:
            raise invalid(f"Parameter {name} is given twice", name)
        if name in bound_names or name in filters.exact or name in {"limit", "cursor"}:
            given[name] = value
        elif switches.refuse_unknown_fields:
            raise invalid(f"Unknown parameter {name}", name)
    bounds = {name: _instant(name, value) for name, value in given.items() if name in bound_names}
    exact = {name: value for name, value in given.items() if name in filters.exact}
    for name, value in exact.items():
        allowed = filters.exact[name]
        if allowed is not None and value not in allowed:
            raise invalid(f"Unknown value of {name}", name)
    limit = given.get("limit", str(DEFAULT_PAGE))
    if not re.fullmatch(r"[0-9]{1,3}", limit) or not 1 <= int(limit) <= LARGEST_PAGE:
        raise invalid(f"Limit is not within 1 and {LARGEST_PAGE}", "limit")
    asked = zlib.crc32(
        repr(sorted((name, value) for name, value in given.items() if name not in {"limit", "cursor"})).encode()
    )
    cursor = None
    if "cursor" in given:
        cursor = decode_cursor(given["cursor"])
        if cursor.filters != asked:
            raise invalid("Cursor belongs to a list with other filters", "cursor")
    return ListRequest(
        created_from=_lowest(bounds, "created_at"),
        created_to=_highest(bounds, "created_at"),
        captured_from=_lowest(bounds, "captured_at"),
        captured_to=_highest(bounds, "captured_at"),
        by_captured=any(name.startswith("captured_at") for name in bounds),
        exact=exact,
        limit=int(limit),
        cursor=cursor,
        filters=asked,
    )


def _instant(name: str, value: str) -> int:
    parts = INSTANT.fullmatch(value)
    if parts is None:
        raise invalid("Not an ISO 8601 instant with a time zone (2026-01-31T09:00:00.000Z)", name)
    seconds, fraction, zone = parts.groups()
    text = f"{seconds}.{(fraction or '.0')[1:]:0<3}{'+00:00' if zone == 'Z' else zone}"
    try:
        return milliseconds(datetime.fromisoformat(text).astimezone(timezone.utc))
    except (ValueError, OverflowError):
        raise invalid("No such instant", name) from None


def _lowest(bounds: dict[str, int], name: str) -> int:
    inclusive = bounds.get(f"{name}.gte", BEGINNING_OF_TIME)
    return max(inclusive, bounds.get(f"{name}.gt", BEGINNING_OF_TIME) + 1)


def _highest(bounds: dict[str, int], name: str) -> int:
    return min(bounds.get(f"{name}.lte", END_OF_TIME), bounds.get(f"{name}.lt", END_OF_TIME) - 1)
