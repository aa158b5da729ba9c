"""What a success at the provider means for the books: the steps of "Settling a provider payment", in their order."""

from __future__ import annotations

import dataclasses
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing_orchestration.domain.attempts import Attempt, State
from billing_orchestration.domain.money import Money
from billing_orchestration.domain.provider_payment import STATUSES, SUCCEEDED, ProviderPayment
from billing_orchestration.domain.settlement import choose_row, decide_settlement
from billing_orchestration.domain.settlement_decisions import (
    CloseAsGranted,
    Facts,
    Leave,
    PlanRow,
    Quarantine,
    RecordRefund,
    Ruling,
    Settle,
    SettlementDecision,
)
from billing_orchestration_tests.domain.given import (
    DAY,
    IN_UTC,
    NOW,
    PRICE,
    UTC,
    a_due_subscription,
    a_payment,
    a_row,
    a_sent_attempt,
    a_subscription,
    an_attempt,
    facts,
    the_payment_of,
)

CHEAPER = Money(Decimal("199.00"), "RUB")
NEXT_END = datetime(2026, 4, 12, 9, 0, tzinfo=UTC)
SECOND = timedelta(seconds=1)
FULL = {"refunded_amount": PRICE.amount}
CLOSED_UNPAID = (State.DECLINED, State.STOPPED, State.REJECTED, State.VOID)
LIVE = (State.PLANNED, State.UNKNOWN, State.PENDING, State.SUCCEEDED, State.REVIEW, State.REFUNDED)


def settle(
    payment: ProviderPayment, known: Facts | None = None, *, is_live: bool = True, ruling: Ruling | None = None
) -> SettlementDecision:
    return decide_settlement(payment, known or facts(), now=NOW, calendar=IN_UTC, is_live=is_live, ruling=ruling)


def metadata(**changes: Any) -> dict[str, Any]:
    """The service's own metadata, changed; `None` leaves a key out."""
    all_of_it = {"user_id": "ada", "plan_id": "3", "payment_provider_id": "1"} | changes
    return {key: value for key, value in all_of_it.items() if value is not None}


def renewal_facts(attempt: Attempt, *rows: Any, rivals: tuple[Attempt, ...] = (), **changes: Any) -> Facts:
    """The books about a renewal: its attempt and the subscription as it was when the charge was sent."""
    known = facts(rows, [a_subscription()], attempt=attempt, rivals=rivals)
    return dataclasses.replace(known, **changes)


# --- Before the steps: who has settled it, or decided about it, already


@pytest.mark.parametrize("status", sorted(STATUSES - {SUCCEEDED}))
def test_only_a_success_is_settled(status: str) -> None:
    with pytest.raises(ValueError, match="only a success"):
        settle(a_payment(status=status))


@pytest.mark.parametrize("changes", [{}, FULL, {"is_test": True}, {"metadata": {}}, {"money": CHEAPER}])
def test_a_payment_is_settled_at_most_once_ever(changes: dict[str, Any]) -> None:
    for rows in ([], [a_row("PENDING")], [a_row("EXPIRED")]):
        decision = settle(a_payment(**changes), facts(rows, settled_as="created"))
        assert isinstance(decision, Leave)
        assert "settled before" in decision.reason


def test_what_a_person_has_set_aside_is_left() -> None:
    assert isinstance(settle(a_payment(), facts([a_row("PENDING")], set_aside=True)), Leave)


@pytest.mark.parametrize("status", ["SUCCEEDED", "REFUNDED"])
def test_a_row_that_is_succeeded_or_refunded_is_left(status: str) -> None:
    decision = settle(a_payment(), facts([a_row("PENDING", id=1), a_row(status, id=2, subscription_id=12)]))
    assert isinstance(decision, Leave)
    assert decision.row is not None
    assert decision.row.id == 2


def test_a_row_that_is_succeeded_and_granted_to_nobody_is_settled_and_linked() -> None:
    row = a_row("SUCCEEDED")
    for subscriptions, kind in ([], "created"), ([a_subscription()], "extended"):
        decision = settle(a_payment(), facts([row], subscriptions))
        assert isinstance(decision, Settle)
        assert (decision.kind, decision.row, decision.row_is_final) == (kind, row, False)
        assert "granted to nobody" in decision.reason


@pytest.mark.parametrize("ruling", [None, Ruling(), Ruling(attach_to=12)])
def test_a_row_that_became_succeeded_this_very_minute_is_left_to_the_webhook(ruling: Ruling | None) -> None:
    for age_s, is_left in (0, True), (59, True), (60, False):
        row = a_row("SUCCEEDED", touched_at=NOW - timedelta(seconds=age_s))
        known = facts([row, a_row("PENDING", id=8)], [a_subscription()])
        decision = settle(a_payment(), known, ruling=ruling)
        assert isinstance(decision, Leave if is_left else Settle)
        if isinstance(decision, Leave):
            assert decision.code == "left_to_webhook"
    # Any other row may be as fresh as it likes.
    fresh = a_row("PENDING", touched_at=NOW)
    assert isinstance(settle(a_payment(), facts([fresh])), Settle)


def test_a_row_that_is_succeeded_is_left_to_a_person_when_its_grant_may_be_there_unlinked() -> None:
    known = facts([a_row("SUCCEEDED")], [a_subscription()], changed_meanwhile=True)
    decision = settle(a_payment(), known)
    assert isinstance(decision, Quarantine)
    assert (decision.kind, decision.row) == ("unclear_grant", a_row("SUCCEEDED"))
    # Only where the service has begun to settle it: a subscription changes for many reasons.
    assert isinstance(settle(a_payment(), dataclasses.replace(known, rows=[a_row("PENDING")])), Settle)
    granted = settle(a_payment(), known, ruling=Ruling())
    assert isinstance(granted, Settle)
    assert granted.kind == "extended"


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"money": CHEAPER}, "amount_differs"),
        ({"metadata": {}}, "metadata"),
        ({"is_test": True}, "test_payment"),
    ],
)
def test_what_speaks_against_a_grant_does_so_for_a_row_that_is_succeeded_too(
    changes: dict[str, Any], kind: str
) -> None:
    decision = settle(a_payment(**changes), facts([a_row("SUCCEEDED")]))
    assert isinstance(decision, Quarantine)
    assert decision.kind == kind


