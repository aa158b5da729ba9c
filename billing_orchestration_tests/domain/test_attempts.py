"""An attempt: its identity, its frozen body, and what the provider's answers and lists make of it (SPEC 5)."""

from __future__ import annotations

import dataclasses
import json
import uuid
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing_orchestration.domain import declines
from billing_orchestration.domain.money import LARGEST_AMOUNT, Money
from billing_orchestration.domain.provider_payment import (
    CANCELED,
    PENDING,
    SUCCEEDED,
    WAITING_FOR_CAPTURE,
    UnusablePayment,
)
from billing_orchestration.domain.renewals import (
    ATTEMPT_KEY,
    KEY_LIFETIME,
    OPEN,
    SCAN_DISTANCE,
    SCAN_MARGIN,
    TAKEN,
    Attempt,
    Conclude,
    NotCharged,
    NoteAbsence,
    ProviderView,
    Resend,
    State,
    Void,
    as_answer_to,
    attempts_to_search,
    decide_open_attempt,
    is_past_key_lifetime,
    judge_answer,
    merge_views,
    names_another_attempt,
    plan_attempt,
    read_scan,
    scan_windows,
)
from billing_orchestration_tests.domain.given import (
    DAY,
    HOUR,
    NOW,
    PRICE,
    UTC,
    a_decline,
    a_due_subscription,
    a_payment,
    a_sent_attempt,
    an_attempt,
    the_payment_of,
)

SECOND, MINUTE = timedelta(seconds=1), timedelta(minutes=1)
NOTHING_TOLD = ProviderView()


# --- Identity, key and body


def test_the_key_of_an_attempt_is_the_same_for_ever() -> None:
    # Written down, not computed: another namespace or another spelling of the identity would be a second charge for
    # every attempt that was under way during an upgrade.
    attempt = an_attempt()
    assert str(attempt.id) == "0405b9fa-d837-5936-ad29-298da96e1a13"
    assert str(attempt.idempotence_key) == "13736a8d-eb64-5da4-a27a-a389edd2f232"


def test_the_identity_depends_on_subscription_period_start_and_number() -> None:
    due = a_due_subscription()
    others = [
        an_attempt(due),
        an_attempt(due, number=2),
        an_attempt(dataclasses.replace(due, id=13)),
        an_attempt(dataclasses.replace(due, ended_at=due.ended_at + timedelta(microseconds=1))),
        # No two identities may read alike when they are joined: 1 and 23, 12 and 3.
        an_attempt(dataclasses.replace(due, id=1), number=23),
        an_attempt(dataclasses.replace(due, id=12), number=3),
    ]
    assert len({attempt.id for attempt in others}) == len(others)
    assert len({attempt.idempotence_key for attempt in others}) == len(others)
    assert not {attempt.id for attempt in others} & {attempt.idempotence_key for attempt in others}


@settings(max_examples=50, deadline=None)
@given(
    user_id=st.text(min_size=1, max_size=20),
    plan_id=st.integers(1, 10**6),
    method_id=st.text(min_size=1, max_size=36),
    amount=st.decimals(Decimal("0.01"), LARGEST_AMOUNT, places=2),
    currency=st.sampled_from(["RUB", "USD", "EUR"]),
    provider_id=st.integers(1, 100),
)
def test_the_identity_depends_on_nothing_else(
    user_id: str, plan_id: int, method_id: str, amount: Decimal, currency: str, provider_id: int
) -> None:
    attempt = plan_attempt(
        a_due_subscription(prices=(), method_id=None, plan_duration=None),
        number=1,
        user_id=user_id,
        plan_id=plan_id,
        method_id=method_id,
        money=Money(amount, currency),
        provider_id=provider_id,
    )
    assert (attempt.id, attempt.idempotence_key) == (an_attempt().id, an_attempt().idempotence_key)


def test_the_offset_that_an_end_is_written_with_changes_neither_key_nor_body() -> None:
    due = a_due_subscription(ended_at=datetime(2026, 3, 12, 22, 30, tzinfo=UTC))
    elsewhere = dataclasses.replace(due, ended_at=due.ended_at.astimezone(timezone(timedelta(hours=9))))
    assert an_attempt(elsewhere) == an_attempt(due)


