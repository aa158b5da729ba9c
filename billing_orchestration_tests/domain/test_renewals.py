"""Who is charged by autopayment_job, and for what reason one that is due is not."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing_orchestration.domain import declines
from billing_orchestration.domain.answers import ProviderView
from billing_orchestration.domain.attempts import KEY_LIFETIME, OPEN, SCAN_DISTANCE, Attempt, State
from billing_orchestration.domain.decisions import Code
from billing_orchestration.domain.money import Money
from billing_orchestration.domain.provider_payment import CANCELED, PENDING, SUCCEEDED, WAITING_FOR_CAPTURE
from billing_orchestration.domain.renewals import (
    Charge,
    Conclude,
    DueSubscription,
    Holds,
    NotCharged,
    NoteAbsence,
    RenewalDecision,
    RenewalRules,
    Resend,
    Void,
    decide_open_attempt,
    decide_renewal,
    decide_renewals,
)
from billing_orchestration_tests.domain.given import (
    DAY,
    HOUR,
    NOW,
    RULES,
    SHOP,
    UTC,
    a_due_subscription,
    a_sent_attempt,
    an_attempt,
    at,
    calendar_of,
    the_payment_of,
)

MIDNIGHT = NOW.replace(hour=0)
YESTERDAY = NOW - DAY
SECOND = timedelta(seconds=1)
NOTHING_TOLD = ProviderView()


def renewal(due: DueSubscription | None = None, *, now: datetime = NOW, **more: Any) -> Any:
    return decide_renewal(due or a_due_subscription(), now=now, **({"rules": RULES} | more))


def why_not(due: DueSubscription, **more: Any) -> str:
    decision = renewal(due, **more)
    assert isinstance(decision, NotCharged), decision
    assert decision.subject == "subscription 12"
    return decision.reason


def closed(
    state: str, days_ago: int = 1, *, number: int = 1, reason: str = "insufficient_funds", **more: Any
) -> Attempt:
    """An attempt of the period that ended without money, that many days ago."""
    return a_sent_attempt(
        number=number,
        ago=days_ago * DAY,
        state=state,
        decline_reason=reason,
        decline_class=declines.classify(reason),
        **more,
    )


def overdue(days: int, **changes: Any) -> DueSubscription:
    """Ada's subscription, which ended that many days ago."""
    due = a_due_subscription(ended_at=a_due_subscription().ended_at - days * DAY)
    attempts = tuple(dataclasses.replace(a, period_start=due.ended_at) for a in changes.pop("attempts", ()))
    return dataclasses.replace(due, attempts=attempts, **changes)


# --- Charged


def test_a_due_subscription_is_charged_its_plans_price_by_its_saved_method() -> None:
    decision = renewal()
    assert isinstance(decision, Charge)
    attempt = decision.attempt
    assert (attempt.subscription_id, attempt.period_start, attempt.number) == (12, a_due_subscription().ended_at, 1)
    assert (attempt.money, attempt.payment_method_id) == (Money(Decimal("299.00"), "RUB"), "card-of-ada")
    assert (attempt.user_id, attempt.plan_id, attempt.payment_provider_id) == ("ada", 3, 1)
    assert decision.reason == "ends today"


def test_the_price_is_that_in_the_currency_of_the_payment_that_saved_the_method() -> None:
    decision = renewal(a_due_subscription(method_currency="USD", prices=(Decimal("4.99"),)))
    assert isinstance(decision, Charge)
    assert json.loads(decision.attempt.body)["amount"] == {"value": "4.99", "currency": "USD"}


@pytest.mark.parametrize("days", [0, 1, 4, 30])
def test_one_that_ended_up_to_30_days_ago_is_charged_if_nothing_was_tried_yet(days: int) -> None:
    decision = renewal(overdue(days))
    assert isinstance(decision, Charge)
    assert ("today" if days == 0 else f"{days} days ago") in decision.reason


# --- Not charged, with the reason


@pytest.mark.parametrize("method", [None, ""])
def test_one_without_a_saved_payment_method_is_not_charged(method: str | None) -> None:
    assert why_not(a_due_subscription(method_id=method)) == "no saved payment method"


def test_one_whose_plan_has_no_price_in_the_currency_is_not_charged() -> None:
    assert why_not(a_due_subscription(prices=())) == "no price in RUB"


@pytest.mark.parametrize("prices", [("299.00", "399.00"), ("299.00", "299.00")])
def test_one_whose_plan_has_several_prices_in_the_currency_is_not_charged(prices: tuple[str, ...]) -> None:
    assert why_not(a_due_subscription(prices=tuple(map(Decimal, prices)))) == "several prices in RUB"