def test_a_row_that_is_succeeded_and_granted_to_nobody_becomes_refunded_when_its_money_went_back() -> None:
    decision = settle(a_payment(**FULL), facts([a_row("SUCCEEDED")], changed_meanwhile=True))
    assert isinstance(decision, RecordRefund)
    assert (decision.row, decision.row_is_final) == (a_row("SUCCEEDED"), False)


@pytest.mark.parametrize(("status", "kind"), [("CANCELED", "canceled_here"), (None, "status_unknown")])
def test_a_row_that_is_canceled_or_says_nothing_goes_to_a_person(status: str | None, kind: str) -> None:
    decision = settle(a_payment(), facts([a_row(status)]))
    assert isinstance(decision, Quarantine)
    assert (decision.kind, decision.row) == (kind, a_row(status))


def test_a_canceled_row_beside_one_that_can_be_settled_does_not_stop_it() -> None:
    decision = settle(a_payment(), facts([a_row("CANCELED", id=1), a_row("EXPIRED", id=2)]))
    assert isinstance(decision, Settle)
    assert decision.row is not None
    assert decision.row.id == 2


def test_a_success_that_names_an_attempt_nobody_knows_goes_to_a_person() -> None:
    for rows in ([], [a_row("PENDING", external_payment_id="renewal-1")]):
        decision = settle(the_payment_of(an_attempt()), facts(rows, [a_subscription()]))
        assert isinstance(decision, Quarantine)
        assert decision.kind == "unknown_attempt"


# --- Step 1: refunded, or a test


def test_a_payment_that_was_refunded_in_full_is_recorded_as_refunded_and_grants_nothing() -> None:
    decision = settle(a_payment(**FULL), facts(subscriptions=[a_subscription()]))
    assert isinstance(decision, RecordRefund)
    assert (decision.row, decision.subscription_id, decision.payment_provider_id) == (None, None, 1)


@pytest.mark.parametrize("status", ["CREATED", "PENDING", "EXPIRED"])
def test_a_refund_is_recorded_in_the_row_that_is_there_whatever_its_amount_or_the_metadata(status: str) -> None:
    row = a_row(status, subscription_id=12, payment_provider_id=1, money=CHEAPER)
    decision = settle(a_payment(**FULL, metadata={}), facts([row]))
    assert isinstance(decision, RecordRefund)
    assert (decision.row, decision.subscription_id, decision.payment_provider_id) == (row, 12, 1)


@pytest.mark.parametrize("value", [None, "", "nine", "2", 2, "-1"])
def test_a_refund_without_a_row_needs_to_know_whose_payment_it_was(value: Any) -> None:
    decision = settle(a_payment(**FULL, metadata=metadata(payment_provider_id=value)))
    assert isinstance(decision, Quarantine)
    assert decision.kind == "metadata"


def test_a_payment_that_was_refunded_in_part_is_granted_in_full() -> None:
    decision = settle(a_payment(refunded_amount=PRICE.amount - Decimal("0.01")))
    assert isinstance(decision, Settle)


def test_a_test_payment_in_a_live_shop_goes_to_a_person() -> None:
    for rows in ([], [a_row("PENDING")]):
        decision = settle(a_payment(is_test=True), facts(rows))
        assert isinstance(decision, Quarantine)
        assert decision.kind == "test_payment"


def test_a_test_payment_in_a_test_shop_is_granted_like_any_other() -> None:
    assert isinstance(settle(a_payment(is_test=True), is_live=False), Settle)


def test_a_refund_comes_before_the_look_at_test_payments() -> None:
    assert isinstance(settle(a_payment(is_test=True, **FULL)), RecordRefund)


def test_a_test_payment_comes_before_the_look_at_amounts_and_metadata() -> None:
    decision = settle(a_payment(is_test=True, money=CHEAPER, metadata={}), facts([a_row("PENDING")]))
    assert isinstance(decision, Quarantine)
    assert decision.kind == "test_payment"


# --- Step 2: one of our renewals


@pytest.mark.parametrize("state", [State.PLANNED, State.UNKNOWN, State.PENDING, State.REVIEW])
def test_a_success_that_names_our_attempt_extends_its_subscription_from_the_old_end(state: str) -> None:
    attempt = a_sent_attempt(state=state)
    decision = settle(the_payment_of(attempt), renewal_facts(attempt))
    assert isinstance(decision, Settle)
    assert (decision.kind, decision.attempt, decision.row) == ("renewed", attempt, None)
    assert decision.subscription == a_subscription()
    assert (decision.period_start, decision.period_end) == (a_subscription().ended_at, NEXT_END)
    assert (decision.reactivate, decision.notice, decision.void_first) == (False, None, None)
    assert decision.payment_provider_id == 1


def test_a_renewal_never_creates_a_subscription() -> None:
    attempt = a_sent_attempt()
    decision = settle(the_payment_of(attempt), renewal_facts(attempt, subscriptions={}))
    assert isinstance(decision, Quarantine)
    assert (decision.kind, decision.review) == ("subscription_gone", attempt)


def test_a_renewal_extends_its_own_subscription_and_not_another_of_the_same_user_and_plan() -> None:
    attempt = a_sent_attempt()
    both = {12: a_subscription(), 13: a_subscription(id=13, ended_at=NOW + 300 * DAY)}
    decision = settle(the_payment_of(attempt), renewal_facts(attempt, subscriptions=both))
    assert isinstance(decision, Settle)
    assert decision.subscription == both[12]


def test_a_renewal_keeps_the_anchor_day() -> None:
    due = a_due_subscription(
        started_at=datetime(2026, 1, 31, 9, tzinfo=UTC), ended_at=datetime(2026, 2, 28, 9, tzinfo=UTC)
    )
    attempt = a_sent_attempt(due)
    subscription = a_subscription(started_at=due.started_at, ended_at=due.ended_at)
    decision = settle(the_payment_of(attempt), renewal_facts(attempt, subscriptions={12: subscription}))
    assert isinstance(decision, Settle)
    assert decision.period_end == datetime(2026, 3, 31, 9, tzinfo=UTC)


def test_a_renewal_grants_the_plan_that_was_charged_even_if_the_subscription_has_another_by_now() -> None:
    attempt = a_sent_attempt()
    known = renewal_facts(attempt, subscriptions={12: a_subscription(plan_id=4)})
    plans = {3: PlanRow(3, 1, "month"), 4: PlanRow(4, 1, "year")}
    decision = settle(the_payment_of(attempt), dataclasses.replace(known, plans=plans))
    assert isinstance(decision, Settle)
    assert (decision.plan_id, decision.period_end) == (3, NEXT_END)


