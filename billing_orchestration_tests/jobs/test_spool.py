"""What ops leave for each other page by page: it comes back as it was, and the memory for it does not grow."""

from __future__ import annotations

import tracemalloc
from datetime import datetime, timezone
from decimal import Decimal

from billing_orchestration.domain.expiry import ExpirePayment, NoAnswer, NotFoundThere
from billing_orchestration.domain.money import Money
from billing_orchestration.domain.provider_payment import ProviderPayment, UnusablePayment
from billing_orchestration.domain.settlement import PaymentRow
from billing_orchestration.jobs.spool import Spool


def a_row(number: int) -> PaymentRow:
    """A payment row with names of its own."""
    return PaymentRow(number, None, 1, "PENDING", Money(Decimal("299.00"), "RUB"), f"payment-{number}-é")


def a_payment() -> ProviderPayment:
    """A provider payment."""
    now = datetime(2026, 3, 1, tzinfo=timezone.utc)
    return ProviderPayment(
        id="p", status="succeeded", money=Money(Decimal("1.00"), "USD"), created_at=now, captured_at=now,
        refunded_amount=Decimal("0.00"), is_test=False, method_type=None, method_id=None, method_saved=False,
        metadata={"user_id": "u", "odd": ["x", None]}, cancellation_party=None, cancellation_reason=None,
    )  # fmt: skip


def test_everything_that_a_row_or_an_answer_can_be_comes_back_equal() -> None:
    answers = [None, a_payment(), UnusablePayment("p", "odd", {"item": [1]}), NotFoundThere(), NoAnswer("silence")]
    page = [(a_row(number), answer) for number, answer in enumerate(answers)]
    spool: Spool[object] = Spool()
    spool.add(page)
    spool.add([])
    spool.add([ExpirePayment(a_row(7), "why")])

    assert list(spool.pages()) == [page, [ExpirePayment(a_row(7), "why")]]
    # And once more, from the start.
    assert next(spool.pages()) == page
    assert len(spool) == 6


def test_what_it_holds_in_memory_does_not_grow_with_what_it_is_given() -> None:
    def most_held(pages: int) -> int:
        tracemalloc.start()
        spool: Spool[PaymentRow] = Spool()
        for page in range(pages):
            spool.add([a_row(page * 1000 + number) for number in range(1000)])
        assert sum(len(page) for page in spool.pages()) == pages * 1000
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        spool.close()
        return most

    assert most_held(400) < 1.5 * most_held(200)