@pytest.mark.parametrize("price", ["0", "0.00", "-1.00", "NaN"])
def test_a_price_that_is_not_positive_is_not_charged(price: str) -> None:
    assert "is not positive" in why_not(a_due_subscription(prices=(Decimal(price),)))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"method_currency": None}, "no currency or provider"),
        ({"method_currency": "GBP"}, "no currency or provider"),
        ({"method_provider_id": None}, "no currency or provider"),
        ({"user_id": None}, "no user or no plan"),
        ({"user_id": ""}, "no user or no plan"),
        ({"plan_id": None}, "no user or no plan"),
        ({"plan_duration": None}, "no duration"),
        ({"plan_duration_unit": None}, "no duration"),
        ({"plan_duration": 0}, "not positive"),
        ({"plan_duration_unit": "fortnight"}, "'fortnight'"),
        ({"plan_duration": 10**9}, "outside the calendar"),
        ({"started_at": datetime(1, 1, 1, tzinfo=UTC)}, "outside the calendar"),
    ],
)
def test_a_row_with_nulls_or_nonsense_is_reported_with_the_reason(changes: dict[str, Any], word: str) -> None:
    rules = dataclasses.replace(RULES, calendar=calendar_of("America/New_York"))
    assert word in why_not(a_due_subscription(**changes), rules=rules)


@pytest.mark.parametrize(("days", "charged"), [(30, True), (31, False), (400, False)])
def test_one_that_is_overdue_by_more_than_max_overdue_days_is_not_charged(days: int, charged: bool) -> None:
    decision = renewal(overdue(days))
    assert isinstance(decision, Charge) is charged
    assert charged or decision.reason == f"overdue by {days} days, more than max_overdue_days (30)"


def test_max_overdue_days_is_counted_in_billing_days() -> None:
    rules = RenewalRules(calendar_of("Asia/Kolkata"), grace_days=3, max_overdue_days=1, shop_id=SHOP)
    now = at("2026-03-12T23:00", "Asia/Kolkata")
    late_yesterday = a_due_subscription(ended_at=at("2026-03-11T00:10", "Asia/Kolkata"))
    the_day_before = a_due_subscription(ended_at=at("2026-03-10T23:50", "Asia/Kolkata"))
    assert isinstance(renewal(late_yesterday, now=now, rules=rules), Charge)
    assert "overdue by 2 days" in why_not(the_day_before, now=now, rules=rules)


@pytest.mark.parametrize(("days", "charged"), [(0, True), (7, True), (9, True), (10, False), (20, False)])
def test_a_period_that_would_be_over_with_its_grace_is_not_charged(days: int, charged: bool) -> None:
    decision = renewal(overdue(days, plan_duration=7, plan_duration_unit="days"))
    assert isinstance(decision, Charge) is charged
    assert charged or "the period to pay for ended on" in decision.reason


# --- Attempts of the period


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        (a_sent_attempt(), "an open attempt whose outcome is not known yet"),
        (a_sent_attempt(state=State.PLANNED), "an open attempt whose outcome is not known yet"),
        (a_sent_attempt(state=State.PENDING), "an open attempt is pending at the provider"),
        (an_attempt(), "an attempt is already planned"),
        (a_sent_attempt(state=State.SUCCEEDED), "the period was already charged (attempt 1 SUCCEEDED)"),
        (a_sent_attempt(state=State.REFUNDED), "the period was already charged (attempt 1 REFUNDED)"),
        (a_sent_attempt(state=State.REVIEW), "the period's charge is in review (quarantine)"),
    ],
)
def test_a_period_with_an_open_or_paid_attempt_is_not_charged_again(attempt: Attempt, reason: str) -> None:
    before = closed(State.DECLINED, 2, number=1)
    live = dataclasses.replace(attempt, number=2)
    assert why_not(a_due_subscription(attempts=(attempt,))) == reason
    assert why_not(a_due_subscription(attempts=(before, live))) == reason.replace("attempt 1", "attempt 2")


@pytest.mark.parametrize(("settled", "charged"), [(None, True), (-DAY, True), (0 * DAY, True), (SECOND, False)])
def test_no_period_begins_before_the_end_of_one_that_was_settled(settled: timedelta | None, charged: bool) -> None:
    due = a_due_subscription()
    due = dataclasses.replace(due, settled_until=None if settled is None else due.ended_at + settled)
    decision = renewal(due)
    assert isinstance(decision, Charge) is charged
    assert charged or (decision.code, "was paid and settled" in decision.reason) == (Code.PERIOD_SETTLED, True)


def test_of_two_active_subscriptions_of_one_user_and_plan_the_one_that_ends_first_waits_for_a_person() -> None:
    decision = renewal(a_due_subscription(outlasted_by=14))
    assert isinstance(decision, NotCharged)
    assert (decision.code, decision.two_active) == (Code.TWO_ACTIVE, 12)
    assert "subscription 14" in decision.reason


