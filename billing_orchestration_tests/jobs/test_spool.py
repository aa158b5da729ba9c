"""What ops leave for each other page by page: it comes back as it was, and the memory for it does not grow."""

from __future__ import annotations

import tracemalloc
from datetime import datetime, timezone
from decimal import Decimal

from billing_orchestration.domain.decisions import Code
from billing_orchestration.domain.expiry import AskedPayment, ExpirePayment, NoAnswer, NotFoundThere, StalePayment
from billing_orchestration.domain.money import Money
from billing_orchestration.domain.provider_payment import ProviderPayment, UnusablePayment
from billing_orchestration.domain.settlement_decisions import PaymentRow
from billing_orchestration.jobs.spool import Spool

ROUBLES = Money(Decimal("299.00"), "RUB")


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


def a_stale_payment(number: int) -> StalePayment:
    """One that is asked about, if it has a name there."""
    return StalePayment(number, f"payment-{number}-é" if number % 3 else None, None if number % 2 else ROUBLES)


def test_everything_that_a_row_or_an_answer_can_be_comes_back_equal() -> None:
    answers = [None, a_payment(), UnusablePayment("p", "odd", {"item": [1]}), NotFoundThere(), NoAnswer("silence")]
    page = [(a_row(number), answer) for number, answer in enumerate(answers)]
    spool: Spool[object] = Spool()
    spool.add(page)
    spool.add([])
    spool.add([a_row(7)])

    assert list(spool.pages()) == [page, [a_row(7)]]
    # And once more, from the start.
    assert next(spool.pages()) == page
    assert len(spool) == 6


def test_named_tuples_come_back_as_what_they_were_whatever_is_in_them_or_beside_them() -> None:
    answers = [None, a_payment(), UnusablePayment("p", "odd", {}), NotFoundThere(), NoAnswer("silence"), None]
    asked = [AskedPayment(a_stale_payment(number), answer) for number, answer in enumerate(answers)]
    alike = [ExpirePayment(a_stale_payment(number), f"reason {number % 2}", Code.DUPLICATE) for number in range(7)]
    mixed: list[object] = [*asked[:2], *alike[:2], (1, 2), a_row(1), None]
    pages = [asked, alike, alike[:1], mixed]
    spool: Spool[object] = Spool()
    for page in pages:
        spool.add(page)

    read = list(spool.pages())

    assert read == pages
    # Equal to a tuple is not enough.
    assert [[type(item) for item in page] for page in read] == [[type(item) for item in page] for page in pages]
    assert {type(item.row) for item in read[0] if isinstance(item, AskedPayment)} == {StalePayment}
    assert [item.row.subject for item in read[1] if isinstance(item, ExpirePayment)][-1] == "payment 6"


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