def test_a_renewal_that_was_paid_after_its_subscription_expired_revives_it() -> None:
    attempt = a_sent_attempt()
    known = renewal_facts(attempt, subscriptions={12: a_subscription(status="EXPIRED")})
    decision = settle(the_payment_of(attempt), known)
    assert isinstance(decision, Settle)
    assert decision.reactivate
    assert decision.notice is None


@pytest.mark.parametrize("status", ["CANCELED", "PAUSED", "DELETED", "CREATED", None])
def test_a_renewal_that_was_paid_while_its_subscription_was_canceled_is_granted_and_put_to_a_person(
    status: str | None,
) -> None:
    attempt = a_sent_attempt()
    known = renewal_facts(attempt, subscriptions={12: a_subscription(status=status)})
    decision = settle(the_payment_of(attempt), known)
    assert isinstance(decision, Settle)
    assert not decision.reactivate
    assert decision.notice is not None
    assert str(status) in decision.notice


@pytest.mark.parametrize("money", [CHEAPER, Money(PRICE.amount, "USD"), Money(Decimal("299.01"), "RUB")])
def test_a_renewal_of_another_amount_or_currency_than_asked_goes_to_review(money: Money) -> None:
    attempt = a_sent_attempt()
    decision = settle(the_payment_of(attempt, money=money), renewal_facts(attempt))
    assert isinstance(decision, Quarantine)
    assert (decision.kind, decision.review, decision.subscription_id) == ("amount_differs", attempt, 12)
    assert str(money) in decision.reason


@pytest.mark.parametrize("plan", [None, PlanRow(3, None, "month"), PlanRow(3, 1, "fortnight"), PlanRow(3, 0, "days")])
def test_a_renewal_whose_period_cannot_be_computed_goes_to_review(plan: PlanRow | None) -> None:
    attempt = a_sent_attempt(period_count=None, period_unit=None)  # of an older version
    decision = settle(the_payment_of(attempt), renewal_facts(attempt, plans={3: plan} if plan else {}))
    assert isinstance(decision, Quarantine)
    assert (decision.kind, decision.review) == ("period", attempt)


@pytest.mark.parametrize("plan", [PlanRow(3, 1, "month"), PlanRow(3, None, None), None], ids=["month", "none", "gone"])
def test_a_renewal_grants_the_period_that_was_paid_whatever_the_plan_says_by_now(plan: PlanRow | None) -> None:
    attempt = a_sent_attempt(a_due_subscription(plan_duration=1, plan_duration_unit="year"))
    known = renewal_facts(attempt, plans={3: plan} if plan else {})
    decision = settle(the_payment_of(attempt), known)
    assert isinstance(decision, Settle)
    assert decision.period_end == datetime(2027, 3, 12, 9, 0, tzinfo=UTC)
    # One that a person accepts beside another payment of the period is as long.
    other = dataclasses.replace(attempt, state=State.SUCCEEDED, external_payment_id="the other")
    accepted = settle(the_payment_of(attempt), renewal_facts(other, plans=known.plans), ruling=Ruling())
    assert isinstance(accepted, Settle)
    assert accepted.period_end == datetime(2027, 3, 12, 9, 0, tzinfo=UTC)


def test_a_renewal_of_a_subscription_without_an_end_goes_to_review() -> None:
    attempt = a_sent_attempt()
    known = renewal_facts(attempt, subscriptions={12: a_subscription(ended_at=None)})
    decision = settle(the_payment_of(attempt), known)
    assert isinstance(decision, Quarantine)
    assert (decision.kind, decision.review) == ("subscription_gone", attempt)


def test_a_renewal_of_a_subscription_that_ends_with_the_calendar_goes_to_review() -> None:
    attempt = a_sent_attempt()
    for_ever = a_subscription(ended_at=datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC))
    decision = settle(the_payment_of(attempt), renewal_facts(attempt, subscriptions={12: for_ever}))
    assert isinstance(decision, Quarantine)
    assert (decision.kind, decision.review) == ("period", attempt)


@pytest.mark.parametrize("state", LIVE)
def test_a_renewal_that_was_refunded_in_full_grants_nothing_and_is_not_charged_again(state: str) -> None:
    attempt = a_sent_attempt(state=state, external_payment_id=None)
    decision = settle(the_payment_of(attempt, **FULL), renewal_facts(attempt))
    if state in (State.SUCCEEDED, State.REFUNDED):
        assert isinstance(decision, Leave)
    else:
        assert isinstance(decision, RecordRefund)
        assert (decision.attempt, decision.subscription_id, decision.row) == (attempt, 12, None)


def test_a_renewal_that_was_refunded_in_full_is_recorded_even_if_its_subscription_is_gone() -> None:
    attempt = a_sent_attempt()
    decision = settle(the_payment_of(attempt, **FULL), renewal_facts(attempt, subscriptions={}))
    assert isinstance(decision, RecordRefund)
    assert decision.subscription_id is None


def test_a_renewal_in_a_live_shop_that_is_a_test_goes_to_review() -> None:
    attempt = a_sent_attempt()
    decision = settle(the_payment_of(attempt, is_test=True), renewal_facts(attempt))
    assert isinstance(decision, Quarantine)
    assert (decision.kind, decision.review) == ("test_payment", attempt)
    assert isinstance(settle(the_payment_of(attempt, is_test=True), renewal_facts(attempt), is_live=False), Settle)


def test_a_paid_renewal_whose_end_has_moved_back_meanwhile_goes_to_review() -> None:
    attempt = a_sent_attempt()
    known = renewal_facts(attempt, subscriptions={12: a_subscription(ended_at=attempt.period_start - 20 * DAY)})
    decision = settle(the_payment_of(attempt), known)
    assert isinstance(decision, Quarantine)
    assert (decision.kind, decision.review) == ("unclear_grant", attempt)
    assert isinstance(settle(the_payment_of(attempt), known, ruling=Ruling()), Settle)


# The service's webhook handler may have seen the renewal first.