def test_an_open_quarantine_entry_that_names_the_planned_attempt_holds_the_charge() -> None:
    planned = an_attempt()
    for holds in (Holds(attempts={planned.id: "entry 7"}), Holds(subscriptions={12: "entry 7"})):
        [reported] = decide([a_due_subscription()], [], holds=holds)
        assert isinstance(reported, NotCharged)
        assert (reported.code, reported.reason) == (Code.HELD_BY_ENTRY, "entry 7")
    others = Holds(attempts={an_attempt(number=2).id: "entry 7"}, subscriptions={13: "entry 8"})
    assert isinstance(renewal(holds=others), Charge)


@pytest.mark.parametrize(
    "reason", ["card_expired", "fraud_suspected", "3d_secure_failed", "canceled_by_merchant", "deal_expired"]
)
def test_a_decline_that_stops_the_period_is_never_tried_again_in_it(reason: str) -> None:
    for days in (1, 2, 29):
        due = overdue(days, attempts=(closed(State.STOPPED, days, reason=reason),))
        assert why_not(due) == f"stopped by a hard decline ({reason})"


@pytest.mark.parametrize(("days", "tried_again"), [(1, True), (2, True), (3, True), (4, False)])
def test_a_soft_decline_is_tried_again_on_later_days_within_the_grace(days: int, tried_again: bool) -> None:
    due = overdue(days, attempts=(closed(State.DECLINED, days),))
    decision = renewal(due)
    assert isinstance(decision, Charge) is tried_again
    if tried_again:
        assert decision.attempt.number == 2
        assert "try 2" in decision.reason
        assert decision.attempt.idempotence_key != due.attempts[0].idempotence_key
    else:
        assert decision.reason == "declined (insufficient_funds) and the grace of 3 days is over"


def test_the_grace_is_that_of_the_settings() -> None:
    for grace_days, tried_again in ((0, False), (1, True)):
        rules = dataclasses.replace(RULES, grace_days=grace_days)
        due = overdue(1, attempts=(closed(State.DECLINED),))
        assert isinstance(renewal(due, rules=rules), Charge) is tried_again


def test_without_a_decline_the_grace_ends_nothing() -> None:
    for state in (State.VOID, State.REJECTED):
        due = overdue(20, attempts=(closed(state, 20),))
        assert isinstance(renewal(due), Charge)


@pytest.mark.parametrize(("tries", "tried_again"), [(1, True), (2, True), (3, False), (4, False)])
def test_an_unclear_decline_is_tried_three_times_in_a_period(tries: int, tried_again: bool) -> None:
    rules = dataclasses.replace(RULES, grace_days=20)
    attempts = tuple(closed(State.DECLINED, 10 - n, number=n, reason="general_decline") for n in range(1, tries + 1))
    decision = renewal(overdue(10, attempts=attempts), rules=rules)
    assert isinstance(decision, Charge) is tried_again
    assert tried_again or decision.reason == "declined 3 times without a usable reason"


def test_soft_declines_do_not_count_as_unclear_ones() -> None:
    rules = dataclasses.replace(RULES, grace_days=20)
    words = ("general_decline", "insufficient_funds", "insufficient_funds", "call_issuer")
    attempts = tuple(closed(State.DECLINED, 10 - n, number=n, reason=word) for n, word in enumerate(words, 1))
    assert isinstance(renewal(overdue(10, attempts=attempts), rules=rules), Charge)


def test_a_new_attempt_has_a_number_that_no_attempt_of_the_period_ever_had() -> None:
    attempts = (
        closed(State.DECLINED, 3, number=1),
        closed(State.VOID, 2, number=5),
        closed(State.REJECTED, 1, number=2),
    )
    decision = renewal(overdue(3, attempts=attempts))
    assert isinstance(decision, Charge)
    assert decision.attempt.number == 6
    # One that this very run closes does not block, but keeps its number.
    planned = an_attempt(number=7)
    decision = renewal(a_due_subscription(attempts=(planned,)), voided=frozenset({planned.id}))
    assert isinstance(decision, Charge)
    assert decision.attempt.number == 8


# --- Once a day, by the clock on the wall


@pytest.mark.parametrize(
    ("tried_at", "charged"),
    [(NOW - HOUR, False), (MIDNIGHT, False), (MIDNIGHT - timedelta(microseconds=1), True), (NOW, False)],
)
def test_one_that_was_already_attempted_today_is_not_charged(tried_at: datetime, charged: bool) -> None:
    decision = renewal(a_due_subscription(last_tried_at=tried_at))
    assert isinstance(decision, Charge) is charged
    assert charged or decision.reason == "already attempted today"


