"""Settling on a real PostgreSQL: each decision is written whole, in one transaction, once."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa

from billing_orchestration.database.audit import Stamp
from billing_orchestration.database.engine import create_engine
from billing_orchestration.database.settling import Settled, preview_batch, settle_batch
from billing_orchestration.database.settling_facts import ChangedMeanwhile
from billing_orchestration.domain.attempts import Attempt, State
from billing_orchestration.domain.billing_calendar import BillingCalendar
from billing_orchestration.domain.provider_payment import ProviderPayment
from billing_orchestration.domain.settlement_decisions import CloseAsGranted, Leave, Quarantine, RecordRefund, Settle
from billing_orchestration_tests.books import NOON, Books, naive

MONTH_LATER = NOON.replace(month=4)
A_DAY = timedelta(days=1)
OPEN_PLAIN = ["PENDING", "CREATED", "EXPIRED"]


def audit(books: Books, entity: str, entity_id: object) -> list[Any]:
    return books.rows("audit_trail", "entity = :entity AND entity_id = :id", entity=entity, id=str(entity_id))


def only(settled: list[Settled]) -> Settled:
    (result,) = settled
    return result


def kind_of(settled: Settled) -> str | None:
    return settled.decision.kind if isinstance(settled.decision, Quarantine) else None


def word_of(settled: Settled) -> str:
    """What was granted, or why nothing was."""
    decision = settled.decision
    return decision.code if isinstance(decision, Leave) else str(getattr(decision, "kind", "refunded"))


# A purchase


def test_a_payment_unknown_here_creates_its_row_and_its_subscription(books: Books) -> None:
    payment = books.paid("p", user="anna", method_type="sbp", method_id=None)
    settled = only(books.settle(payment))

    (subscription,) = books.rows("subscriptions")
    assert (subscription.user_id, subscription.plan_id, subscription.status) == ("anna", books.monthly, "ACTIVE")
    assert subscription.started_at == naive(NOON)
    assert subscription.ended_at == naive(MONTH_LATER)
    assert subscription.created_at == subscription.updated_at == naive(NOON)
    (row,) = books.rows("payments")
    assert (row.subscription_id, row.payment_provider_id) == (subscription.id, books.provider_id)
    assert (row.status, row.payment_method, row.currency, row.amount) == ("SUCCEEDED", "SBP", "RUB", Decimal("299.00"))
    assert row.external_payment_id == "p"
    assert (row.created_at, row.updated_at) == (naive(payment.created_at), naive(NOON))
    (settlement,) = books.rows("settlements")
    assert settlement.external_payment_id == "p"
    assert (settlement.kind, settlement.payment_id, settlement.subscription_id) == ("created", row.id, subscription.id)
    assert (settlement.user_id, settlement.plan_id, settlement.attempt_id) == ("anna", books.monthly, None)
    assert (settlement.amount, settlement.currency) == (Decimal("299.00"), "RUB")
    assert (settlement.period_start, settlement.period_end) == (naive(NOON), naive(MONTH_LATER))
    assert (settlement.settled_at, settlement.run_id) == (NOON, "run")
    assert (settled.subscription_id, settled.payment_row_id) == (subscription.id, row.id)
    assert books.rows("saved_methods") == books.rows("quarantine") == []


def test_every_change_of_a_settlement_is_in_the_audit_trail_with_run_reason_and_both_values(books: Books) -> None:
    subscription_id = books.subscription("anna")
    row_id = books.payment("p", subscription_id=subscription_id, status="EXPIRED")
    books.settle(books.paid("p", user="anna"), stamp=Stamp("some_job", "some run", NOON))

    (of_subscription,) = audit(books, "subscription", subscription_id)
    assert of_subscription.action == "extended"
    assert of_subscription.old == {"ended_at": NOON.isoformat(), "status": "ACTIVE"}
    assert of_subscription.new == {"ended_at": MONTH_LATER.isoformat(), "status": "ACTIVE"}
    (of_payment,) = audit(books, "payment", row_id)
    assert of_payment.action == "succeeded"
    assert of_payment.old == {"status": "EXPIRED", "subscription_id": subscription_id}
    assert of_payment.new == {"status": "SUCCEEDED", "subscription_id": subscription_id, "payment_method": "BANK_CARD"}
    entries = books.rows("audit_trail")
    assert len(entries) == 2
    assert {(row.job, row.run_id, row.at, row.external_payment_id) for row in entries} == {
        ("some_job", "some run", NOON, "p")
    }
    assert all(row.reason for row in entries)


@pytest.mark.parametrize("status", OPEN_PLAIN)
def test_a_row_that_is_not_paid_yet_is_settled_and_keeps_what_the_service_wrote(books: Books, status: str) -> None:
    created_at = NOON - 40 * A_DAY
    row_id = books.payment("p", status=status, created_at=created_at, method="YOO_MONEY")
    books.settle(books.paid("p", method_type=None))
    row = books.row("payments", row_id)
    assert (row.status, row.payment_method, row.created_at) == ("SUCCEEDED", "YOO_MONEY", naive(created_at))
    assert row.subscription_id == books.rows("subscriptions")[0].id
    assert row.updated_at == naive(NOON)
    assert len(books.rows("payments")) == 1


@pytest.mark.parametrize("method_type", ["sber_loan", "alfa_pay", "telepathy"])
def test_a_method_without_a_label_here_leaves_the_column_null(books: Books, method_type: str) -> None:
    books.settle(books.paid("p", method_type=method_type))
    assert books.rows("payments")[0].payment_method is None


def test_the_subscription_that_lasts_longest_is_extended_and_no_other(books: Books) -> None:
    books.subscription("anna", ended_at=NOON - A_DAY)
    longest = books.subscription("anna", ended_at=NOON)
    others = [
        books.subscription("berta"),
        books.subscription("anna", plan_id=books.plan()),
        books.subscription("anna", status="CANCELED", ended_at=NOON + A_DAY),
        books.subscription("anna", status=None, ended_at=NOON + A_DAY),
        books.subscription("anna", plan_id=None, ended_at=NOON + A_DAY),
    ]
    before = [books.row("subscriptions", id_) for id_ in others]
    assert only(books.settle(books.paid(user="anna"))).subscription_id == longest
    assert books.ended_at(longest) == MONTH_LATER
    assert [books.row("subscriptions", id_) for id_ in others] == before


@pytest.mark.parametrize("zone", ["Asia/Vladivostok", "America/Anchorage"])
def test_whatever_the_zone_of_an_instant_the_tables_hold_utc(books: Books, zone: str) -> None:
    there = ZoneInfo(zone)
    books.calendar = BillingCalendar(there)
    subscription_id = books.subscription("anna")
    elsewhere = NOON.astimezone(there)
    payments = [
        replace(books.paid("extends", user="anna"), created_at=elsewhere),
        replace(books.paid("creates", user="berta"), created_at=elsewhere),
    ]
    books.payment("extends")
    books.settle(*payments, stamp=Stamp("job", "run", elsewhere))
    assert books.ended_at(subscription_id) == MONTH_LATER
    created = books.rows("subscriptions", "user_id = 'berta'")[0]
    assert (created.started_at, created.ended_at) == (naive(NOON), naive(MONTH_LATER))
    assert {row.updated_at for row in books.rows("payments")} == {naive(NOON)}
    assert books.rows("payments", "external_payment_id = 'creates'")[0].created_at == naive(NOON)
    assert {row.settled_at for row in books.rows("settlements")} == {NOON}


# The saved method


def test_a_purchase_that_saved_its_method_is_remembered_for_renewals(books: Books) -> None:
    books.price(books.monthly, "299.00", "EUR")
    settled = only(books.settle(books.paid("p", method_id="card", method_saved=True, currency="EUR")))
    (saved,) = books.rows("saved_methods")
    assert (saved.subscription_id, saved.payment_method_id, saved.currency) == (settled.subscription_id, "card", "EUR")
    assert (saved.payment_provider_id, saved.saved_by_external_payment_id) == (books.provider_id, "p")


def test_a_later_purchase_replaces_the_saved_method_and_one_that_is_settled_late_does_not(books: Books) -> None:
    subscription_id = books.subscription("anna")
    bought = [NOON - 3 * A_DAY, NOON - A_DAY, NOON - 2 * A_DAY]
    for number, captured_at in enumerate(bought):
        books.settle(
            books.paid(
                f"p{number}",
                method_id=f"card {number}",
                method_saved=True,
                created_at=captured_at,
                captured_at=captured_at,
            )
        )
    (saved,) = books.rows("saved_methods")
    assert (saved.subscription_id, saved.payment_method_id) == (subscription_id, "card 1")
    assert saved.saved_at == bought[1]


@pytest.mark.parametrize("fields", [{"method_saved": False}, {"method_saved": True, "method_id": None}])
def test_a_method_that_was_not_saved_is_not_remembered(books: Books, fields: dict[str, Any]) -> None:
    books.settle(books.paid("p", **fields))
    assert books.rows("saved_methods") == []


def test_a_renewal_never_changes_the_saved_method(books: Books) -> None:
    attempt = books.attempt(books.subscription("anna"))
    books.settle(books.renewal(attempt, method_saved=True, method_id="card"))
    assert books.rows("saved_methods") == []


# Refunds


def test_a_full_refund_of_an_unknown_payment_is_recorded_and_grants_nothing(books: Books) -> None:
    settled = only(books.settle(books.paid("p", refunded="299.00", method_saved=True)))
    assert isinstance(settled.decision, RecordRefund)
    (row,) = books.rows("payments")
    assert (row.status, row.subscription_id, row.id) == ("REFUNDED", None, settled.payment_row_id)
    (settlement,) = books.rows("settlements")
    assert (settlement.kind, settlement.payment_id, settlement.period_end) == ("refunded", row.id, None)
    assert books.rows("subscriptions") == books.rows("saved_methods") == []
    assert [entry.action for entry in audit(books, "payment", row.id)] == ["created"]


def test_a_full_refund_of_a_pending_row_keeps_its_subscription_as_it_is(books: Books) -> None:
    subscription_id = books.subscription("anna")
    row_id = books.payment("p", subscription_id=subscription_id)
    books.settle(books.paid("p", user="anna", refunded="299.00"))
    row = books.row("payments", row_id)
    assert (row.status, row.subscription_id) == ("REFUNDED", subscription_id)
    assert books.ended_at(subscription_id) == NOON


# A renewal


def test_a_renewal_extends_from_the_old_end_closes_its_attempt_and_writes_a_new_payment(books: Books) -> None:
    subscription_id = books.subscription("anna", ended_at=NOON - 2 * A_DAY)
    attempt = books.attempt(subscription_id, state=State.PLANNED)
    settled = only(books.settle(books.renewal(attempt, "new payment")))

    assert isinstance(settled.decision, Settle)
    assert books.ended_at(subscription_id) == MONTH_LATER - 2 * A_DAY
    (row,) = books.rows("payments")
    assert (row.external_payment_id, row.subscription_id, row.status) == ("new payment", subscription_id, "SUCCEEDED")
    (closed,) = books.rows("renewal_attempts")
    assert (closed.state, closed.external_payment_id, closed.closed_at) == ("SUCCEEDED", "new payment", NOON)
    (settlement,) = books.rows("settlements")
    assert (settlement.kind, settlement.attempt_id) == ("renewed", attempt.id)
    assert settlement.period_start == naive(NOON - 2 * A_DAY)
    (entry,) = audit(books, "attempt", attempt.id)
    assert (entry.action, entry.old) == ("succeeded", {"state": "PLANNED"})
    assert entry.new == {"state": "SUCCEEDED", "subscription_id": subscription_id}


@pytest.mark.parametrize("state", [State.PLANNED, State.UNKNOWN, State.PENDING])
def test_a_success_closes_an_attempt_from_every_open_state(books: Books, state: str) -> None:
    attempt = books.attempt(books.subscription("anna"), state=state, external_payment_id="renewal")
    books.settle(books.renewal(attempt))
    assert books.read_attempt(attempt.id).state == State.SUCCEEDED


def test_a_renewal_revives_a_subscription_that_expired_meanwhile(books: Books) -> None:
    subscription_id = books.subscription("anna", status="EXPIRED")
    books.settle(books.renewal(books.attempt(subscription_id)))
    assert books.row("subscriptions", subscription_id).status == "ACTIVE"
    (entry,) = audit(books, "subscription", subscription_id)
    assert (entry.old["status"], entry.new["status"]) == ("EXPIRED", "ACTIVE")


@pytest.mark.parametrize("status", ["CANCELED", None])
def test_a_renewal_of_an_ended_subscription_is_granted_and_a_person_is_told_once(
    books: Books, status: str | None
) -> None:
    subscription_id = books.subscription("anna", status=status)
    settled = only(books.settle(books.renewal(books.attempt(subscription_id))))
    assert books.row("subscriptions", subscription_id).status == status
    assert books.ended_at(subscription_id) == MONTH_LATER
    (problem,) = books.rows("quarantine")
    assert (problem.kind, problem.subscription_id) == ("unwanted_renewal", subscription_id)
    assert problem.resolved_at is None
    assert settled.newly_opened


def test_a_renewals_row_that_the_webhook_wrote_unpaid_is_finished(books: Books) -> None:
    subscription_id = books.subscription("anna")
    row_id = books.payment("renewal", status="EXPIRED")
    books.settle(books.renewal(books.attempt(subscription_id)))
    (row,) = books.rows("payments")
    assert (row.id, row.status, row.subscription_id) == (row_id, "SUCCEEDED", subscription_id)
    assert books.ended_at(subscription_id) == MONTH_LATER


def test_a_renewal_that_the_webhook_has_paid_and_extended_only_closes_the_attempt(books: Books) -> None:
    subscription_id = books.subscription("anna")
    attempt = books.attempt(subscription_id)
    row_id = books.payment("renewal", status="SUCCEEDED", subscription_id=subscription_id)
    books.execute("UPDATE subscriptions SET ended_at = ended_at + interval '1 month'")
    before = books.rows("subscriptions"), books.rows("payments")
    settled = only(books.settle(books.renewal(attempt)))
    assert isinstance(settled.decision, CloseAsGranted)
    assert (books.rows("subscriptions"), books.rows("payments")) == before
    assert books.read_attempt(attempt.id).state == State.SUCCEEDED
    (settlement,) = books.rows("settlements")
    assert (settlement.kind, settlement.payment_id, settlement.attempt_id) == ("renewed", row_id, attempt.id)
    assert (settlement.period_start, settlement.period_end) == (naive(NOON), naive(MONTH_LATER))


def test_a_bonus_day_on_top_of_a_paid_renewal_is_not_taken_for_its_grant(books: Books) -> None:
    subscription_id = books.subscription("anna")
    attempt = books.attempt(subscription_id)
    books.payment("renewal", status="SUCCEEDED", subscription_id=subscription_id)
    books.execute("UPDATE subscriptions SET ended_at = ended_at + interval '1 day'")
    assert kind_of(only(books.settle(books.renewal(attempt)))) == "unclear_grant"
    assert books.read_attempt(attempt.id).state == State.REVIEW
    assert books.rows("settlements") == []


@pytest.mark.parametrize("beside", ["a purchase that the webhook granted", "a purchase that was settled here"])
def test_a_renewal_whose_row_the_webhook_wrote_beside_another_grant_is_left_to_a_person(
    books: Books, beside: str
) -> None:
    """The end has moved, by a purchase of the same customer: that says nothing about the renewal."""
    subscription_id = books.subscription("anna")
    attempt = books.attempt(subscription_id)
    if beside == "a purchase that was settled here":
        books.settle(books.paid("purchase", user="anna"))
    else:
        books.payment("purchase", status="SUCCEEDED", subscription_id=subscription_id)
        books.execute("UPDATE subscriptions SET ended_at = ended_at + interval '1 month'")
    books.payment("renewal", status="SUCCEEDED", subscription_id=subscription_id)
    ended_at = books.ended_at(subscription_id)

    settled = only(books.settle(books.renewal(attempt)))

    assert kind_of(settled) == "unclear_grant"
    assert books.ended_at(subscription_id) == ended_at
    assert books.read_attempt(attempt.id).state == State.REVIEW
    assert [row.kind for row in books.rows("quarantine")] == ["unclear_grant"]


def test_a_renewal_whose_row_the_webhook_wrote_without_extending_is_extended(books: Books) -> None:
    subscription_id = books.subscription("anna")
    attempt = books.attempt(subscription_id)
    row_id = books.payment("renewal", status="SUCCEEDED")
    row = books.row("payments", row_id)
    books.settle(books.renewal(attempt))
    assert books.ended_at(subscription_id) == MONTH_LATER
    assert books.rows("payments") == [row]
    assert books.rows("settlements")[0].payment_id == row_id


def test_a_renewal_refunded_in_full_closes_its_attempt_as_refunded(books: Books) -> None:
    subscription_id = books.subscription("anna")
    attempt = books.attempt(subscription_id)
    books.settle(books.renewal(attempt, refunded="299.00"))
    assert books.ended_at(subscription_id) == NOON
    assert books.read_attempt(attempt.id).state == State.REFUNDED
    assert [(row.status, row.subscription_id) for row in books.rows("payments")] == [("REFUNDED", subscription_id)]


# A late success


@pytest.mark.parametrize("state", [State.DECLINED, State.VOID])
def test_a_late_success_of_an_attempt_that_counted_as_unpaid_is_granted(books: Books, state: str) -> None:
    subscription_id = books.subscription("anna")
    attempt = books.attempt(subscription_id, state=state, external_payment_id="the canceled one")
    books.settle(books.renewal(attempt))
    assert books.ended_at(subscription_id) == MONTH_LATER
    after = books.read_attempt(attempt.id)
    assert (after.state, after.external_payment_id) == (State.SUCCEEDED, "renewal")


def late_and_rival(books: Books, **rival: Any) -> tuple[Attempt, Attempt]:
    subscription_id = books.subscription("anna")
    late = books.attempt(subscription_id, state=State.VOID)
    return late, books.attempt(subscription_id, number=2, **rival)


def test_a_late_success_takes_the_place_of_an_attempt_that_was_never_sent(books: Books) -> None:
    late, rival = late_and_rival(books, state=State.PLANNED, first_sent_at=None)
    books.settle(books.renewal(late))
    assert books.read_attempt(late.id).state == State.SUCCEEDED
    assert books.read_attempt(rival.id).state == State.VOID
    assert [entry.action for entry in audit(books, "attempt", rival.id)] == ["void"]
    assert books.ended_at(late.subscription_id) == MONTH_LATER


@pytest.mark.parametrize("state", [State.PLANNED, State.SUCCEEDED])
def test_a_late_success_beside_an_attempt_that_may_be_paid_is_a_second_success(books: Books, state: str) -> None:
    late, rival = late_and_rival(books, state=state)
    settled = only(books.settle(books.renewal(late)))
    assert kind_of(settled) == "second_success"
    assert books.ended_at(late.subscription_id) == NOON
    assert [books.read_attempt(attempt.id).state for attempt in (late, rival)] == [State.VOID, state]
    assert books.rows("settlements") == books.rows("payments") == []
    assert [row.kind for row in books.rows("quarantine")] == ["second_success"]


def test_a_late_success_that_is_odd_stops_the_attempt_that_was_about_to_be_sent(books: Books) -> None:
    late, rival = late_and_rival(books, state=State.PLANNED, first_sent_at=None)
    settled = only(books.settle(books.renewal(late, amount="300.00")))
    assert kind_of(settled) == "amount_differs"
    assert books.read_attempt(late.id).state == State.REVIEW
    assert books.read_attempt(rival.id).state == State.VOID


def test_a_late_success_that_was_refunded_stops_the_attempt_that_was_about_to_be_sent(books: Books) -> None:
    late, rival = late_and_rival(books, state=State.PLANNED, first_sent_at=None)
    assert isinstance(only(books.settle(books.renewal(late, refunded="299.00"))).decision, RecordRefund)
    assert books.read_attempt(late.id).state == State.REFUNDED
    assert books.read_attempt(rival.id).state == State.VOID


def test_a_test_payment_that_names_a_paid_attempt_does_not_reopen_it(books: Books) -> None:
    attempt = books.attempt(books.subscription("anna"))
    books.settle(books.renewal(attempt))
    settled = only(books.settle(books.renewal(attempt, "a test", is_test=True), is_live=True))
    assert kind_of(settled) == "test_payment"
    after = books.read_attempt(attempt.id)
    assert (after.state, after.external_payment_id) == (State.SUCCEEDED, "renewal")


def test_a_renewal_with_another_amount_goes_to_review_and_stays_there(books: Books) -> None:
    subscription_id = books.subscription("anna")
    attempt = books.attempt(subscription_id)
    for newly_opened in (True, False):
        settled = only(books.settle(books.renewal(attempt, amount="300.00")))
        assert (kind_of(settled), settled.newly_opened) == ("amount_differs", newly_opened)
    after = books.read_attempt(attempt.id)
    assert (after.state, after.external_payment_id) == (State.REVIEW, "renewal")
    assert books.ended_at(subscription_id) == NOON
    (problem,) = books.rows("quarantine")
    assert (problem.attempt_id, problem.subscription_id) == (attempt.id, subscription_id)
    assert books.rows("payments") == books.rows("settlements") == []


# What the service's webhook has half done


def test_a_row_that_succeeded_and_was_granted_to_nobody_is_granted_once_and_linked(books: Books) -> None:
    row_id = books.payment("p", status="SUCCEEDED")
    settled = only(books.settle(books.paid("p")))
    assert (word_of(settled), settled.payment_row_id) == ("created", row_id)
    row = books.row("payments", row_id)
    assert (row.status, row.subscription_id) == ("SUCCEEDED", settled.subscription_id)
    assert word_of(only(books.settle(books.paid("p")))) == "settled_before"
    assert len(books.rows("subscriptions")) == 1


@pytest.mark.parametrize("status", ["ACTIVE", "EXPIRED", "CANCELED"])
def test_a_subscription_that_was_changed_since_may_be_the_grant_that_was_never_linked(
    books: Books, status: str
) -> None:
    subscription_id = books.subscription("anna", status=status, ended_at=NOON + 30 * A_DAY)
    books.payment("p", status="SUCCEEDED")
    grant = "extended" if status == "ACTIVE" else "created"
    for changed_at, kind in (
        (NOON - timedelta(hours=2), grant),  # it was paid 19 minutes ago, and clocks may differ by 30
        (NOON - timedelta(minutes=40), "unclear_grant"),
        (NOON - timedelta(minutes=10), "unclear_grant"),
    ):
        books.execute("UPDATE subscriptions SET updated_at = :at", at=changed_at.replace(tzinfo=None))
        with books.engine.connect() as connection:  # rolled back
            [settled] = settle_batch(
                connection, [books.paid("p")], stamp=books.stamp(), calendar=books.calendar, is_live=False
            )
        assert word_of(settled) == kind
    assert books.ended_at(subscription_id) == NOON + 30 * A_DAY


def test_another_plans_or_an_unpaid_subscription_says_nothing_about_a_grant(books: Books) -> None:
    now = NOON.replace(tzinfo=None)
    for status, plan_id in (("ACTIVE", books.plan()), ("CREATED", books.monthly)):
        other = books.subscription("anna", plan_id=plan_id, status=status)
        books.execute("UPDATE subscriptions SET updated_at = :at WHERE id = :id", at=now, id=other)
    books.payment("p", status="SUCCEEDED")
    assert word_of(only(books.settle(books.paid("p")))) == "created"


def test_the_customers_own_row_is_settled_and_not_a_duplicate_without_a_subscription(books: Books) -> None:
    books.tolerate_duplicates()
    subscription_id = books.subscription("anna")
    duplicates = [books.payment("p"), books.payment("p", status="SUCCEEDED")]
    own = books.payment("p", subscription_id=subscription_id)
    settled = only(books.settle(books.paid("p")))
    assert (word_of(settled), settled.subscription_id, settled.payment_row_id) == ("extended", subscription_id, own)
    assert books.statuses("payments", *duplicates, own) == ["PENDING", "SUCCEEDED", "SUCCEEDED"]


@pytest.mark.parametrize(
    ("amount", "currency", "kind"),
    [
        ("1.00", "RUB", "amount_differs"),
        ("299.00", "USD", "amount_differs"),
        ("199.00", "RUB", "created"),
        ("3.50", "EUR", "created"),
    ],
)
def test_what_nobody_has_written_down_must_be_one_of_the_plans_prices(
    books: Books, amount: str, currency: str, kind: str
) -> None:
    for price in (("199.00", "RUB"), ("3.50", "EUR")):
        books.price(books.monthly, *price)
    books.price(books.plan(price=None), "1.00")
    books.price(books.monthly, "77.00", None)
    settled = only(books.settle(books.paid("p", amount=amount, currency=currency)))
    assert word_of(settled) == kind
    assert len(books.rows("payments")) == len(books.rows("subscriptions")) == (kind == "created")


# Once


def every_kind(books: Books) -> list[ProviderPayment]:
    """One payment for each kind of decision, each for a customer of its own."""
    books.payment("pending")
    books.payment("agreed", status="SUCCEEDED", subscription_id=books.subscription("a"))
    books.payment("canceled", status="CANCELED")
    books.payment("differs", amount="1.00")
    renewed, extended = books.attempt(books.subscription("r")), books.subscription("e")
    gone = books.attempt(books.subscription("g"))
    books.execute("DELETE FROM subscriptions WHERE id = :id", id=gone.subscription_id)
    assert extended
    return [
        books.paid("created", user="c", method_saved=True),
        books.paid("pending", user="p"),
        books.paid("extended", user="e"),
        books.paid("agreed", user="a"),
        books.paid("canceled", user="x"),
        books.paid("differs", user="d"),
        books.paid("refunded", user="f", refunded="299.00"),
        books.paid("no metadata", user=None),
        books.paid("no plan", user="n", plan_id=987654),
        books.renewal(renewed, "renewed"),
        books.renewal(gone, "gone"),
    ]


def test_settling_a_second_time_changes_nothing(books: Books) -> None:
    payments = every_kind(books)
    first = books.settle(*payments)
    assert {type(result.decision) for result in first} == {Settle, Leave, Quarantine, RecordRefund}
    before = books.snapshot()
    second = books.settle(*payments, stamp=Stamp("another job", "another run", NOON + A_DAY))
    assert books.snapshot() == before
    assert {type(result.decision) for result in second} == {Leave, Quarantine}
    assert not any(result.newly_opened for result in second)


def test_a_batch_and_one_at_a_time_come_to_the_same(books: Books, postgres_server: Any, migrated_template: str) -> None:
    together = books.settle(*every_kind(books))
    with postgres_server.database(migrated_template) as url:
        engine = create_engine(url)
        other = Books(engine)
        apart = [only(other.settle(payment)) for payment in every_kind(other)]
        assert _without_ids(other) == _without_ids(books)
        engine.dispose()
    assert [type(result.decision) for result in apart] == [type(result.decision) for result in together]


def _without_ids(books: Books) -> dict[str, Any]:
    dropped = {"id", "payment_id", "entity_id", "old", "new"}
    return {
        table: sorted(str({name: value for name, value in row._mapping.items() if name not in dropped}) for row in rows)
        for table, rows in books.snapshot().items()
    }


def test_results_are_in_the_order_of_the_batch_with_their_rows(books: Books) -> None:
    payments = [books.paid(f"p{number}", user=f"user {number}") for number in range(200)]
    for payment in payments[::3]:
        books.payment(payment.id)
    for payment in payments[::4]:
        books.subscription(payment.metadata["user_id"])
    settled = books.settle(*payments)
    assert [result.payment for result in settled] == payments
    rows = {row.external_payment_id: row for row in books.rows("payments")}
    users = {row.id: row.user_id for row in books.rows("subscriptions")}
    assert len(rows) == len(users) == len(books.rows("settlements")) == 200
    for result in settled:
        assert result.payment_row_id == rows[result.payment.id].id
        assert result.subscription_id == rows[result.payment.id].subscription_id
        assert users[result.subscription_id or 0] == result.payment.metadata["user_id"]
    assert {row.status for row in rows.values()} == {"SUCCEEDED"}


def test_an_empty_batch_is_no_work(books: Books) -> None:
    before = books.snapshot()
    assert books.settle() == []
    assert books.snapshot() == before


def test_a_batch_that_is_not_committed_leaves_nothing(books: Books) -> None:
    payments = every_kind(books)
    before = books.snapshot()
    with books.engine.connect() as connection:
        settle_batch(connection, payments, stamp=books.stamp(), calendar=books.calendar, is_live=False)
        connection.rollback()
    assert books.snapshot() == before


def test_a_preview_decides_the_same_and_writes_nothing(books: Books) -> None:
    payments = every_kind(books)
    before = books.snapshot()
    with books.engine.connect() as connection:
        shown = preview_batch(connection, payments, stamp=books.stamp(), calendar=books.calendar, is_live=False)
        connection.commit()
    assert books.snapshot() == before
    assert [result.decision for result in shown] == [result.decision for result in books.settle(*payments)]


# Rows with flaws


@pytest.mark.parametrize("statuses", [["PENDING", "PENDING"], ["CANCELED", "PENDING"]])
def test_of_several_rows_with_one_id_one_is_settled(flawed_books: Books, statuses: list[str]) -> None:
    books = flawed_books
    ids = [books.payment("p", status=status) for status in statuses]
    settled = only(books.settle(books.paid("p")))
    wanted = ids[statuses.index("PENDING")]
    assert settled.payment_row_id == wanted
    assert [row.status for row in books.rows("payments")] == [
        "SUCCEEDED" if id_ == wanted else status for id_, status in zip(ids, statuses, strict=True)
    ]
    assert len(books.rows("settlements")) == 1


def test_a_row_that_is_final_beside_a_pending_one_grants_nothing(flawed_books: Books) -> None:
    books = flawed_books
    books.payment("p", status="PENDING")
    books.payment("p", status="REFUNDED")
    before = books.snapshot()
    assert isinstance(only(books.settle(books.paid("p"))).decision, Leave)
    assert books.snapshot() == before


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"currency": None}, "amount_differs"),
        ({"amount": "299.01"}, "amount_differs"),
        ({"status": None}, "status_unknown"),
    ],
)
def test_a_row_that_contradicts_the_provider_goes_to_quarantine(
    books: Books, fields: dict[str, Any], kind: str
) -> None:
    row_id = books.payment("p", **fields)
    before = books.rows("payments")
    settled = only(books.settle(books.paid("p")))
    assert kind_of(settled) == kind
    assert books.rows("payments") == before
    (problem,) = books.rows("quarantine")
    assert (problem.problem_key, problem.payment_id) == (f"payment p:{kind}", row_id)
    assert problem.evidence["item"]["id"] == "p"


def test_an_amount_that_is_no_number_goes_to_quarantine(books: Books) -> None:
    books.payment("p", amount="NaN")
    assert kind_of(only(books.settle(books.paid("p")))) == "amount_differs"


def test_a_null_method_and_a_null_link_are_filled_in(books: Books) -> None:
    row_id = books.payment("p", method=None, subscription_id=None)
    books.settle(books.paid("p"))
    row = books.row("payments", row_id)
    assert row.payment_method == "BANK_CARD"
    assert row.subscription_id is not None


@pytest.mark.parametrize("ended_at", [None, "infinity", "-infinity", "0044-03-15 BC", "9999-12-31", "294276-12-31"])
def test_an_end_that_cannot_be_counted_from_goes_to_quarantine_and_the_batch_goes_on(
    books: Books, ended_at: str | None
) -> None:
    subscription_id = books.subscription("anna", ended_at=ended_at)
    odd, plain = books.settle(books.paid("p", user="anna"), books.paid("q", user="berta"))
    assert (kind_of(odd), odd.subscription_id) == ("no_end", subscription_id)
    assert isinstance(plain.decision, Settle)


@pytest.mark.parametrize("started_at", [None, "infinity", "-infinity", "0044-03-15 BC", "9999-12-31"])
def test_a_start_that_python_cannot_hold_does_not_hinder_an_extension(books: Books, started_at: str | None) -> None:
    subscription_id = books.subscription("anna", started_at=started_at)
    books.settle(books.paid("p", user="anna"))
    assert books.ended_at(subscription_id) == MONTH_LATER


def test_a_renewal_of_a_subscription_without_a_usable_end_goes_to_review(books: Books) -> None:
    attempt = books.attempt(books.subscription("anna"))
    books.execute("UPDATE subscriptions SET ended_at = 'infinity'")
    assert kind_of(only(books.settle(books.renewal(attempt)))) == "subscription_gone"
    assert books.read_attempt(attempt.id).state == State.REVIEW


def test_a_renewal_of_a_deleted_subscription_goes_to_review(books: Books) -> None:
    attempt = books.attempt(books.subscription("anna"))
    books.execute("DELETE FROM subscriptions")
    assert kind_of(only(books.settle(books.renewal(attempt)))) == "subscription_gone"
    assert books.read_attempt(attempt.id).state == State.REVIEW


@pytest.mark.parametrize("metadata", [{"plan_id": "2147483648"}, {"payment_provider_id": "987654"}])
def test_metadata_that_names_nothing_here_goes_to_quarantine(books: Books, metadata: dict[str, Any]) -> None:
    assert kind_of(only(books.settle(books.paid("p", metadata=metadata)))) == "metadata"
    assert books.rows("payments") == []


def test_what_the_database_refuses_fails_the_batch_and_writes_nothing(books: Books) -> None:
    before = books.snapshot()
    # Too long for the index on (user_id, plan_id), and not compressible.
    hostile = "".join(
        random.Random(0).choices("abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=9000)
    )
    with pytest.raises(sa.exc.OperationalError):
        books.settle(books.paid("p", user="anna"), books.paid("q", user=hostile))
    assert books.snapshot() == before


# Collisions


def collide(books: Books, *payments: ProviderPayment) -> None:
    before = books.snapshot()
    with pytest.raises(ChangedMeanwhile):
        books.settle(*payments)
    assert books.snapshot() == before
    for payment in payments:
        books.settle(payment)


def test_two_purchases_of_one_customer_and_plan_in_a_batch_collide_and_then_follow_each_other(books: Books) -> None:
    collide(books, books.paid("p"), books.paid("q"))
    (subscription,) = books.rows("subscriptions")
    assert subscription.ended_at == naive(NOON.replace(month=5))


def test_two_extensions_of_one_subscription_in_a_batch_collide_and_then_follow_each_other(books: Books) -> None:
    subscription_id = books.subscription("anna")
    attempt = books.attempt(subscription_id)
    collide(books, books.paid("p", user="anna"), books.renewal(attempt))
    assert books.ended_at(subscription_id) == NOON.replace(month=5)


def test_two_payments_of_one_attempt_in_a_batch_collide_and_one_is_granted(books: Books) -> None:
    attempt = books.attempt(books.subscription("anna"))
    collide(books, books.renewal(attempt, "one"), books.renewal(attempt, "two", amount="1.00"))
    assert [row.external_payment_id for row in books.rows("settlements")] == ["one"]
    assert [row.kind for row in books.rows("quarantine")] == ["second_success"]


def test_one_payment_twice_in_a_batch_collides(books: Books) -> None:
    payment = books.paid("p")
    collide(books, payment, payment)
    assert len(books.rows("settlements")) == 1


Change = Callable[[Books], object]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            lambda books: books.execute(
                "UPDATE payments SET status = 'SUCCEEDED', subscription_id = :id", id=books.subscription()
            ),
            id="row finished",
        ),
        pytest.param(
            lambda books: books.execute("UPDATE payments SET external_payment_id = 'other'"), id="row renamed"
        ),
        pytest.param(lambda books: books.execute("DELETE FROM payments"), id="row gone"),
    ],
)
def test_a_settler_decides_from_the_rows_as_they_are_not_as_they_were(books: Books, change: Change) -> None:
    row_id = books.payment("p")
    change(books)
    settled = only(books.settle(books.paid("p")))
    assert settled.payment_row_id != row_id


# The quarantine


def test_a_problem_is_opened_once_closed_when_settled_and_told_in_the_audit_trail(books: Books) -> None:
    payment = books.paid("p", plan_id=books.monthly + 1000)
    opened = [only(books.settle(payment)).newly_opened for _ in range(3)]
    assert opened == [True, False, False]
    healed = replace(payment, metadata={**payment.metadata, "plan_id": str(books.monthly)})
    books.settle(healed, stamp=Stamp("job", "the healing run", NOON + A_DAY))
    (problem,) = books.rows("quarantine")
    assert (problem.resolution, problem.resolved_at, problem.resolved_by) == ("settled", NOON + A_DAY, "job")
    assert "the healing run" in problem.resolution_reason
    assert [entry.action for entry in audit(books, "quarantine", problem.id)] == ["opened", "resolved"]


def test_settling_one_payment_closes_no_other_ones_problem(books: Books) -> None:
    books.settle(books.paid("p", user=None))
    books.settle(books.paid("q", user="berta"))
    assert [row.resolved_at for row in books.rows("quarantine")] == [None]


def test_a_payment_that_a_person_ignored_is_left_alone_for_good(books: Books) -> None:
    payment = books.paid("p", plan_id=None)
    books.settle(payment)
    books.execute("UPDATE billing_orchestration.quarantine SET resolution = 'ignored', resolved_at = now()")
    before = books.snapshot()
    healed = replace(payment, metadata={**payment.metadata, "plan_id": str(books.monthly)})
    for same in (payment, healed):
        assert isinstance(only(books.settle(same)).decision, Leave)
    assert books.snapshot() == before


def test_a_problem_that_comes_back_after_it_was_settled_is_opened_again(books: Books) -> None:
    books.settle(books.paid("p", user=None))
    books.execute("UPDATE billing_orchestration.quarantine SET resolution = 'settled', resolved_at = now()")
    assert only(books.settle(books.paid("p", user=None))).newly_opened
    assert [row.resolution for row in books.rows("quarantine")] == ["settled", None]


def test_a_second_success_grants_nothing_more_and_stays_open_for_a_person(books: Books) -> None:
    attempt = books.attempt(books.subscription("anna"))
    for payment_id in ("one", "two", "one"):
        books.settle(books.renewal(attempt, payment_id))
    assert books.ended_at(attempt.subscription_id) == MONTH_LATER
    assert [row.external_payment_id for row in books.rows("payments")] == ["one"]
    assert books.read_attempt(attempt.id).external_payment_id == "one"
    assert [(row.kind, row.resolved_at) for row in books.rows("quarantine")] == [("second_success", None)]