def test_a_renewal_that_the_webhook_has_written_and_granted_only_closes_the_attempt() -> None:
    attempt = a_sent_attempt()
    row = a_row("SUCCEEDED", external_payment_id="renewal-1", subscription_id=12)
    known = renewal_facts(attempt, row, subscriptions={12: a_subscription(ended_at=NEXT_END)})
    decision = settle(the_payment_of(attempt), known)
    assert isinstance(decision, CloseAsGranted)
    assert (decision.attempt, decision.row, decision.subscription_id) == (attempt, row, 12)
    assert decision.period_end == NEXT_END


def moved(
    to: datetime, *, plan: PlanRow | None = None, ruling: Ruling | None = None, **subscription: Any
) -> SettlementDecision:
    """The service holds the renewal as paid, and the end of its subscription is there by now."""
    started = a_subscription(**subscription)
    due = a_due_subscription(ended_at=started.ended_at)
    attempt = a_sent_attempt(due, period_count=None, period_unit=None)
    row = a_row("SUCCEEDED", external_payment_id="renewal-1", subscription_id=12)
    known = renewal_facts(
        attempt,
        row,
        subscriptions={12: dataclasses.replace(started, ended_at=to)},
        plans={3: plan or PlanRow(3, 1, "month")},
    )
    return settle(the_payment_of(attempt), known, ruling=ruling)


@pytest.mark.parametrize(
    ("ended_at", "granted"),
    [
        (NEXT_END, NEXT_END),
        (NEXT_END - DAY, NEXT_END - DAY),
        (NEXT_END + DAY, NEXT_END),  # a bonus day on top of the grant: the paid period ends before it
        (NEXT_END - DAY - SECOND, None),
        (NEXT_END + DAY + SECOND, None),
    ],
)
def test_the_service_has_granted_a_renewal_if_the_end_moved_by_about_the_period(
    ended_at: datetime, granted: datetime | None
) -> None:
    decision = moved(ended_at)
    assert (decision.period_end if isinstance(decision, CloseAsGranted) else None) == granted


@pytest.mark.parametrize("ended_at", [NOW - 31 * DAY, NOW + DAY, NEXT_END - 2 * DAY, NEXT_END + 31 * DAY])
def test_an_end_that_moved_by_something_else_than_the_period_is_no_grant(ended_at: datetime) -> None:
    decision = moved(ended_at)
    assert isinstance(decision, Quarantine)
    assert (decision.kind, decision.review is not None) == ("unclear_grant", True)
    assert f"moved to {ended_at:%Y-%m-%d}" in decision.reason
    accepted = moved(ended_at, ruling=Ruling())
    assert isinstance(accepted, Settle)
    assert accepted.period_start == ended_at


def test_the_service_may_count_a_month_from_the_old_end_or_keep_the_anchor_day() -> None:
    short = {"started_at": datetime(2026, 1, 31, tzinfo=UTC), "ended_at": datetime(2026, 2, 28, tzinfo=UTC)}
    for day in (28, 31):
        assert isinstance(moved(datetime(2026, 3, day, tzinfo=UTC), **short), CloseAsGranted)


@pytest.mark.parametrize(("hours", "granted"), [(24, True), (30, True), (18, True), (31, False), (12, False)])
def test_of_a_short_period_a_quarter_is_about_as_much(hours: int, granted: bool) -> None:
    ended_at = a_subscription().ended_at + timedelta(hours=hours)  # type: ignore[operator]
    assert isinstance(moved(ended_at, plan=PlanRow(3, 1, "days")), CloseAsGranted) is granted


def test_without_a_usable_period_nothing_tells_a_grant_from_a_favour() -> None:
    decision = moved(NEXT_END, plan=PlanRow(3, None, "month"))
    assert isinstance(decision, Quarantine)
    assert decision.kind == "unclear_grant"


def test_a_renewal_that_the_webhook_has_written_but_not_granted_is_granted_and_its_row_stays_as_it_is() -> None:
    attempt = a_sent_attempt()
    row = a_row("SUCCEEDED", external_payment_id="renewal-1")
    decision = settle(the_payment_of(attempt), renewal_facts(attempt, row))
    assert isinstance(decision, Settle)
    assert (decision.row, decision.row_is_final, decision.period_end) == (row, True, NEXT_END)


def test_a_renewal_that_the_webhook_has_written_beside_another_grant_is_left_to_a_person() -> None:
    attempt = a_sent_attempt()
    row = a_row("SUCCEEDED", external_payment_id="renewal-1", subscription_id=12)
    extended = {12: a_subscription(ended_at=NEXT_END)}
    known = renewal_facts(attempt, row, subscriptions=extended, paid_meanwhile=True)
    decision = settle(the_payment_of(attempt), known)
    assert isinstance(decision, Quarantine)
    assert (decision.kind, decision.review, decision.row) == ("unclear_grant", attempt, row)
    accepted = settle(the_payment_of(attempt), known, ruling=Ruling())
    assert isinstance(accepted, Settle)
    assert (accepted.row, accepted.row_is_final, accepted.attempt) == (row, True, attempt)
    assert accepted.period_start == NEXT_END


def test_a_renewal_that_the_webhook_has_written_is_granted_while_the_end_has_not_moved() -> None:
    attempt = a_sent_attempt()
    row = a_row("SUCCEEDED", external_payment_id="renewal-1", subscription_id=12)
    decision = settle(the_payment_of(attempt), renewal_facts(attempt, row, paid_meanwhile=True))
    assert isinstance(decision, Settle)


def test_a_renewal_that_the_service_holds_as_refunded_grants_nothing() -> None:
    attempt = a_sent_attempt()
    row = a_row("REFUNDED", external_payment_id="renewal-1")
    decision = settle(the_payment_of(attempt), renewal_facts(attempt, row))
    assert isinstance(decision, RecordRefund)
    assert (decision.row, decision.row_is_final, decision.attempt) == (row, True, attempt)


@pytest.mark.parametrize("status", ["PENDING", "CREATED", "EXPIRED"])
def test_a_renewal_whose_row_is_unfinished_finishes_that_row(status: str) -> None:
    attempt = a_sent_attempt()
    row = a_row(status, external_payment_id="renewal-1")
    decision = settle(the_payment_of(attempt), renewal_facts(attempt, row))
    assert isinstance(decision, Settle)
    assert (decision.row, decision.row_is_final) == (row, False)