def test_today_is_the_billing_time_zones_today() -> None:
    rules = RenewalRules(calendar_of("America/New_York"), grace_days=3, max_overdue_days=30, shop_id=SHOP)
    # 03:00 UTC is still yesterday evening in New York.
    due = a_due_subscription(last_tried_at=NOW.replace(hour=4) - DAY)
    assert why_not(due, rules=rules) == "already attempted today"
    assert isinstance(renewal(due, rules=rules, now=NOW.replace(hour=4)), Charge)


def test_a_card_that_was_declined_today_for_another_subscription_is_not_tried_again_today() -> None:
    assert (
        why_not(a_due_subscription(method_declined_at=NOW - HOUR)) == "this payment method was already declined today"
    )
    assert isinstance(renewal(a_due_subscription(method_declined_at=YESTERDAY)), Charge)


@settings(max_examples=300, deadline=None)
@given(
    states=st.lists(
        st.sampled_from(
            [State.DECLINED, State.STOPPED, State.REJECTED, State.VOID, State.SUCCEEDED, State.UNKNOWN, State.REVIEW]
        ),
        max_size=4,
    ),
    overdue_days=st.integers(0, 40),
    tried_hours_ago=st.none() | st.integers(0, 60),
    method=st.sampled_from(["card-of-ada", None]),
    prices=st.lists(st.decimals(-1, 10, places=2), max_size=2),
)
def test_a_charge_breaks_no_rule(
    states: list[str],
    overdue_days: int,
    tried_hours_ago: int | None,
    method: str | None,
    prices: list[Decimal],
) -> None:
    attempts = tuple(closed(state, 40, number=n) for n, state in enumerate(states, 1))
    due = overdue(
        overdue_days,
        attempts=attempts,
        method_id=method,
        prices=tuple(prices),
        last_tried_at=None if tried_hours_ago is None else NOW - tried_hours_ago * HOUR,
    )
    decision = renewal(due)
    fine = (
        set(states) <= {State.DECLINED, State.REJECTED, State.VOID}
        and overdue_days <= (3 if State.DECLINED in states else 30)
        and (tried_hours_ago is None or tried_hours_ago > 3)
        and method is not None
        and len(prices) == 1
        and prices[0] > 0
    )
    assert isinstance(decision, Charge) is fine
    if isinstance(decision, Charge):
        assert decision.attempt.number == len(states) + 1


# --- Attempts of earlier runs


def decide_open(
    attempt: Attempt, view: ProviderView = NOTHING_TOLD, due: Any = "still due", now: datetime = NOW
) -> Any:
    return decide_open_attempt(attempt, view, a_due_subscription() if due == "still due" else due, now, SHOP)


@pytest.mark.parametrize("status", [SUCCEEDED, CANCELED, PENDING, WAITING_FOR_CAPTURE])
@pytest.mark.parametrize("state", [State.PLANNED, State.UNKNOWN])
def test_what_a_search_has_found_is_concluded_as_if_it_had_answered(state: str, status: str) -> None:
    attempt = a_sent_attempt(state=state, ago=30 * HOUR)
    payment = the_payment_of(attempt, status=status)
    for due in ("still due", None):
        decision = decide_open(attempt, ProviderView({attempt.id: payment}), due)
        assert isinstance(decision, Conclude)
        assert (decision.attempt, decision.payment) == (attempt, payment)


@pytest.mark.parametrize(
    ("status", "concluded"), [(SUCCEEDED, True), (CANCELED, True), (PENDING, False), (WAITING_FOR_CAPTURE, False)]
)
def test_a_pending_attempt_is_concluded_when_it_is_finished_there_and_else_left(status: str, concluded: bool) -> None:
    attempt = a_sent_attempt(state=State.PENDING, ago=30 * HOUR, external_payment_id="renewal-1")
    decision = decide_open(attempt, ProviderView({attempt.id: the_payment_of(attempt, status=status)}))
    assert isinstance(decision, Conclude) is concluded
    assert concluded or not decision.needs_retry


@pytest.mark.parametrize("state", [State.PLANNED, State.UNKNOWN, State.PENDING])
def test_an_attempt_about_which_the_provider_was_silent_is_left_and_makes_the_run_red(state: str) -> None:
    attempt = a_sent_attempt(state=state, ago=30 * HOUR)
    decision = decide_open(attempt, ProviderView(silent={attempt.id: "HTTP 502"}))
    assert isinstance(decision, NotCharged)
    assert decision.needs_retry
    assert "HTTP 502" in decision.reason


@settings(max_examples=100, deadline=None)
@given(ago=st.timedeltas(timedelta(0), 60 * DAY), absent=st.booleans(), due=st.booleans(), scanned=st.booleans())
def test_a_pending_attempt_is_only_asked_about_and_never_sent_again(
    ago: timedelta, absent: bool, due: bool, scanned: bool
) -> None:
    attempt = a_sent_attempt(state=State.PENDING, ago=ago, first_absent_at=NOW - 2 * DAY if absent else None)
    view = ProviderView(scanned=frozenset({attempt.id}) if scanned else frozenset())
    assert isinstance(decide_open(attempt, view, "still due" if due else None), NotCharged)


