"""Refunds: what one is, and the form of POST /refunds."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any

from billing_orchestration.sandbox.provider.answers import invalid
from billing_orchestration.sandbox.provider.bodies import amount_of, json_object, metadata_of, text, typed
from billing_orchestration.sandbox.provider.clock import iso
from billing_orchestration.sandbox.provider.receipts import receipt_of
from billing_orchestration.sandbox.provider.records import plain_json, shown_money
from billing_orchestration.sandbox.provider.switches import Switches

CREATE_FIELDS = frozenset((
    "amount", "deal", "description", "metadata", "payment_id", "receipt", "refund_method_data", "sources",
))  # fmt: skip
DESCRIPTION_LENGTH = 250


@dataclass(slots=True, eq=False)
class Refund:
    """Money on its way back (`pending`), given back (`succeeded`), or kept after all (`canceled`)."""

    id: str
    payment_id: str
    sequence: int
    amount: Decimal
    currency: str
    status: str
    created_at: datetime
    description: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    cancellation: dict[str, str] | None = None
    idempotence_key: str | None = None

    def json(self) -> bytes:
        """The refund as the API sends it."""
        return plain_json(self.document())

    def document(self) -> dict[str, Any]:
        """The refund as the API shows it."""
        shown: dict[str, Any] = {
            "id": self.id,
            "payment_id": self.payment_id,
            "status": self.status,
            "created_at": iso(self.created_at),
            "amount": shown_money(self.amount, self.currency),
        }
        if self.description is not None:
            shown["description"] = self.description
        if self.metadata:
            shown["metadata"] = self.metadata
        if self.cancellation is not None:
            shown["cancellation_details"] = self.cancellation
        return shown


@dataclass(frozen=True, slots=True)
class RefundRequest:
    """A creation of a refund that passed every check of form."""

    payment_id: str
    amount: Decimal
    currency: str
    description: str | None
    metadata: dict[str, str]


def refund_request(body: Any, switches: Switches) -> RefundRequest:
    """Check the form of a refund's creation, field by field."""
    body = json_object(body, CREATE_FIELDS, switches)
    payment_id = typed(body, "payment_id", str, None)
    if not payment_id:
        raise invalid("Payment id is missing", "payment_id")
    amount, currency = amount_of(body)
    if "receipt" in body:
        receipt_of(body, amount, currency, switches)
    for name in ("deal", "refund_method_data"):
        typed(body, name, dict, None)
    typed(body, "sources", list, None)
    return RefundRequest(payment_id, amount, currency, text(body, "description", DESCRIPTION_LENGTH), metadata_of(body))