@pytest.mark.parametrize(("status", "kind"), [("CANCELED", "canceled_here"), (None, "status_unknown")])
def test_a_renewal_whose_row_is_canceled_or_says_nothing_goes_to_review(status: str | None, kind: str) -> None:
    attempt = a_sent_attempt()
    row = a_row(status, external_payment_id="renewal-1")
    decision = settle(the_payment_of(attempt), renewal_facts(attempt, row))
    assert isinstance(decision, Quarantine)
    assert (decision.kind, decision.row, decision.review) == (kind, row, attempt)


# Several successes of one period.


@pytest.mark.parametrize("state", [State.SUCCEEDED, State.REFUNDED])
def test_the_payment_of_an_attempt_that_is_closed_by_it_is_left(state: str) -> None:
    attempt = a_sent_attempt(state=state, external_payment_id="renewal-1")
    assert isinstance(settle(the_payment_of(attempt), renewal_facts(attempt)), Leave)


@pytest.mark.parametrize("state", LIVE[1:])
def test_a_second_success_of_one_attempt_goes_to_a_person_and_grants_nothing(state: str) -> None:
    attempt = a_sent_attempt(state=state, external_payment_id="renewal-0")
    decision = settle(the_payment_of(attempt), renewal_facts(attempt))
    assert isinstance(decision, Quarantine)
    assert (decision.kind, decision.review) == ("second_success", None)
    assert "renewal-0" in decision.reason


@pytest.mark.parametrize("state", CLOSED_UNPAID)
def test_a_late_success_of_an_attempt_that_was_closed_as_unpaid_is_granted(state: str) -> None:
    for former in (None, "renewal-0", "renewal-1"):
        attempt = a_sent_attempt(state=state, external_payment_id=former)
        rivals = tuple(an_attempt(number=2 + n, state=other) for n, other in enumerate(CLOSED_UNPAID))
        decision = settle(the_payment_of(attempt), renewal_facts(attempt, rivals=rivals))
        assert isinstance(decision, Settle)
        assert (decision.attempt, decision.void_first) == (attempt, None)


def test_a_late_success_takes_the_place_of_an_attempt_that_was_never_sent() -> None:
    late, planned = a_sent_attempt(state=State.DECLINED), an_attempt(number=2)
    decision = settle(the_payment_of(late), renewal_facts(late, rivals=(planned,)))
    assert isinstance(decision, Settle)
    assert decision.void_first == planned


@pytest.mark.parametrize("state", LIVE)
def test_a_late_success_beside_a_live_attempt_of_the_same_period_goes_to_a_person(state: str) -> None:
    late, rival = a_sent_attempt(state=State.DECLINED), a_sent_attempt(number=2, state=state)
    decision = settle(the_payment_of(late), renewal_facts(late, rivals=(rival,)))
    assert isinstance(decision, Quarantine)
    assert (decision.kind, decision.review) == ("second_success", None)
    assert "paid twice" in decision.reason


def test_a_second_success_that_was_refunded_in_full_is_recorded_and_troubles_nobody() -> None:
    paid = a_sent_attempt(state=State.SUCCEEDED, external_payment_id="renewal-0")
    late, rival = a_sent_attempt(state=State.DECLINED), a_sent_attempt(number=2, state=State.SUCCEEDED)
    for attempt, rivals in ((paid, ()), (late, (rival,))):
        decision = settle(the_payment_of(attempt, **FULL), renewal_facts(attempt, rivals=rivals))
        assert isinstance(decision, RecordRefund)
        # The period is another payment's: no attempt changes because of this one.
        assert (decision.attempt, decision.void_first, decision.subscription_id) == (None, None, 12)


@settings(max_examples=400, deadline=None)
@given(
    state=st.sampled_from((*CLOSED_UNPAID, *LIVE)),
    former=st.sampled_from([None, "renewal-0", "renewal-1"]),
    rival=st.none() | st.tuples(st.sampled_from((*CLOSED_UNPAID, *LIVE)), st.booleans()),
    changes=st.sampled_from([{}, FULL, {"is_test": True}, {"money": CHEAPER}, {"is_test": True, **FULL}]),
    status=st.sampled_from(["none", "PENDING", "SUCCEEDED", "REFUNDED", "CANCELED", None]),
    ended_at=st.sampled_from([None, a_subscription().ended_at, NEXT_END]),
    has_subscription=st.booleans(),
    ruling=st.sampled_from([None, None, Ruling(), Ruling(attach_to=12), Ruling(attach_to=13)]),
)
def test_whatever_is_decided_about_a_renewal_its_period_has_one_live_attempt_and_its_money_one_grant(
    state: str,
    former: str | None,
    rival: tuple[str, bool] | None,
    changes: dict[str, Any],
    status: str | None,
    ended_at: datetime | None,
    has_subscription: bool,
    ruling: Ruling | None,
) -> None:
    attempt = a_sent_attempt(state=state, external_payment_id=former)
    rivals: tuple[Attempt, ...] = ()
    if rival is not None and not (state in LIVE and rival[0] in LIVE):  # the index would not have let both in
        rivals = (an_attempt(number=2, state=rival[0], first_sent_at=NOW if rival[1] else None),)
    rows = [] if status == "none" else [a_row(status, external_payment_id="renewal-1")]
    subscriptions = {12: a_subscription(ended_at=ended_at)} if has_subscription else {}
    known = renewal_facts(attempt, *rows, rivals=rivals, subscriptions=subscriptions | {13: a_subscription(id=13)})
    decision = settle(the_payment_of(attempt, **changes), known, ruling=ruling)

    # What the attempts of this period are afterwards.
    states = {attempt.number: state} | {other.number: other.state for other in rivals}
    void_first = None if isinstance(decision, Leave) else decision.void_first
    if void_first is not None:
        assert void_first.state == State.PLANNED
        assert not void_first.may_have_been_sent
        states[void_first.number] = State.VOID
    if isinstance(decision, (Settle, CloseAsGranted)) and decision.attempt is not None:
        assert state not in (State.SUCCEEDED, State.REFUNDED)
        states[attempt.number] = State.SUCCEEDED
    elif isinstance(decision, RecordRefund) and decision.attempt is not None:
        states[attempt.number] = State.REFUNDED
    elif isinstance(decision, Quarantine) and decision.review is not None:
        assert state not in (State.SUCCEEDED, State.REFUNDED)
        states[attempt.number] = State.REVIEW
    assert sum(one in LIVE for one in states.values()) <= 1
    # Money that went back grants nothing; money that was asked otherwise, or is play money, neither, unless a person
    # has said so. Without a person, a renewal's grant always closes its attempt.
    if "refunded_amount" in changes or (changes and ruling is None):
        assert not isinstance(decision, (Settle, CloseAsGranted))
    if isinstance(decision, Settle) and ruling is None:
        assert decision.attempt == attempt
        assert decision.subscription == subscriptions[12]
    if isinstance(decision, Settle):
        assert decision.period_start < decision.period_end
        assert not (decision.row_is_final and decision.row is None)


