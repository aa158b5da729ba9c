"""How the sandbox behaves where the provider's documentation is silent, and what differs between shops."""

from __future__ import annotations

from dataclasses import dataclass

from billing_orchestration.sandbox.provider.records import REFUND_STATUSES, outcome


@dataclass(slots=True)
class Switches:
    """One sandbox's choices. They may be changed while it runs."""

    # A payment enters (or re-enters, changed) the list this many seconds after its creation or last change of status.
    list_lag_s: float = 0.0
    # What a second request with a key whose first one is still being worked on gets, if keys are serialised:
    # wait | conflict | processing.
    concurrent_same_key: str = "wait"
    # Whether a request waits while another one with its key is worked on. If not, each of the two charges.
    serialise_keys: bool = True
    # Whether answers carry a Date header: the sandbox's own clock.
    date_header: bool = True
    # How long the provider works on a charge before it is executed.
    processing_s: float = 0.0
    # What a repeated key gets when the payment moved on meanwhile: its original answer, or the payment as it is now.
    replay: str = "original"
    # Whether an answer 400 or 403 uses its key up.
    remember_errors: bool = True
    # What the provider keeps of a payment; income_amount is the rest. None: it does not show an income_amount.
    fee_percent: float | None = 3.5
    # Whether the shop may charge saved methods, and save them: "This store can't make recurring payments".
    recurring: bool = True
    # What becomes of a refund that is asked for through the API: an outcome, as in a saved method's script.
    refunds: str = "succeeded"
    # Order of a list that is filtered by captured_at.
    captured_order: str = "created_at"
    # A shop under 54-FZ: off | demanded (a payment without a receipt is refused) | receipt_first (and a charge stays
    # pending until its receipt is registered).
    receipts: str = "off"
    # What becomes of a receipt (succeeded | canceled | pending: nothing, until the cabinet says), and how soon.
    registration: str = "succeeded"
    registration_s: float = 0.0
    # Who registers the receipts of a shop that has ever set it up, as GET /me tells it. None: it never did.
    fiscalization_provider: str | None = "atol"
    # Whether the shop's credentials may not read GET /me.
    me_forbidden: bool = False
    # Whether a query parameter or body field that the API does not know is refused or ignored.
    refuse_unknown_fields: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (
            ("concurrent_same_key", {"wait", "conflict", "processing"}),
            ("replay", {"original", "current"}),
            ("receipts", {"off", "demanded", "receipt_first"}),
            ("registration", {"succeeded", "canceled", "pending"}),
            ("captured_order", {"created_at", "captured_at"}),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {', '.join(sorted(allowed))}")
        if outcome(self.refunds).kind not in REFUND_STATUSES:
            raise ValueError(f"refunds are {', '.join(sorted(REFUND_STATUSES))}")