def test_the_body_is_exactly_what_a_recurring_charge_needs() -> None:
    attempt = an_attempt()
    assert json.loads(attempt.body) == {
        "amount": {"value": "299.00", "currency": "RUB"},
        "capture": True,
        "payment_method_id": "card-of-ada",
        "description": "Subscription 12: renewal from 2026-03-12",
        "metadata": {
            "renewal_attempt_id": str(attempt.id),
            "subscription_id": "12",
            "period_start": "2026-03-12T09:00:00+00:00",
            "user_id": "ada",
            "plan_id": "3",
            "payment_provider_id": "1",
        },
    }


def test_a_new_attempt_is_planned_and_certainly_unsent() -> None:
    attempt = an_attempt()
    assert (attempt.state, attempt.first_sent_at, attempt.may_have_been_sent) == (State.PLANNED, None, False)
    assert (attempt.money, attempt.period_start) == (PRICE, a_due_subscription().ended_at)


@settings(max_examples=100, deadline=None)
@given(
    subscription_id=st.integers(1, 2**31 - 1),
    number=st.integers(1, 99),
    user_id=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=512),
    amount=st.decimals(Decimal("0.01"), LARGEST_AMOUNT, places=2),
    ended_at=st.datetimes(timezones=st.just(UTC)),
)
def test_every_body_keeps_the_providers_limits(
    subscription_id: int, number: int, user_id: str, amount: Decimal, ended_at: datetime
) -> None:
    due = a_due_subscription(id=subscription_id, ended_at=ended_at)
    attempt = plan_attempt(
        due,
        number=number,
        user_id=user_id,
        plan_id=2**31 - 1,
        method_id="m" * 36,
        money=Money(amount, "RUB"),
        provider_id=2**31 - 1,
    )
    body = json.loads(attempt.body)
    assert len(body["description"]) <= 128
    assert len(body["metadata"]) <= 16
    assert all(
        len(key) <= 32 and isinstance(value, str) and len(value) <= 512 for key, value in body["metadata"].items()
    )
    assert body["metadata"]["user_id"] == user_id
    assert Decimal(body["amount"]["value"]) == amount
    assert body["amount"]["value"] == f"{amount:.2f}"
    assert 1 <= len(str(attempt.idempotence_key)) <= 64
    assert "confirmation" not in body


def test_the_open_and_the_paid_states_share_nothing() -> None:
    assert not OPEN & TAKEN
    assert {State.DECLINED, State.STOPPED, State.REJECTED, State.VOID}.isdisjoint(OPEN | TAKEN)


# --- A key's lifetime


@pytest.mark.parametrize(
    ("age", "past"), [(timedelta(0), False), (23 * HOUR - SECOND, False), (23 * HOUR, True), (24 * HOUR, True)]
)
def test_a_key_is_used_for_less_than_23_hours_after_the_first_send(age: timedelta, past: bool) -> None:
    assert KEY_LIFETIME == 23 * HOUR
    # However lately it was sent again: the provider counts from the first request.
    attempt = a_sent_attempt(ago=age, last_sent_at=NOW)
    assert is_past_key_lifetime(attempt, NOW) is past
    assert not is_past_key_lifetime(an_attempt(), NOW)


def test_only_attempts_that_may_have_been_sent_and_are_too_old_to_send_again_are_searched() -> None:
    old = 30 * HOUR
    searched = [a_sent_attempt(number=1, ago=old), a_sent_attempt(number=2, state=State.PLANNED, ago=old)]
    not_searched = [
        a_sent_attempt(number=3, ago=22 * HOUR),
        a_sent_attempt(number=4, state=State.PENDING, ago=old),
        an_attempt(number=5),
    ]
    assert attempts_to_search([*searched, *not_searched], NOW) == searched


# --- Where to search


def test_a_search_reaches_from_before_the_first_send_to_after_the_last() -> None:
    first, last = NOW - 40 * HOUR, NOW - 20 * HOUR
    attempt = a_sent_attempt(first_sent_at=first, last_sent_at=last)
    assert scan_windows([attempt]) == [(first - SCAN_MARGIN, last + SCAN_MARGIN, (attempt,))]
    once = dataclasses.replace(attempt, last_sent_at=None)
    assert scan_windows([once]) == [(first - SCAN_MARGIN, first + SCAN_MARGIN, (once,))]


def test_searches_that_overlap_are_one_and_others_stay_apart() -> None:
    a = a_sent_attempt(number=1, ago=100 * HOUR)
    b = a_sent_attempt(number=2, ago=100 * HOUR - 2 * SCAN_MARGIN)
    c = a_sent_attempt(number=3, ago=100 * HOUR - 4 * SCAN_MARGIN - SECOND)
    windows = scan_windows([c, a, b])
    assert [attempts for _, _, attempts in windows] == [(a, b), (c,)]