def test_an_attempt_that_was_never_sent_is_sent_with_the_same_key_later() -> None:
    attempt = an_attempt()
    decision = decide_open(attempt, now=NOW + 20 * DAY)
    assert isinstance(decision, Resend)
    assert decision.attempt == attempt


def test_an_attempt_that_was_never_sent_is_closed_when_its_period_is_not_due_any_more() -> None:
    moved = a_due_subscription(ended_at=a_due_subscription().ended_at - DAY)
    for due in (None, moved):
        assert isinstance(decide_open(an_attempt(), due=due), Void)


@pytest.mark.parametrize("state", [State.PLANNED, State.UNKNOWN])
@pytest.mark.parametrize("ago", [timedelta(0), HOUR, 23 * HOUR - SECOND])
def test_an_unknown_outcome_younger_than_23_hours_is_asked_by_the_same_key_and_body(state: str, ago: timedelta) -> None:
    attempt = a_sent_attempt(state=state, ago=ago)
    decision = decide_open(attempt)
    assert isinstance(decision, Resend)
    assert (decision.attempt.idempotence_key, decision.attempt.body) == (attempt.idempotence_key, attempt.body)


def test_an_unknown_outcome_is_not_sent_again_for_what_nobody_wants_any_more() -> None:
    # Renewed, canceled or paused meanwhile: what became of it is searched later.
    moved = a_due_subscription(ended_at=a_due_subscription().ended_at + DAY)
    for due in (None, moved):
        decision = decide_open(a_sent_attempt(), due=due)
        assert isinstance(decision, NotCharged)
        assert "not sent again" in decision.reason


@settings(max_examples=200, deadline=None)
@given(
    state=st.sampled_from([State.PLANNED, State.UNKNOWN]),
    age=st.timedeltas(23 * HOUR, 90 * DAY),
    scanned=st.booleans(),
    absent_for=st.none() | st.timedeltas(timedelta(0), 3 * HOUR),
    due=st.booleans(),
)
def test_an_unknown_outcome_older_than_23_hours_is_never_sent_again(
    state: str, age: timedelta, scanned: bool, absent_for: timedelta | None, due: bool
) -> None:
    attempt = a_sent_attempt(state=state, ago=age, first_absent_at=None if absent_for is None else NOW - absent_for)
    view = ProviderView(scanned=frozenset({attempt.id}) if scanned else frozenset())
    decision = decide_open(attempt, view, "still due" if due else None)
    # Closed only by the second complete scan, an hour after the first.
    certain = scanned and absent_for is not None and absent_for >= SCAN_DISTANCE
    if certain:
        assert isinstance(decision, Void)
    elif scanned and absent_for is None:
        assert isinstance(decision, NoteAbsence)
    else:
        assert isinstance(decision, NotCharged)
        assert decision.needs_retry is not scanned


def test_the_two_scans_are_an_hour_apart() -> None:
    assert SCAN_DISTANCE == HOUR
    for distance, decided in ((HOUR - SECOND, NotCharged), (HOUR, Void)):
        attempt = a_sent_attempt(ago=30 * HOUR, first_absent_at=NOW - distance)
        assert type(decide_open(attempt, ProviderView(scanned=frozenset({attempt.id})))) is decided


@settings(max_examples=300, deadline=None)
@given(
    state=st.sampled_from(sorted(OPEN)),
    sent=st.none() | st.timedeltas(timedelta(0), 3 * DAY),
    told=st.sampled_from(["nothing", "scanned", "silent"]),
    absent_for=st.none() | st.timedeltas(timedelta(0), 2 * DAY),
    due=st.booleans(),
)
def test_an_attempt_is_sent_again_only_while_its_key_holds_and_closed_only_when_no_money_moved(
    state: str, sent: timedelta | None, told: str, absent_for: timedelta | None, due: bool
) -> None:
    attempt = an_attempt(
        state=state,
        first_sent_at=None if sent is None else NOW - sent,
        last_sent_at=None if sent is None else NOW - sent,
        first_absent_at=None if absent_for is None else NOW - absent_for,
    )
    view = ProviderView(
        scanned=frozenset({attempt.id}) if told == "scanned" else frozenset(),
        silent={attempt.id: "silence"} if told == "silent" else {},
    )
    decision = decide_open(attempt, view, "still due" if due else None)
    if isinstance(decision, Resend):
        assert due
        assert state != State.PENDING
        assert sent is None or sent < KEY_LIFETIME
    if isinstance(decision, Void):
        assert state != State.PENDING
        assert sent is None or (told == "scanned" and absent_for is not None and absent_for >= SCAN_DISTANCE)


# --- A whole run


