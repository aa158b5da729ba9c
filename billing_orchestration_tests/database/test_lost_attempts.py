"""A renewal whose attempt the database does not know: it was restored, or its standby lost the last commits."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from billing_orchestration.domain.attempts import State
from billing_orchestration.domain.settlement_decisions import CloseAsGranted, Leave, RecordRefund, Settle
from billing_orchestration_tests.books import NOON, Books
from billing_orchestration_tests.database.test_settling import kind_of, only

MONTH_LATER = NOON.replace(month=4)
A_DAY = timedelta(days=1)


@pytest.mark.parametrize("number", [1, 2, 30])
def test_a_renewal_whose_attempt_was_lost_is_settled_by_what_its_metadata_proves(books: Books, number: int) -> None:
    subscription_id = books.subscription("anna")
    lost = books.planned(subscription_id, number=number)
    settled = only(books.settle(books.renewal(lost, method_id="card")))
    assert isinstance(settled.decision, Settle)
    assert books.ended_at(subscription_id) == MONTH_LATER
    found = books.read_attempt(lost.id)
    assert (found.state, found.number, found.external_payment_id) == (State.SUCCEEDED, number, "renewal")
    assert (found.idempotence_key, found.period_start, found.money) == (
        lost.idempotence_key,
        lost.period_start,
        lost.money,
    )
    assert (found.user_id, found.plan_id, found.payment_method_id) == ("anna", lost.plan_id, "card")
    assert found.may_have_been_sent
    (settlement,) = books.rows("settlements")
    assert (settlement.kind, settlement.attempt_id) == ("renewed", lost.id)
    (payment,) = books.rows("payments")
    assert (payment.status, payment.subscription_id) == ("SUCCEEDED", subscription_id)
    assert [(entry.action, entry.old) for entry in books.rows("audit_trail", "entity = 'attempt'")] == [
        ("succeeded", None)
    ]
    before = books.snapshot()
    assert isinstance(only(books.settle(books.renewal(lost, method_id="card"))).decision, Leave)
    assert books.snapshot() == before


def test_a_lost_renewal_that_expired_meanwhile_is_revived(books: Books) -> None:
    subscription_id = books.subscription("anna", ended_at=NOON - 5 * A_DAY, status="EXPIRED")
    books.settle(books.renewal(books.planned(subscription_id)))
    assert books.row("subscriptions", subscription_id).status == "ACTIVE"


def test_the_entry_about_a_lost_renewal_is_closed_when_it_is_settled_after_all(books: Books) -> None:
    subscription_id = books.subscription("anna")
    lost = books.planned(subscription_id)
    books.execute("UPDATE prices SET amount = 300")
    assert kind_of(only(books.settle(books.renewal(lost)))) == "unknown_attempt"
    books.execute("UPDATE prices SET amount = 299")
    books.settle(books.renewal(lost))
    assert [row.resolution for row in books.rows("quarantine")] == ["settled"]


MISFITS: dict[str, tuple[dict[str, Any], str | None, str | None]] = {
    "another amount": ({"amount": "298.99"}, None, "298.99 RUB is no price"),
    "another currency": ({"currency": "EUR"}, None, "299.00 EUR is no price"),
    "another user": ({"metadata": {"user_id": "berta"}}, None, "another user or plan"),
    "another plan": ({"metadata": {"plan_id": "77"}}, None, "another user or plan"),
    "an unknown provider": ({"metadata": {"payment_provider_id": "77"}}, None, "payment provider"),
    "an end that was moved": ({}, "UPDATE subscriptions SET ended_at = ended_at + interval '1 day'", "the end of"),
    "a subscription that is gone": ({}, "DELETE FROM subscriptions", "does not exist"),
    "an id that is not derived from it": ({"metadata": {"period_start": "2026-03-12T12:00:01+00:00"}}, None, None),
    "no period": ({"metadata": {"period_start": None}}, None, None),
    "no subscription": ({"metadata": {"subscription_id": "many"}}, None, None),
}


@pytest.mark.parametrize(("fields", "change", "why"), MISFITS.values(), ids=MISFITS.keys())
def test_a_renewal_whose_attempt_was_lost_and_that_does_not_fit_waits_for_a_person(
    books: Books, fields: dict[str, Any], change: str | None, why: str | None
) -> None:
    subscription_id = books.subscription("anna")
    lost = books.planned(subscription_id)
    if change is not None:
        books.execute(change)
    settled = only(books.settle(books.renewal(lost, **fields)))
    assert kind_of(settled) == "unknown_attempt"
    assert why is None or why in settled.decision.reason
    (entry,) = books.rows("quarantine")
    # Held by the subscription, too, unless the id proves that it is none of ours.
    is_held = why is not None or fields["metadata"].get("period_start", "") is None
    assert (entry.attempt_id, entry.subscription_id) == (lost.id, subscription_id if is_held else None)
    assert books.rows("renewal_attempts") == books.rows("settlements") == books.rows("payments") == []


@pytest.mark.parametrize("state", [State.SUCCEEDED, State.UNKNOWN, State.REVIEW])
def test_a_lost_renewal_of_a_period_that_another_attempt_has_taken_is_a_second_success(
    books: Books, state: str
) -> None:
    subscription_id = books.subscription("anna")
    lost, other = books.planned(subscription_id, number=2), books.attempt(subscription_id, state=state)
    assert kind_of(only(books.settle(books.renewal(lost)))) == "second_success"
    assert books.ended_at(subscription_id) == NOON
    # It is written down, so that the entry's period is known.
    states = {row.id: row.state for row in books.rows("renewal_attempts")}
    assert states == {other.id: state, lost.id: State.VOID}
    assert kind_of(only(books.settle(books.renewal(lost)))) == "second_success"
    (entry,) = books.rows("quarantine")
    assert (entry.attempt_id, entry.subscription_id) == (lost.id, subscription_id)


def test_an_attempt_of_its_period_that_was_never_sent_gives_way_to_a_lost_renewal(books: Books) -> None:
    subscription_id = books.subscription("anna")
    lost = books.planned(subscription_id, number=2)
    planned = books.attempt(subscription_id, state=State.PLANNED, first_sent_at=None)
    assert isinstance(only(books.settle(books.renewal(lost))).decision, Settle)
    assert [books.read_attempt(id_).state for id_ in (planned.id, lost.id)] == [State.VOID, State.SUCCEEDED]


def test_a_lost_renewal_that_was_refunded_in_full_is_recorded_and_its_period_not_charged_again(books: Books) -> None:
    subscription_id = books.subscription("anna")
    lost = books.planned(subscription_id)
    assert isinstance(only(books.settle(books.renewal(lost, refunded="299.00"))).decision, RecordRefund)
    assert books.read_attempt(lost.id).state == State.REFUNDED
    assert books.ended_at(subscription_id) == NOON


def test_a_lost_renewal_in_a_live_shop_that_is_a_test_is_in_review(books: Books) -> None:
    lost = books.planned(books.subscription("anna"))
    settled = only(books.settle(books.renewal(lost, is_test=True), is_live=True))
    assert kind_of(settled) == "test_payment"
    assert books.read_attempt(lost.id).state == State.REVIEW


def test_renewals_that_the_service_has_granted_are_recorded_when_only_our_records_were_lost(books: Books) -> None:
    subscription_id = books.subscription("anna")
    lost = books.planned(subscription_id)
    books.payment("renewal", status="SUCCEEDED", subscription_id=subscription_id)
    books.execute("UPDATE subscriptions SET ended_at = ended_at + interval '1 month'")
    assert isinstance(only(books.settle(books.renewal(lost))).decision, CloseAsGranted)
    assert books.read_attempt(lost.id).state == State.SUCCEEDED
    assert books.ended_at(subscription_id) == MONTH_LATER