def test_what_was_never_sent_is_not_searched() -> None:
    assert scan_windows([an_attempt()]) == []
    assert scan_windows([]) == []


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.timedeltas(timedelta(0), timedelta(days=5)), st.none() | st.timedeltas(timedelta(0), timedelta(hours=23))
        ),
        max_size=8,
    )
)
def test_every_send_is_searched_with_its_margin_in_exactly_one_window(
    sends: list[tuple[timedelta, timedelta | None]],
) -> None:
    attempts = [
        a_sent_attempt(
            number=number,
            first_sent_at=NOW - ago,
            last_sent_at=None if later is None else NOW - ago + later,
        )
        for number, (ago, later) in enumerate(sends, 1)
    ]
    windows = scan_windows(attempts)
    assert sorted(a.number for _, _, covered in windows for a in covered) == [a.number for a in attempts]
    for start, end, covered in windows:
        for attempt in covered:
            assert attempt.first_sent_at is not None
            assert start <= attempt.first_sent_at - SCAN_MARGIN
            assert end >= (attempt.last_sent_at or attempt.first_sent_at) + SCAN_MARGIN
    assert all(end < start for (_, end, _), (start, _, _) in pairwise(windows))


# --- What a complete scan says


def test_a_scan_finds_an_attempt_by_its_id_in_the_metadata() -> None:
    mine, other = a_sent_attempt(number=1), a_sent_attempt(number=2)
    payment = the_payment_of(mine)
    view = read_scan([mine, other], [a_payment(), payment], [])
    assert view == ProviderView({mine.id: payment}, frozenset({mine.id, other.id}), {}, ())


def test_a_scan_of_several_payments_hears_first_who_has_the_money() -> None:
    attempt = a_sent_attempt()
    declined = a_decline(attempt, "insufficient_funds", id="1", created_at=NOW - 3 * HOUR)
    pending = the_payment_of(attempt, id="2", status=PENDING, captured_at=None, created_at=NOW - 2 * HOUR)
    paid = the_payment_of(attempt, id="3", created_at=NOW - HOUR)
    paid_again = the_payment_of(attempt, id="4", created_at=NOW)
    for order in ([declined, pending, paid, paid_again], [paid_again, paid, pending, declined]):
        view = read_scan([attempt], order, [])
        assert view.answers[attempt.id] == paid
        # The further success is not lost: settling puts it to a person.
        assert view.extra == (paid_again,)
    assert read_scan([attempt], [declined, pending], []).answers[attempt.id] == pending
    assert read_scan([attempt], [declined], []).answers[attempt.id] == declined


@pytest.mark.parametrize(
    "evidence",
    [
        "garbage",
        None,
        ["a list"],
        {"id": "pay-9"},
        {"id": "pay-9", "metadata": None},
        {"id": "pay-9", "metadata": "garbage"},
    ],
)
def test_a_record_whose_metadata_cannot_be_read_proves_no_attempt_absent(evidence: Any) -> None:
    attempt = a_sent_attempt()
    view = read_scan([attempt], [], [UnusablePayment("pay-9", "odd", evidence)])
    assert (view.answers, view.scanned) == ({}, frozenset())
    assert attempt.id in view.silent


def test_a_record_that_names_the_attempt_and_cannot_be_read_proves_only_the_others_absent() -> None:
    mine, other = a_sent_attempt(number=1), a_sent_attempt(number=2)
    odd = UnusablePayment("pay-9", "amount is missing", {"metadata": {ATTEMPT_KEY: str(mine.id)}})
    view = read_scan([mine, other], [], [odd])
    assert set(view.silent) == {mine.id}
    assert view.scanned == {other.id}


def test_an_odd_record_of_somebody_else_proves_everybody_absent_all_the_same() -> None:
    attempt = a_sent_attempt()
    odd = UnusablePayment("pay-9", "amount is missing", {"metadata": {"user_id": "boris"}})
    assert read_scan([attempt], [], [odd]) == ProviderView({}, frozenset({attempt.id}), {}, ())


def test_an_attempt_that_is_found_is_told_even_beside_odd_records() -> None:
    attempt = a_sent_attempt()
    view = read_scan([attempt], [the_payment_of(attempt)], [UnusablePayment(None, "odd", None)])
    assert attempt.id in view.answers
    assert view.silent == {}


