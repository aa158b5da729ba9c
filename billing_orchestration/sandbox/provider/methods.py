"""Payment methods: their types, and those that a shop may charge without their owner."""

from __future__ import annotations

from dataclasses import dataclass, field

from billing_orchestration.sandbox.provider.records import Outcome

METHOD_TYPES = frozenset((
    "alfabank", "apple_pay", "b2b_sberbank", "bank_card", "cash", "electronic_certificate", "google_pay",
    "installments", "mobile_balance", "psb", "qiwi", "sber_bnpl", "sber_loan", "sberbank", "sbp", "tinkoff_bank",
    "webmoney", "wechat", "yoo_money",
))  # fmt: skip


@dataclass(slots=True)
class SavedMethod:
    """A payment method at the provider; chargeable without its owner when `saved`. `script` is consumed one outcome
    for each NEW charge, the last one repeating."""

    id: str
    type: str = "bank_card"
    saved: bool = True
    script: list[Outcome] = field(default_factory=lambda: [Outcome("succeeded")])
    card_last4: str = "4444"

    def next_outcome(self) -> Outcome:
        return self.script.pop(0) if len(self.script) > 1 else self.script[0]