def decide(
    due: list[DueSubscription],
    open_attempts: list[Attempt],
    view: ProviderView | None = None,
    **more: Any,
) -> list[RenewalDecision]:
    return decide_renewals(due, open_attempts, view or NOTHING_TOLD, **({"now": NOW, "rules": RULES} | more))


def test_every_due_subscription_and_every_open_attempt_gets_its_decision() -> None:
    with_attempt = a_due_subscription(attempts=(a_sent_attempt(),))
    fresh = a_due_subscription(id=13)
    poor = a_due_subscription(id=14, method_id=None)
    orphan = a_sent_attempt(a_due_subscription(id=99))
    decisions = decide([with_attempt, fresh, poor], [with_attempt.attempts[0], orphan])
    assert [type(decision) for decision in decisions] == [Resend, NotCharged, Charge, NotCharged]
    told = decisions[1]
    assert isinstance(told, NotCharged)
    assert told.subject == "subscription 99, attempt 1"


@pytest.mark.parametrize(
    ("attempt", "told", "expected"),
    [
        (a_sent_attempt(), "nothing", Resend),
        (a_sent_attempt(ago=30 * HOUR), "scanned", NoteAbsence),
        (a_sent_attempt(ago=30 * HOUR), "nothing", NotCharged),
        (a_sent_attempt(ago=30 * HOUR), "succeeded", Conclude),
        (a_sent_attempt(state=State.PENDING), "nothing", NotCharged),
        (an_attempt(), "nothing", Resend),
    ],
)
def test_a_subscription_with_an_open_attempt_gets_no_second_one_in_the_same_run(
    attempt: Attempt, told: str, expected: type
) -> None:
    view = ProviderView(
        answers={attempt.id: the_payment_of(attempt, status=SUCCEEDED)} if told == "succeeded" else {},
        scanned=frozenset({attempt.id}) if told == "scanned" else frozenset(),
    )
    decisions = decide([a_due_subscription(attempts=(attempt,))], [attempt], view)
    assert [type(decision) for decision in decisions] == [expected]


SOFT, HARD = {"cancellation_reason": "insufficient_funds"}, {"cancellation_reason": "card_expired"}


@pytest.mark.parametrize("state", [State.PENDING, State.UNKNOWN])
def test_a_decline_of_an_earlier_day_that_is_heard_of_now_is_followed_by_the_next_try(state: str) -> None:
    attempt = a_sent_attempt(ago=30 * HOUR, state=state)
    view = ProviderView({attempt.id: the_payment_of(attempt, status=CANCELED, **SOFT)})
    conclude, charge = decide([a_due_subscription(attempts=(attempt,))], [attempt], view)
    assert isinstance(conclude, Conclude)
    assert isinstance(charge, Charge)
    assert charge.attempt.number == 2


@pytest.mark.parametrize(
    ("why", "changes", "code"),
    [
        (HARD, {}, "hard_decline"),
        (SOFT, {"last_tried_at": NOW}, "tried_today"),
        ({"cancellation_reason": "canceled_by_merchant"}, {}, "hard_decline"),
    ],
)
def test_a_decline_that_is_heard_of_now_forbids_what_it_would_forbid_the_next_run(
    why: dict[str, str], changes: dict[str, Any], code: str
) -> None:
    attempt = a_sent_attempt(ago=30 * HOUR, state=State.PENDING)
    view = ProviderView({attempt.id: the_payment_of(attempt, status=CANCELED, **why)})
    conclude, reported = decide([a_due_subscription(attempts=(attempt,), **changes)], [attempt], view)
    assert isinstance(conclude, Conclude)
    assert isinstance(reported, NotCharged)
    assert reported.code == code


@pytest.mark.parametrize(
    ("why", "ago", "code"),
    [(HARD, 30 * HOUR, "method_stopped"), (SOFT, HOUR, "method_declined_today"), (SOFT, 30 * HOUR, None)],
)
def test_a_card_that_is_declined_now_is_declined_for_its_other_subscriptions_too(
    why: dict[str, str], ago: timedelta, code: str | None
) -> None:
    attempt = a_sent_attempt(a_due_subscription(id=1), ago=ago, state=State.PENDING)
    view = ProviderView({attempt.id: the_payment_of(attempt, status=CANCELED, **why)})
    decisions = decide([a_due_subscription(id=2), a_due_subscription(id=3, method_id="another")], [attempt], view)
    _, same_card, another = decisions
    assert isinstance(another, Charge)
    assert getattr(same_card, "code", None) == code


def test_an_attempt_that_never_reached_the_provider_is_closed_and_a_new_one_follows() -> None:
    lost = a_sent_attempt(ago=30 * HOUR, first_absent_at=NOW - 2 * HOUR)
    decisions = decide([a_due_subscription(attempts=(lost,))], [lost], ProviderView(scanned=frozenset({lost.id})))
    void, charge = decisions
    assert isinstance(void, Void)
    assert isinstance(charge, Charge)
    assert charge.attempt.number == 2
    assert charge.attempt.idempotence_key != lost.idempotence_key