@pytest.mark.parametrize(
    ("changes", "proves_absent"),
    [
        ({"method_id": "card-of-ada"}, False),
        ({"method_id": "card-of-ada", "metadata": {ATTEMPT_KEY: None}}, False),
        ({"method_id": "card-of-ada", "status": PENDING}, False),
        ({"method_id": "card-of-ada", "status": CANCELED}, True),
        ({"method_id": "card-of-boris"}, True),
        ({"method_id": None}, True),
        ({"method_id": "card-of-ada", "id": "card-of-ada"}, True),
        ({"method_id": "card-of-ada", "metadata": {ATTEMPT_KEY: str(uuid.UUID(int=1))}}, True),
        ({"method_id": "card-of-ada", "metadata": {ATTEMPT_KEY: "garbled"}}, False),
    ],
)
def test_money_that_moved_by_the_same_card_in_nobodys_name_proves_no_attempt_absent(
    changes: dict[str, Any], proves_absent: bool
) -> None:
    attempt = a_sent_attempt()
    view = read_scan([attempt], [a_payment(**changes)], [])
    assert (attempt.id in view.scanned) is proves_absent
    assert (attempt.id in view.silent) is not proves_absent


def test_partial_views_add_up() -> None:
    a, b, c = (a_sent_attempt(number=number) for number in (1, 2, 3))
    extra = the_payment_of(a, id="2")
    merged = merge_views(
        [
            ProviderView({a.id: the_payment_of(a)}, frozenset({a.id}), {}, (extra,)),
            ProviderView({}, frozenset({b.id}), {}),
            ProviderView({}, frozenset(), {c.id: "silence"}),
        ]
    )
    assert merged == ProviderView({a.id: the_payment_of(a)}, frozenset({a.id, b.id}), {c.id: "silence"}, (extra,))
    assert merge_views([]) == ProviderView()


# --- What an answer makes of an attempt


def test_a_success_is_named_as_such_and_left_to_settling() -> None:
    assert judge_answer(the_payment_of(an_attempt())).state == State.SUCCEEDED


@pytest.mark.parametrize("status", [PENDING, WAITING_FOR_CAPTURE])
def test_an_unfinished_charge_is_pending_and_only_asked_about_from_then_on(status: str) -> None:
    assert judge_answer(the_payment_of(an_attempt(), status=status)).state == State.PENDING


@pytest.mark.parametrize("reason", [*declines.CLASSES, "a_new_reason", None])
def test_a_decline_stops_the_period_or_leaves_it_to_a_later_attempt(reason: str | None) -> None:
    outcome = judge_answer(a_decline(an_attempt(), reason))
    assert outcome.decline_class == declines.classify(reason)
    assert outcome.state == (State.STOPPED if outcome.decline_class in declines.STOPPING else State.DECLINED)
    assert (reason or "no reason given") in outcome.reason
    assert "payment_network" in outcome.reason


def test_a_hard_decline_stops_and_a_soft_one_does_not() -> None:
    assert judge_answer(a_decline(an_attempt(), "card_expired")).state == State.STOPPED
    assert judge_answer(a_decline(an_attempt(), "insufficient_funds")).state == State.DECLINED


def test_a_status_nobody_knows_is_no_outcome() -> None:
    with pytest.raises(ValueError, match="unknown status"):
        judge_answer(a_payment(status="almost"))


def test_an_answer_that_names_another_attempt_is_not_about_this_one() -> None:
    mine, other = an_attempt(number=1), an_attempt(number=2)
    assert not names_another_attempt(mine, the_payment_of(mine))
    assert names_another_attempt(mine, the_payment_of(other))
    assert names_another_attempt(mine, a_payment(metadata={ATTEMPT_KEY: "something else"}))
    # One that names none may be about it.
    assert not names_another_attempt(mine, a_payment())


@pytest.mark.parametrize("kept", [{}, {"user_id": "ada"}, {ATTEMPT_KEY: None}, {"cms_name": "sdk"}])
def test_an_answer_without_the_attempts_name_is_still_about_it(kept: dict[str, Any]) -> None:
    # Else a renewal that was paid would look like a stranger's purchase, and be charged again after two empty scans.
    attempt = an_attempt()
    answer = as_answer_to(attempt, a_payment(metadata=kept))
    assert answer.claims.renewal_attempt_id == attempt.id
    assert answer.metadata["user_id"] == "ada"
    whole = the_payment_of(attempt)
    assert as_answer_to(attempt, whole) == whole
    # What names another attempt keeps its name: it is not about this one.
    foreign = the_payment_of(an_attempt(number=2))
    assert as_answer_to(attempt, foreign) == foreign


