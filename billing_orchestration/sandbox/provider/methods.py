"""Payment methods: their types, and those that a shop may charge without their owner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from billing_orchestration.sandbox.provider.records import Outcome, plain_json

METHOD_TYPES = frozenset((
    "alfa_pay", "alfabank", "apple_pay", "b2b_sberbank", "bank_card", "cash", "electronic_certificate", "google_pay",
    "installments", "mobile_balance", "qiwi", "sber_bnpl", "sber_loan", "sberbank", "sbp", "tinkoff_bank",
    "webmoney", "wechat", "yoo_money",
))  # fmt: skip
METHOD_STATUSES = frozenset({"pending", "active", "inactive"})


@dataclass(slots=True)
class SavedMethod:
    """A payment method at the provider; chargeable without its owner while `active`.

    `script` is consumed one outcome for each NEW charge, the last one repeating. `confirmation`: how its owner
    confirms that it may be saved, while that is `pending`.
    """

    id: str
    account_id: str
    type: str = "bank_card"
    status: str = "active"
    script: list[Outcome] = field(default_factory=lambda: [Outcome("succeeded")])
    card_last4: str = "4444"
    confirmation: dict[str, str] | None = None
    metadata: dict[str, str] | None = None

    @property
    def saved(self) -> bool:
        return self.status == "active"

    def next_outcome(self) -> Outcome:
        return self.script.pop(0) if len(self.script) > 1 else self.script[0]

    def json(self) -> bytes:
        """The method as the API sends it."""
        return plain_json(self.document())

    def document(self) -> dict[str, Any]:
        """The method as GET /payment_methods/{id} shows it."""
        shown = shown_method(self.type, self.id, self.status, self.card_last4)
        shown["holder"] = {"account_id": self.account_id, "gateway_id": "1" + self.account_id}
        if self.type == "sbp" and self.saved:
            shown["payer_bank_details"] = {"bank_id": "100000000111"}
        if self.confirmation is not None and self.status == "pending":
            shown["confirmation"] = self.confirmation
        if self.metadata is not None:
            shown["metadata"] = self.metadata
        return shown


def shown_method(method_type: str, method_id: str, status: str, card_last4: str) -> dict[str, Any]:
    """What a payment and a saved method show alike: an `active` one is saved."""
    shown: dict[str, Any] = {"type": method_type, "id": method_id, "saved": status == "active", "status": status}
    if method_type == "bank_card":
        shown["title"] = f"Bank card *{card_last4}"
        shown["card"] = {
            "first6": "555555",
            "last4": card_last4,
            "expiry_year": "2031",
            "expiry_month": "12",
            "card_type": "MasterCard",
            "issuer_country": "RU",
        }
    elif method_type == "yoo_money":
        shown["title"] = "YooMoney wallet 4100116****6504"
        shown["account_number"] = "41001161446504"
    return shown
