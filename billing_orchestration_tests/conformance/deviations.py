"""Where the sandbox departs from the published file on purpose, with the reason. docs/conformance.md tells the same."""

from __future__ import annotations

import re
from dataclasses import dataclass

from billing_orchestration_tests.conformance.specification import Exchange


@dataclass(frozen=True)
class Deviation:
    """One kind of departure: the faults it covers, at which operations and statuses (None: any)."""

    name: str
    fault: str
    why: str
    status: int | None = None
    operation: str = ".*"

    def covers(self, fault: str, exchange: Exchange, operation: str) -> bool:
        """Whether this is the reason."""
        return (
            self.status in (None, exchange.status)
            and re.fullmatch(self.operation, operation) is not None
            and re.fullmatch(self.fault, fault, re.DOTALL) is not None
        )


DEVIATIONS = (
    Deviation(
        "undocumented status",
        r"ResponseNotFound: .*",
        "The API's handbook of errors knows 202, 415 and 429 for every call; 409 is a switch of the sandbox.",
    ),
    Deviation(
        "unknown word",
        r"(items\.[0-9]+\.)?(cancellation_details\.reason: .* is not one of .*|payment_method: .* not be resolved)",
        "Tests let the sandbox say reasons and methods that the provider may invent tomorrow.",
    ),
)