# --- Step 3: amount and currency


@pytest.mark.parametrize("money", [CHEAPER, Money(PRICE.amount, "USD"), None])
def test_a_row_of_another_amount_or_currency_goes_to_a_person(money: Money | None) -> None:
    row = a_row("PENDING", money=money)
    decision = settle(a_payment(), facts([row]))
    assert isinstance(decision, Quarantine)
    assert (decision.kind, decision.row) == ("amount_differs", row)
    assert str(PRICE) in decision.reason


@pytest.mark.parametrize("money", [CHEAPER, Money(Decimal("1.00"), "RUB"), Money(PRICE.amount, "USD")])
def test_without_a_row_a_success_must_be_one_of_the_plans_prices(money: Money) -> None:
    for subscriptions in ([], [a_subscription()]):
        decision = settle(a_payment(money=money), facts(subscriptions=subscriptions))
        assert isinstance(decision, Quarantine)
        assert decision.kind == "amount_differs"
        assert str(money) in decision.reason
        assert str(PRICE) in decision.reason
        assert isinstance(settle(a_payment(money=money), facts(subscriptions=subscriptions), ruling=Ruling()), Settle)


def test_any_of_the_plans_prices_will_do_without_a_row_and_none_is_asked_of_a_plan_where_there_is_one() -> None:
    prices = frozenset({PRICE, CHEAPER, Money(Decimal("3.50"), "EUR")})
    for price in prices:
        known = facts(plans={3: PlanRow(3, 1, "month", prices)})
        assert isinstance(settle(a_payment(money=price), known), Settle)
    # The service knows what it sold (a discount, say): its row decides.
    assert isinstance(settle(a_payment(money=CHEAPER), facts([a_row("PENDING", money=CHEAPER)])), Settle)


def test_a_plan_without_a_price_sells_nothing() -> None:
    decision = settle(a_payment(), facts(plans={3: PlanRow(3, 1, "month")}))
    assert isinstance(decision, Quarantine)
    assert decision.kind == "amount_differs"


def test_the_amount_is_looked_at_before_the_metadata() -> None:
    decision = settle(a_payment(metadata={}), facts([a_row("PENDING", money=CHEAPER)]))
    assert isinstance(decision, Quarantine)
    assert decision.kind == "amount_differs"


# --- Step 4: metadata


@pytest.mark.parametrize("key", ["user_id", "plan_id", "payment_provider_id"])
@pytest.mark.parametrize(("value", "gap"), [(None, "missing"), ("", "malformed")])
def test_metadata_that_is_missing_or_malformed_goes_to_a_person(key: str, value: Any, gap: str) -> None:
    decision = settle(a_payment(metadata=metadata(**{key: value})), facts(subscriptions=[a_subscription()]))
    assert isinstance(decision, Quarantine)
    assert decision.kind == "metadata"
    assert f"{key} ({gap})" in decision.reason


@pytest.mark.parametrize(("key", "value"), [("plan_id", "4"), ("payment_provider_id", "2")])
def test_metadata_that_names_what_does_not_exist_goes_to_a_person(key: str, value: str) -> None:
    decision = settle(a_payment(metadata=metadata(**{key: value})))
    assert isinstance(decision, Quarantine)
    assert decision.kind == "metadata"
    assert value in decision.reason


def test_everything_that_is_missing_is_named_at_once() -> None:
    decision = settle(a_payment(metadata={}))
    assert isinstance(decision, Quarantine)
    for key in ("user_id", "plan_id", "payment_provider_id"):
        assert key in decision.reason


def test_metadata_that_names_another_user_than_the_row_goes_to_a_person() -> None:
    row = a_row("PENDING", subscription_id=12)
    decision = settle(a_payment(), facts([row], [a_subscription(user_id="boris")]))
    assert isinstance(decision, Quarantine)
    assert decision.kind == "foreign_metadata"


# --- Step 5: the grant


def test_without_an_active_subscription_one_is_created_from_the_moment_of_settling() -> None:
    decision = settle(a_payment())
    assert isinstance(decision, Settle)
    assert (decision.kind, decision.subscription, decision.row) == ("created", None, None)
    assert (decision.user_id, decision.plan_id, decision.payment_provider_id) == ("ada", 3, 1)
    # A month from now by the clock on the wall, whenever it was paid.
    assert (decision.period_start, decision.period_end) == (NOW, datetime(2026, 4, 12, 3, 0, tzinfo=UTC))


def test_an_active_subscription_on_the_plan_is_extended_from_its_end() -> None:
    subscription = a_subscription(ended_at=NOW + 20 * DAY)
    decision = settle(a_payment(), facts(subscriptions=[subscription]))
    assert isinstance(decision, Settle)
    assert (decision.kind, decision.subscription) == ("extended", subscription)
    assert decision.period_start == NOW + 20 * DAY
    assert decision.period_end == datetime(2026, 5, 1, 3, 0, tzinfo=UTC)


def test_a_purchase_extends_by_the_anchor_day_as_a_renewal_would() -> None:
    subscription = a_subscription(
        started_at=datetime(2026, 1, 31, 9, tzinfo=UTC), ended_at=datetime(2026, 2, 28, 9, tzinfo=UTC)
    )
    decision = settle(a_payment(), facts(subscriptions=[subscription]))
    assert isinstance(decision, Settle)
    assert decision.period_end == datetime(2026, 3, 31, 9, tzinfo=UTC)


@pytest.mark.parametrize(("days", "told"), [(-20, None), (27, None), (29, "spent_period"), (150, "spent_period")])
def test_a_customer_who_paid_for_a_period_that_was_over_already_is_told_to_a_person(
    days: int, told: str | None
) -> None:
    subscription = a_subscription(ended_at=NOW - days * DAY)  # a month of 28 days
    decision = settle(a_payment(created_at=NOW), facts(subscriptions=[subscription]))
    assert isinstance(decision, Settle)
    assert (decision.kind, decision.period_start) == ("extended", subscription.ended_at)
    assert (decision.notice and decision.notice_kind) == told