@pytest.mark.parametrize("told", ["nothing", "pending", "silent", "succeeded"])
def test_a_subscription_with_an_open_attempt_of_another_period_is_not_charged_before_that_is_known(told: str) -> None:
    # Support has moved the end by a day while the charge was under way: it may have been paid already.
    moved = a_due_subscription()
    earlier = a_sent_attempt(overdue(1), ago=20 * HOUR, state=State.PENDING if told == "pending" else State.UNKNOWN)
    view = ProviderView(
        answers={earlier.id: the_payment_of(earlier, status=told)} if told in ("pending", "succeeded") else {},
        silent={earlier.id: "silence"} if told == "silent" else {},
    )
    decisions = decide([moved], [earlier], view)
    assert len(decisions) == 2
    [reported] = [d for d in decisions if isinstance(d, NotCharged) and d.subject == "subscription 12"]
    assert "2026-03-11" in reported.reason


def test_a_subscription_with_an_attempt_of_another_period_in_review_is_not_charged() -> None:
    # Support has added a day to a period whose charge a person has to judge.
    in_review = a_sent_attempt(overdue(1), state=State.REVIEW)
    [reported] = decide([a_due_subscription()], [], in_review=[in_review])
    assert isinstance(reported, NotCharged)
    assert (reported.code, "2026-03-11 is in review" in reported.reason) == (Code.IN_REVIEW, True)
    planned = an_attempt()
    void, _ = decide([a_due_subscription(attempts=(planned,))], [planned], in_review=[in_review])
    assert isinstance(void, Void)
    assert "in review" in void.reason


def test_an_attempt_in_review_stands_in_the_way_of_its_own_subscription_only() -> None:
    present = a_sent_attempt(state=State.REVIEW)
    decisions = decide([a_due_subscription(attempts=(present,)), a_due_subscription(id=13)], [], in_review=[present])
    assert [type(decision) for decision in decisions] == [NotCharged, Charge]
    # That of the present period is told as what it is.
    assert decisions[0].reason == "the period's charge is in review (quarantine)"


def test_an_attempt_of_another_period_that_was_never_sent_is_closed_and_blocks_nothing() -> None:
    decisions = decide([a_due_subscription()], [an_attempt(overdue(1))])
    assert [type(decision) for decision in decisions] == [Void, Charge]


# An attempt that was planned, and never sent: the machine was offline, charging had stopped.


def test_an_unsent_attempt_is_sent_when_a_fresh_one_would_ask_the_same() -> None:
    planned = an_attempt()
    decisions = decide([a_due_subscription(attempts=(planned,))], [planned])
    [resend] = decisions
    assert isinstance(resend, Resend)
    assert resend.attempt == planned


@pytest.mark.parametrize(
    "changes",
    [{"prices": (Decimal("399.00"),)}, {"method_id": "new-card"}, {"plan_id": 4}, {"method_currency": "USD"}],
)
def test_an_unsent_attempt_gives_way_when_price_plan_or_method_have_changed(changes: dict[str, Any]) -> None:
    planned = an_attempt()
    void, charge = decide([a_due_subscription(attempts=(planned,), **changes)], [planned])
    assert isinstance(void, Void)
    assert isinstance(charge, Charge)
    assert charge.attempt.number == 2


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"prices": ()}, "no price"),
        ({"method_id": None}, "no saved payment method"),
        ({"last_tried_at": NOW - HOUR}, "already attempted today"),
        ({"method_declined_at": NOW - HOUR}, "already declined today"),
    ],
)
def test_an_unsent_attempt_is_closed_when_a_fresh_one_would_not_be_charged(changes: dict[str, Any], word: str) -> None:
    planned = an_attempt()
    void, reported = decide([a_due_subscription(attempts=(planned,), **changes)], [planned])
    assert isinstance(void, Void)
    assert word in void.reason
    assert isinstance(reported, NotCharged)
    assert word in reported.reason


def test_an_attempt_that_may_have_been_sent_keeps_its_body_whatever_the_price_is_by_now() -> None:
    sent = a_sent_attempt()
    due = a_due_subscription(attempts=(sent,), prices=(Decimal("399.00"),), method_id="new-card", last_tried_at=NOW)
    [resend] = decide([due], [sent])
    assert isinstance(resend, Resend)
    assert resend.attempt.body == sent.body


