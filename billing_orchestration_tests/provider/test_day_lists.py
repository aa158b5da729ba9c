"""A day of the provider's books as the client reads it: every payment in any status, every refund, or an error."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest

from billing_orchestration.domain.money import Money
from billing_orchestration.domain.provider_payment import ProviderPayment, ProviderRefund, UnusablePayment
from billing_orchestration.provider.client import PaymentProvider
from billing_orchestration.provider.errors import IncompleteSlice
from billing_orchestration.provider.records import parse_refund
from billing_orchestration.provider.slices import RefundCollector
from billing_orchestration.sandbox.provider.server import Sandbox

DAY = datetime(2026, 3, 1, tzinfo=timezone.utc)
NEXT = DAY + timedelta(days=1)
NOON = DAY + timedelta(hours=12)
MILLISECOND = timedelta(milliseconds=1)
REFUND = {
    "id": "r-1",
    "payment_id": "p-1",
    "status": "succeeded",
    "amount": {"value": "90.00", "currency": "RUB"},
    "created_at": "2026-03-01T12:00:00.000Z",
}


@pytest.fixture
def provider(sandbox: Sandbox) -> Iterator[PaymentProvider]:
    sandbox.clock.set(NEXT + timedelta(hours=6))
    client = PaymentProvider(
        shop_id=sandbox.shop_id,
        secret_key=sandbox.secret_key,
        api_url=sandbox.url,
        read_attempts=2,
        read_backoff_s=0.001,
    )
    yield client
    client.close()


def test_a_day_holds_what_was_created_or_captured_in_it_in_any_status_and_nothing_of_its_neighbours(
    sandbox: Sandbox, provider: PaymentProvider
) -> None:
    add = sandbox.provider.add_payment
    add(id="first", created_at=DAY)
    add(id="last", created_at=NEXT - MILLISECOND)
    add(id="next-day", created_at=NEXT)
    add(id="day-before", created_at=DAY - MILLISECOND)
    add(id="captured-late", created_at=DAY - timedelta(days=5), captured_at=NOON)
    add(id="pending", status="pending", created_at=NOON)
    add(id="declined", status="canceled", created_at=NOON)
    add(id="held", status="waiting_for_capture", created_at=NOON)

    told = provider.fetch_day(DAY, NEXT)

    found = {payment.id: payment.status for payment in told.payments}
    assert found == {
        "first": "succeeded", "last": "succeeded", "captured-late": "succeeded", "pending": "pending",
        "declined": "canceled", "held": "waiting_for_capture",
    }  # fmt: skip


def test_what_may_still_be_paid_is_listed_by_when_it_was_created(sandbox: Sandbox, provider: PaymentProvider) -> None:
    add = sandbox.provider.add_payment
    add(id="held", status="waiting_for_capture", created_at=DAY)
    add(id="day-before", status="pending", created_at=DAY - MILLISECOND)
    add(id="next-day", status="pending", created_at=NEXT + MILLISECOND)
    add(id="paid", created_at=NOON)
    add(id="declined", status="canceled", created_at=NOON)
    for n in range(150):
        add(id=f"pending-{n}", status="pending", created_at=NOON + timedelta(minutes=n))

    told = provider.fetch_unfinished(DAY, NEXT)

    assert {payment.id for payment in told.payments} == {"held", *(f"pending-{n}" for n in range(150))}
    assert told.pages == 3


@pytest.mark.parametrize("parts", [1, 4, None])
def test_a_long_day_is_read_to_the_last_page_and_its_refunds_too(
    sandbox: Sandbox, provider: PaymentProvider, parts: int | None
) -> None:
    sandbox.provider.add_payments(
        [{"id": f"p-{n}", "amount": "90.00", "created_at": DAY + timedelta(minutes=n)} for n in range(450)]
    )
    for n in range(230):
        sandbox.provider.refund(f"p-{n}", "10.00", at=NOON + timedelta(seconds=n))
    sandbox.provider.refund("p-400", at=DAY - MILLISECOND)
    sandbox.provider.refund("p-401", at=NEXT)

    assert len(provider.fetch_day(DAY, NEXT, parallel_windows=parts).payments) == 450
    refunds = provider.fetch_refunds(DAY, NEXT)
    assert sorted(refund.payment_id for refund in refunds.refunds) == sorted(f"p-{n}" for n in range(230))
    assert refunds.pages == 3


def test_a_list_of_refunds_that_breaks_off_is_an_error(sandbox: Sandbox, provider: PaymentProvider) -> None:
    sandbox.provider.add_payment(id="p", amount="900.00", created_at=NOON)
    for n in range(101):
        sandbox.provider.refund("p", "1.00", at=NOON + timedelta(seconds=n))
    sandbox.misbehave("list_refunds", "error_before", times=None, skip=1)
    with pytest.raises(IncompleteSlice, match="the list of refunds broke off at page 2"):
        provider.fetch_refunds(DAY, NEXT)


def test_payments_are_looked_up_by_their_ids_whole_or_not_at_all(sandbox: Sandbox, provider: PaymentProvider) -> None:
    sandbox.provider.add_payment(id="paid", created_at=NOON)
    sandbox.provider.add_payment(id="odd", created_at=NOON, override={"amount": None})
    found = provider.look_up(["paid", "odd", "unheard-of", "paid"], 4)
    assert isinstance(found.pop("paid"), ProviderPayment)
    assert isinstance(found.pop("odd"), UnusablePayment)
    assert found == {"unheard-of": None}
    sandbox.misbehave("get", "error_before", payment_id="odd", times=None)
    with pytest.raises(IncompleteSlice, match="payment odd could not be looked up"):
        provider.look_up(["paid", "odd"], 4)


def test_a_refund_is_read_with_what_reconciliation_needs() -> None:
    assert parse_refund(REFUND) == ProviderRefund("r-1", "p-1", "succeeded", Money(Decimal("90.00"), "RUB"), NOON)


@pytest.mark.parametrize(("changes", "reason"), [
    ({"id": None}, "a refund: id (missing) is not a refund id"),
    ({"payment_id": 5}, "refund r-1: payment_id 5 is not a payment id"),
    ({"status": "waiting"}, "refund r-1: status 'waiting' is unknown"),
    ({"amount": {"value": "0.00", "currency": "RUB"}}, "refund r-1: amount 0.00 RUB is not above zero"),
    ({"created_at": "yesterday"}, "refund r-1: created_at 'yesterday' is not an instant with its offset"),
])  # fmt: skip
def test_an_odd_refund_is_set_aside_with_its_reason(changes: dict[str, Any], reason: str) -> None:
    told = parse_refund({**REFUND, **changes})
    assert isinstance(told, UnusablePayment)
    assert told.reason == reason
    assert told.payment_id == ("p-1" if "payment_id" not in changes else None)


def test_a_refund_that_two_pages_show_counts_once_and_in_its_later_state() -> None:
    pending, odd = {**REFUND, "status": "pending"}, {**REFUND, "status": "?"}
    for items in ([pending, REFUND], [REFUND, pending]):
        collector = RefundCollector()
        for item in [*items, odd, odd, {**odd, "id": "r-2"}]:
            collector.add_page([item])
        told = collector.whole()
        assert [refund.status for refund in told.refunds] == ["succeeded"]
        assert len(told.unusable) == 2