@pytest.mark.parametrize("status", ["CREATED", "EXPIRED", "CANCELED", "PAUSED", "DELETED", None])
def test_a_subscription_that_is_not_active_is_not_extended(status: str | None) -> None:
    decision = settle(a_payment(), facts(subscriptions=[a_subscription(status=status)]))
    assert isinstance(decision, Settle)
    assert decision.kind == "created"


@pytest.mark.parametrize("changes", [{"user_id": "boris"}, {"plan_id": 4}, {"plan_id": None}])
def test_a_subscription_of_another_user_or_plan_is_not_extended(changes: dict[str, Any]) -> None:
    decision = settle(a_payment(), facts(subscriptions=[a_subscription(**changes)]))
    assert isinstance(decision, Settle)
    assert decision.kind == "created"


def test_of_several_active_subscriptions_the_rows_own_is_extended_else_the_one_that_lasts_longest() -> None:
    long = a_subscription(id=1, ended_at=NOW + 9 * DAY)
    twin = a_subscription(id=2, ended_at=NOW + 9 * DAY)
    short = a_subscription(id=3, ended_at=NOW + DAY)
    endless = a_subscription(id=4, ended_at=None)
    for rows, expected in (
        ([a_row("PENDING", subscription_id=3)], 3),
        ([a_row("PENDING", subscription_id=None)], 2),
        ([], 2),
    ):
        decision = settle(a_payment(), facts(rows, [short, long, endless, twin]))
        assert isinstance(decision, Settle)
        assert decision.subscription is not None
        assert decision.subscription.id == expected


def test_a_rows_own_subscription_that_has_ended_for_good_is_passed_over() -> None:
    old, active = a_subscription(id=1, status="CANCELED"), a_subscription(id=2)
    decision = settle(a_payment(), facts([a_row("PENDING", subscription_id=1)], [old, active]))
    assert isinstance(decision, Settle)
    assert decision.subscription == active


def test_an_active_subscription_without_an_end_goes_to_a_person() -> None:
    decision = settle(a_payment(), facts(subscriptions=[a_subscription(ended_at=None)]))
    assert isinstance(decision, Quarantine)
    assert (decision.kind, decision.subscription_id) == ("no_end", 12)


@pytest.mark.parametrize("plan", [PlanRow(3, None, "month"), PlanRow(3, 1, None), PlanRow(3, -1, "days")])
@pytest.mark.parametrize("has_subscription", [True, False])
def test_a_plan_whose_period_cannot_be_computed_goes_to_a_person(plan: PlanRow, has_subscription: bool) -> None:
    sold = dataclasses.replace(plan, prices=frozenset({PRICE}))
    known = facts(subscriptions=[a_subscription()] if has_subscription else [], plans={3: sold})
    decision = settle(a_payment(), known)
    assert isinstance(decision, Quarantine)
    assert decision.kind == "period"


def test_a_subscription_that_ends_with_the_calendar_goes_to_a_person() -> None:
    for_ever = a_subscription(ended_at=datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC))
    decision = settle(a_payment(), facts(subscriptions=[for_ever]))
    assert isinstance(decision, Quarantine)
    assert decision.kind == "period"


# --- Step 6: the payment row


@pytest.mark.parametrize("status", ["CREATED", "PENDING", "EXPIRED"])
def test_a_row_that_is_created_pending_or_expired_is_the_one_to_finish(status: str) -> None:
    decision = settle(a_payment(), facts([a_row(status)]))
    assert isinstance(decision, Settle)
    assert (decision.row, decision.row_is_final) == (a_row(status), False)
    assert decision.reason.startswith(f"{status} here")


def test_a_late_success_revives_an_expired_payment() -> None:
    long_ago = NOW - timedelta(days=8)
    payment = a_payment(created_at=long_ago, captured_at=NOW)
    decision = settle(payment, facts([a_row("EXPIRED")]))
    assert isinstance(decision, Settle)
    assert decision.period_start == NOW


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        ([], None),
        ([a_row("SUCCEEDED", subscription_id=12), a_row("CANCELED"), a_row("REFUNDED"), a_row(None)], None),
        ([a_row("EXPIRED", id=1), a_row("PENDING", id=2)], 2),
        ([a_row("EXPIRED", id=1), a_row("CREATED", id=2)], 2),
        ([a_row("CREATED", id=1), a_row("PENDING", id=2)], 2),
        ([a_row("PENDING", id=5), a_row("PENDING", id=3), a_row("PENDING", id=4)], 3),
        # Agreeing on the money comes before the status.
        ([a_row("PENDING", id=1, money=CHEAPER), a_row("EXPIRED", id=2)], 2),
        ([a_row("PENDING", id=1, money=None), a_row("EXPIRED", id=2)], 2),
        ([a_row("EXPIRED", id=1, money=CHEAPER), a_row("PENDING", id=2, money=CHEAPER)], 2),
        ([a_row("SUCCEEDED", id=1, subscription_id=12), a_row("EXPIRED", id=2, money=CHEAPER)], 2),
        # What the service has half settled comes before what it has only begun.
        ([a_row("PENDING", id=1), a_row("SUCCEEDED", id=2)], 2),
        # The customer's own row names a subscription: never the duplicate that expires.
        ([a_row("PENDING", id=1), a_row("PENDING", id=2, subscription_id=12)], 2),
        ([a_row("SUCCEEDED", id=1), a_row("PENDING", id=2, subscription_id=12)], 2),
        ([a_row("PENDING", id=1), a_row("EXPIRED", id=2, subscription_id=12, money=CHEAPER)], 2),
    ],
)
def test_of_several_rows_with_one_provider_id_the_one_that_agrees_is_finished(
    rows: list[Any], chosen: int | None
) -> None:
    for order in (rows, rows[::-1]):
        row = choose_row(order, PRICE)
        assert (row.id if row else None) == chosen