@settings(max_examples=200, deadline=None)
@given(
    customers=st.lists(
        st.tuples(
            st.sampled_from(["none", *sorted({State.PLANNED, State.UNKNOWN, State.PENDING})]),
            st.integers(0, 60),  # hours since it was sent
            st.booleans(),  # of the present period
            st.sampled_from(["nothing", "scanned", "silent", "succeeded", "canceled", "pending"]),
        ),
        max_size=6,
    )
)
def test_in_one_run_a_subscription_is_sent_at_most_one_charge_and_nobody_is_forgotten(
    customers: list[tuple[str, int, bool, str]],
) -> None:
    due, attempts = [], []
    answers, silent, scanned = {}, {}, set()
    for number, (state, hours, present, told) in enumerate(customers, 1):
        subscription = a_due_subscription(id=number)
        if state != "none":
            period = subscription if present else dataclasses.replace(subscription, ended_at=YESTERDAY)
            absent = {"first_absent_at": NOW - 2 * HOUR} if hours % 2 else {}
            attempt = a_sent_attempt(period, state=state, ago=hours * HOUR, **absent)
            attempts.append(attempt)
            if present:
                subscription = dataclasses.replace(subscription, attempts=(attempt,))
            if told in ("succeeded", "canceled", "pending"):
                answers[attempt.id] = the_payment_of(attempt, status=told)
            elif told == "silent":
                silent[attempt.id] = "silence"
            elif told == "scanned":
                scanned.add(attempt.id)
        due.append(subscription)
    decisions = decide(due, attempts, ProviderView(answers, frozenset(scanned), silent))
    sent = [d.attempt.subscription_id for d in decisions if isinstance(d, (Charge, Resend))]
    assert len(sent) == len(set(sent))
    for subscription in due:
        mine = [
            d
            for d in decisions
            if (d.subject.split(",")[0] == subscription.subject if isinstance(d, NotCharged) else False)
            or (not isinstance(d, NotCharged) and d.attempt.subscription_id == subscription.id)
        ]
        assert mine
        # A new charge beside an attempt of an earlier run only if that one is closed for certain.
        if any(isinstance(d, Charge) for d in mine) and len(mine) > 1:
            assert [type(d) for d in mine] in ([Void, Charge], [Conclude, Charge])
            if isinstance(mine[0], Conclude):
                assert mine[0].payment.status == CANCELED


# Attempts of another shop


def test_an_attempt_that_another_shop_may_have_sent_is_neither_sent_nor_given_up() -> None:
    for state, age in ((State.UNKNOWN, HOUR), (State.PLANNED, HOUR), (State.PENDING, HOUR), (State.UNKNOWN, 3 * DAY)):
        attempt = a_sent_attempt(ago=age, state=state, shop_id="another", first_absent_at=NOW - 2 * HOUR)
        told = ProviderView(scanned=frozenset({attempt.id}))
        decision = decide_open_attempt(attempt, told, a_due_subscription(), NOW, SHOP)
        assert isinstance(decision, NotCharged)
        assert (decision.code, decision.needs_retry) == ("other_shop", True)
        assert "shop another" in decision.reason


def test_an_attempt_of_another_shop_that_was_never_sent_is_planned_anew() -> None:
    planned = an_attempt(shop_id="another")
    void, charge = decide([a_due_subscription(attempts=(planned,))], [planned])
    assert isinstance(void, Void)
    assert isinstance(charge, Charge)
    assert (charge.attempt.number, charge.attempt.shop_id) == (2, SHOP)


def test_a_sent_attempt_whose_shop_nobody_wrote_down_is_searched_and_neither_sent_nor_given_up() -> None:
    young = a_sent_attempt(shop_id=None)
    decision = decide_open_attempt(young, NOTHING_TOLD, a_due_subscription(), NOW, SHOP)
    assert isinstance(decision, NotCharged)
    assert "not sent again" in decision.reason
    old = a_sent_attempt(ago=DAY, shop_id=None)
    scanned = frozenset({old.id})
    found = ProviderView(answers={old.id: the_payment_of(old)}, scanned=scanned)
    assert isinstance(decide_open_attempt(old, found, a_due_subscription(), NOW, SHOP), Conclude)
    absent = ProviderView(scanned=scanned)
    assert isinstance(decide_open_attempt(old, absent, a_due_subscription(), NOW, SHOP), NoteAbsence)
    missed = dataclasses.replace(old, first_absent_at=NOW - HOUR)
    decision = decide_open_attempt(missed, absent, a_due_subscription(), NOW, SHOP)
    assert isinstance(decision, NotCharged)
    assert (decision.code, decision.needs_retry) == ("other_shop", True)


def test_a_planned_attempt_whose_period_has_changed_is_planned_anew() -> None:
    planned = an_attempt()
    void, charge = decide([a_due_subscription(attempts=(planned,), plan_duration=2)], [planned])
    assert isinstance(void, Void)
    assert isinstance(charge, Charge)
    assert (charge.attempt.period_count, charge.attempt.period_unit) == (2, "month")