# --- Attempts of earlier runs


def decide(attempt: Attempt, view: ProviderView = NOTHING_TOLD, due: Any = "still due", now: datetime = NOW) -> Any:
    return decide_open_attempt(attempt, view, a_due_subscription() if due == "still due" else due, now)


@pytest.mark.parametrize("status", [SUCCEEDED, CANCELED, PENDING, WAITING_FOR_CAPTURE])
@pytest.mark.parametrize("state", [State.PLANNED, State.UNKNOWN])
def test_what_a_search_has_found_is_concluded_as_if_it_had_answered(state: str, status: str) -> None:
    attempt = a_sent_attempt(state=state, ago=30 * HOUR)
    payment = the_payment_of(attempt, status=status)
    for due in ("still due", None):
        decision = decide(attempt, ProviderView({attempt.id: payment}), due)
        assert isinstance(decision, Conclude)
        assert (decision.attempt, decision.payment) == (attempt, payment)


@pytest.mark.parametrize(
    ("status", "concluded"), [(SUCCEEDED, True), (CANCELED, True), (PENDING, False), (WAITING_FOR_CAPTURE, False)]
)
def test_a_pending_attempt_is_concluded_when_it_is_finished_there_and_else_left(status: str, concluded: bool) -> None:
    attempt = a_sent_attempt(state=State.PENDING, ago=30 * HOUR, external_payment_id="renewal-1")
    decision = decide(attempt, ProviderView({attempt.id: the_payment_of(attempt, status=status)}))
    assert isinstance(decision, Conclude) is concluded
    assert concluded or not decision.needs_retry


@pytest.mark.parametrize("state", [State.PLANNED, State.UNKNOWN, State.PENDING])
def test_an_attempt_about_which_the_provider_was_silent_is_left_and_makes_the_run_red(state: str) -> None:
    attempt = a_sent_attempt(state=state, ago=30 * HOUR)
    decision = decide(attempt, ProviderView(silent={attempt.id: "HTTP 502"}))
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
    assert isinstance(decide(attempt, view, "still due" if due else None), NotCharged)


def test_an_attempt_that_was_never_sent_is_sent_with_the_same_key_later() -> None:
    attempt = an_attempt()
    decision = decide(attempt, now=NOW + 20 * DAY)
    assert isinstance(decision, Resend)
    assert decision.attempt == attempt


def test_an_attempt_that_was_never_sent_is_closed_when_its_period_is_not_due_any_more() -> None:
    moved = a_due_subscription(ended_at=a_due_subscription().ended_at - DAY)
    for due in (None, moved):
        assert isinstance(decide(an_attempt(), due=due), Void)


@pytest.mark.parametrize("state", [State.PLANNED, State.UNKNOWN])
@pytest.mark.parametrize("ago", [timedelta(0), HOUR, 23 * HOUR - SECOND])
def test_an_unknown_outcome_younger_than_23_hours_is_asked_by_the_same_key_and_body(state: str, ago: timedelta) -> None:
    attempt = a_sent_attempt(state=state, ago=ago)
    decision = decide(attempt)
    assert isinstance(decision, Resend)
    assert (decision.attempt.idempotence_key, decision.attempt.body) == (attempt.idempotence_key, attempt.body)


def test_an_unknown_outcome_is_not_sent_again_for_what_nobody_wants_any_more() -> None:
    # Renewed, canceled or paused meanwhile: what became of it is searched later.
    moved = a_due_subscription(ended_at=a_due_subscription().ended_at + DAY)
    for due in (None, moved):
        decision = decide(a_sent_attempt(), due=due)
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
    decision = decide(attempt, view, "still due" if due else None)
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
        assert type(decide(attempt, ProviderView(scanned=frozenset({attempt.id})))) is decided


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
    decision = decide(attempt, view, "still due" if due else None)
    if isinstance(decision, Resend):
        assert due
        assert state != State.PENDING
        assert sent is None or sent < KEY_LIFETIME
    if isinstance(decision, Void):
        assert state != State.PENDING
        assert sent is None or (told == "scanned" and absent_for is not None and absent_for >= SCAN_DISTANCE)