@settings(max_examples=300, deadline=None)
@given(
    books=st.lists(
        st.tuples(
            st.sampled_from(["CREATED", "PENDING", "EXPIRED", "CANCELED", "SUCCEEDED", "REFUNDED", None]),
            st.sampled_from([None, 12]),
        )
    ),
    changes=st.sampled_from([{}, FULL, {"is_test": True}, {"money": CHEAPER}, {"metadata": {}}]),
    settled_as=st.sampled_from([None, None, None, "created"]),
    subscription=st.none() | st.sampled_from(["ACTIVE", "EXPIRED", "CANCELED"]),
    changed=st.booleans(),
)
def test_nothing_is_granted_unpaid_twice_or_unclear(
    books: list[tuple[str | None, int | None]],
    changes: dict[str, Any],
    settled_as: str | None,
    subscription: str | None,
    changed: bool,
) -> None:
    rows = [a_row(status, id=number, subscription_id=linked) for number, (status, linked) in enumerate(books, 1)]
    subscriptions = [a_subscription(status=subscription)] if subscription else []
    known = facts(rows, subscriptions, settled_as=settled_as, changed_meanwhile=changed)
    decision = settle(a_payment(**changes), known)
    granted = isinstance(decision, Settle)
    half_settled = ("SUCCEEDED", None) in books
    open_row = half_settled or any(status in ("CREATED", "PENDING", "EXPIRED") for status, _ in books)
    settled_row = any(status == "REFUNDED" for status, _ in books) or ("SUCCEEDED", 12) in books
    clear = changes == {} and not (half_settled and changed)
    assert granted is (clear and settled_as is None and not settled_row and (open_row or not books))
    if isinstance(decision, Settle):
        assert decision.period_end > decision.period_start
        assert (decision.subscription is not None) is (subscription == "ACTIVE")


# --- A person's ruling on what stood in the quarantine

CHEAPER_ROW = a_row("PENDING", money=CHEAPER)


@pytest.mark.parametrize(
    ("payment", "known", "kind"),
    [
        (a_payment(), facts([CHEAPER_ROW]), "amount_differs"),
        (a_payment(), facts([a_row("SUCCEEDED")], changed_meanwhile=True), "unclear_grant"),
        (a_payment(is_test=True), facts(), "test_payment"),
        (a_payment(), facts([a_row("CANCELED")]), "canceled_here"),
        (a_payment(), facts([a_row(None)]), "status_unknown"),
    ],
)
def test_what_a_person_accepts_is_granted_as_if_nothing_had_been_odd(
    payment: ProviderPayment, known: Facts, kind: str
) -> None:
    refused = settle(payment, known)
    assert isinstance(refused, Quarantine)
    assert refused.kind == kind
    granted = settle(payment, known, ruling=Ruling())
    assert isinstance(granted, Settle)
    assert (granted.kind, granted.row) == ("created", known.rows[0] if known.rows else None)
    # The row takes the provider's amount where they differ.
    assert granted.correct_money is (kind == "amount_differs")


def test_a_person_cannot_accept_what_makes_a_grant_impossible() -> None:
    for payment, known, kind in (
        (a_payment(metadata={}), facts(), "metadata"),
        (a_payment(), facts(subscriptions=[a_subscription(ended_at=None)]), "no_end"),
        (a_payment(), facts(plans={3: PlanRow(3, None, None)}), "period"),
    ):
        decision = settle(payment, known, ruling=Ruling())
        assert isinstance(decision, Quarantine)
        assert decision.kind == kind


@pytest.mark.parametrize("ruling", [Ruling(), Ruling(attach_to=12)])
def test_no_ruling_grants_twice_or_what_went_back(ruling: Ruling) -> None:
    known = facts(subscriptions=[a_subscription()])
    assert isinstance(settle(a_payment(), dataclasses.replace(known, settled_as="created"), ruling=ruling), Leave)
    granted = dataclasses.replace(known, rows=[a_row("SUCCEEDED", subscription_id=12)])
    assert isinstance(settle(a_payment(), granted, ruling=ruling), Leave)
    assert isinstance(settle(a_payment(**FULL), known, ruling=ruling), RecordRefund)


def test_a_second_success_that_a_person_accepts_is_one_more_period_and_touches_no_attempt() -> None:
    attempt = a_sent_attempt(state=State.SUCCEEDED, external_payment_id="renewal-0")
    known = renewal_facts(attempt, subscriptions={12: a_subscription(ended_at=NEXT_END)})
    decision = settle(the_payment_of(attempt), known, ruling=Ruling())
    assert isinstance(decision, Settle)
    assert (decision.attempt, decision.subscription) == (None, known.subscriptions[12])
    assert (decision.period_start, decision.period_end) == (NEXT_END, datetime(2026, 5, 12, 9, 0, tzinfo=UTC))


def test_a_payment_that_a_person_attaches_gives_that_subscription_a_period_whatever_the_metadata_says() -> None:
    decision = settle(
        a_payment(metadata={"user_id": "boris"}), facts(subscriptions=[a_subscription()]), ruling=Ruling(attach_to=12)
    )
    assert isinstance(decision, Settle)
    assert (decision.kind, decision.user_id, decision.plan_id) == ("extended", "ada", 3)
    assert (decision.period_start, decision.period_end) == (a_subscription().ended_at, NEXT_END)
    assert "whose user is not the one that the metadata names" in decision.reason
    assert "boris" not in decision.reason


def test_a_payment_cannot_be_attached_to_a_subscription_that_is_of_no_use() -> None:
    for subscription in (
        a_subscription(status="CANCELED"),
        a_subscription(ended_at=None),
        a_subscription(plan_id=None),
        a_subscription(id=13),
    ):
        decision = settle(a_payment(), facts(subscriptions=[subscription]), ruling=Ruling(attach_to=12))
        assert isinstance(decision, Quarantine)


def test_a_payment_that_is_attached_to_an_expired_subscription_counts_from_now() -> None:
    expired = a_subscription(status="EXPIRED", ended_at=NOW - 60 * DAY)
    decision = settle(a_payment(), facts(subscriptions=[expired]), ruling=Ruling(attach_to=12))
    assert isinstance(decision, Settle)
    assert decision.reactivate
    assert (decision.period_start, decision.period_end) == (NOW, datetime(2026, 4, 12, 3, 0, tzinfo=UTC))


@pytest.mark.parametrize("refunded", [{}, FULL], ids=["paid", "refunded"])
def test_a_new_method_type_is_settled_with_a_notice(refunded: dict[str, Any]) -> None:
    known, new = settle(a_payment(**refunded)), settle(a_payment(method_type="telepathy", **refunded))
    assert isinstance(new, (Settle, RecordRefund))
    assert type(new) is type(known)
    assert (
        new.reason == f"{known.reason}. Notice: the payment method type 'telepathy' is new: payment_method stays NULL"
    )
    assert new.payment.method_label is None
