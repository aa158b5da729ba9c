"""Attempts in SQL: at most one live attempt of a period, looked at again under lock, sent only while its key lives."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from functools import partial
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from billing_orchestration.database.attempts import (
    Claimed,
    by_ids,
    claim,
    close,
    in_hand,
    open_and_claim,
    open_attempts,
    try_lock,
    unlock,
)
from billing_orchestration.database.audit import Problem, open_problems
from billing_orchestration.database.engine import create_engine
from billing_orchestration.domain.answers import Closing
from billing_orchestration.domain.attempts import ALL_STATES, KEY_LIFETIME, LIVE, OPEN, TAKEN, Attempt, State
from billing_orchestration.domain.problem_kinds import ProblemKind
from billing_orchestration_tests.books import NOON, Books, naive
from billing_orchestration_tests.domain.given import SHOP, an_attempt
from billing_orchestration_tests.waiting import at_once, start_blocked, wait_until

A_DAY = timedelta(days=1)
AN_HOUR = timedelta(hours=1)
TICK = timedelta(microseconds=1)
CLOSED_STATES = sorted(set(ALL_STATES) - set(OPEN))


def begin(books: Books, *attempts: Attempt) -> set[uuid.UUID]:
    with books.engine.begin() as connection:
        return set(open_and_claim(connection, books.stamp(), attempts).sent_before)


def send_again(
    books: Books, *attempts: Attempt, oldest_key: datetime = NOON - KEY_LIFETIME, done_before: datetime = NOON
) -> Mapping[uuid.UUID, bool]:
    with books.engine.begin() as connection:
        claimed = claim(connection, books.stamp(), [attempt.id for attempt in attempts], oldest_key, done_before, SHOP)
    return dict(claimed.sent_before)


def look(books: Books, *attempts: Attempt) -> Claimed:
    with books.engine.begin() as connection:
        return open_and_claim(connection, books.stamp(), attempts)


def look_again(books: Books, *attempts: Attempt) -> Claimed:
    with books.engine.begin() as connection:
        return claim(connection, books.stamp(), [attempt.id for attempt in attempts], NOON - KEY_LIFETIME, NOON, SHOP)


def a_problem(books: Books, kind: ProblemKind, *, payment_id: str | None = None, **about: Any) -> int:
    """An open quarantine entry; its id."""
    with books.engine.begin() as connection:
        open_problems(connection, books.stamp(), [Problem("it", kind, "odd", external_payment_id=payment_id, **about)])
    return int(books.rows("quarantine")[-1].id)


def ignore(books: Books, entry_id: int) -> None:
    books.execute(
        "UPDATE billing_orchestration.quarantine SET resolved_at = now(), resolution = 'ignored' WHERE id = :id",
        id=entry_id,
    )


def conclude(books: Books, *closings: Closing) -> set[uuid.UUID]:
    with books.engine.begin() as connection:
        return close(connection, books.stamp(), closings)


def row(books: Books, attempt: Attempt) -> Any:
    (found,) = books.rows("renewal_attempts", "id = :id", id=attempt.id)
    return found


@pytest.mark.parametrize("shop_id", ["another shop", None], ids=["another shop", "nobody wrote it down"])
def test_an_attempt_is_sent_again_by_the_shop_that_it_names_and_by_no_other(books: Books, shop_id: str | None) -> None:
    ours = books.attempt(books.subscription())
    other = books.attempt(books.subscription(), shop_id=shop_id)
    assert send_again(books, ours, other) == {ours.id: True}
    assert row(books, other).sends == 1


# Opening


@pytest.mark.parametrize("sent", [False, True], ids=["a first send", "another send"])
def test_an_attempt_of_another_shop_is_not_claimed(books: Books, sent: bool) -> None:
    subscription = books.subscription()
    attempt = books.attempt(subscription) if sent else books.planned(subscription)
    with books.engine.begin() as connection:
        other = books.provider_id + 1
        connection.execute(sa.text(f"SET LOCAL billing_orchestration.provider_ids = '{other}'"))
        if sent:
            claimed = claim(connection, books.stamp(), [attempt.id], NOON - KEY_LIFETIME, NOON, SHOP)
        else:
            claimed = open_and_claim(connection, books.stamp(), [attempt])
    assert claimed.sent_before == {}
    assert claimed.held == {attempt.id: f"payment provider {books.provider_id} is not this shop's"}


def test_what_is_written_ahead_is_all_that_the_next_run_needs(books: Books) -> None:
    ended_at = NOON - 2 * A_DAY + TICK
    subscription_id = books.subscription("Ёлка 😀", plan_id=books.plan("0.10"), ended_at=ended_at)
    planned = books.planned(subscription_id, method="card", amount="0.10")
    assert begin(books, planned) == {planned.id}
    assert books.read_attempt(planned.id) == replace(planned, first_sent_at=NOON, last_sent_at=NOON, sends=1)
    written = row(books, planned)
    assert written.period_start == naive(ended_at)
    assert (written.planned_at, written.run_id, written.state) == (NOON, "run", State.PLANNED)
    assert written.amount == Decimal("0.10")


def test_a_period_start_in_another_zone_is_the_same_period(books: Books) -> None:
    planned = books.planned(books.subscription())
    elsewhere = replace(planned, period_start=planned.period_start.astimezone(timezone(timedelta(hours=5))))
    assert begin(books, elsewhere) == {planned.id}
    assert begin(books, planned) == set()
    assert row(books, planned).period_start == naive(NOON)


CHANGES = {
    "renewed": "UPDATE subscriptions SET ended_at = ended_at + interval '1 month'",
    "moved by a microsecond": "UPDATE subscriptions SET ended_at = ended_at + interval '1 microsecond'",
    "without an end": "UPDATE subscriptions SET ended_at = NULL",
    "canceled": "UPDATE subscriptions SET status = 'CANCELED'",
    "paused": "UPDATE subscriptions SET status = 'PAUSED'",
    "expired": "UPDATE subscriptions SET status = 'EXPIRED'",
    "without a status": "UPDATE subscriptions SET status = NULL",
    "without a plan": "UPDATE subscriptions SET plan_id = NULL",
    "given to another user": "UPDATE subscriptions SET user_id = 'somebody else'",
    "gone": "DELETE FROM subscriptions",
}


OF_THE_PLAN = {
    "recurring switched off": "UPDATE plans SET is_recurring = false",
    "a price corrected": "UPDATE prices SET amount = 298",
    "a second price": "INSERT INTO prices (plan_id, currency, amount) SELECT plan_id, currency, 1 FROM prices",
    "no price any more": "DELETE FROM prices",
    "another period": "UPDATE plans SET duration_unit = 'year'",
    "no period": "UPDATE plans SET duration = NULL",
}


@pytest.mark.parametrize("change", OF_THE_PLAN.values(), ids=OF_THE_PLAN.keys())
@pytest.mark.parametrize("again", [False, True], ids=["first send", "sent again"])
def test_a_subscription_whose_plan_has_changed_is_not_charged(books: Books, change: str, again: bool) -> None:
    subscription_id = books.subscription()
    attempt = books.attempt(subscription_id) if again else books.planned(subscription_id)
    books.execute(change)
    assert not (send_again(books, attempt) if again else begin(books, attempt))
    assert [found.sends for found in books.rows("renewal_attempts")] == ([1] if again else [])


def test_a_price_in_another_currency_changes_nothing(books: Books) -> None:
    planned = books.planned(books.subscription())
    books.execute("INSERT INTO prices (plan_id, currency, amount) SELECT plan_id, 'EUR', 3 FROM prices")
    assert begin(books, planned) == {planned.id}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("again", [False, True], ids=["first send", "sent again"])
def test_a_subscription_that_changed_is_not_charged(books: Books, change: str, again: bool) -> None:
    subscription_id = books.subscription()
    attempt = books.attempt(subscription_id) if again else books.planned(subscription_id)
    books.execute(change)
    assert not (send_again(books, attempt) if again else begin(books, attempt))
    assert [found.sends for found in books.rows("renewal_attempts")] == ([1] if again else [])


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("again", [False, True], ids=["first send", "sent again"])
def test_a_change_that_is_being_committed_is_waited_for(
    books: Books, database_url: str, change: str, again: bool
) -> None:
    subscription_id = books.subscription()
    attempt = books.attempt(subscription_id) if again else books.planned(subscription_id)
    work = partial(send_again if again else begin, books, attempt)
    with ThreadPoolExecutor() as pool, psycopg.connect(database_url) as service:
        service.execute(change.encode())
        waiting = start_blocked(pool, books.engine, work)
        service.commit()
        assert not waiting.result()


def test_a_change_that_is_taken_back_lets_the_charge_go_on(books: Books, database_url: str) -> None:
    planned = books.planned(books.subscription())
    with ThreadPoolExecutor() as pool, psycopg.connect(database_url) as service:
        service.execute(b"UPDATE subscriptions SET status = 'CANCELED'")
        waiting = start_blocked(pool, books.engine, partial(begin, books, planned))
        service.rollback()
        assert waiting.result() == {planned.id}


def test_a_cancellation_that_comes_while_the_attempt_is_waited_for_counts(books: Books, database_url: str) -> None:
    attempt = books.attempt(books.subscription())
    with ThreadPoolExecutor() as pool, psycopg.connect(database_url) as other:
        other.execute(b"UPDATE billing_orchestration.renewal_attempts SET last_error = 'written by another'")
        waiting = start_blocked(pool, books.engine, partial(send_again, books, attempt))
        books.execute(CHANGES["canceled"])
        other.commit()
        assert waiting.result() == {}


def test_one_that_may_not_be_charged_does_not_stop_the_others(books: Books) -> None:
    planned = [books.planned(books.subscription()) for _ in range(5)]
    books.execute("UPDATE subscriptions SET status = 'CANCELED' WHERE id = :id", id=planned[2].subscription_id)
    assert begin(books, *planned) == {attempt.id for attempt in planned} - {planned[2].id}


@pytest.mark.parametrize("state", LIVE)
def test_a_period_with_a_live_attempt_gets_no_second_one(books: Books, state: str) -> None:
    subscription_id = books.subscription()
    books.attempt(subscription_id, state=state)
    assert begin(books, books.planned(subscription_id, number=2)) == set()


@pytest.mark.parametrize("state", sorted(set(ALL_STATES) - set(LIVE)))
def test_a_period_whose_attempts_are_closed_unpaid_gets_a_new_number_but_not_an_old_one(
    books: Books, state: str
) -> None:
    subscription_id = books.subscription()
    books.attempt(subscription_id, state=state)
    assert begin(books, books.planned(subscription_id, number=1)) == set()
    second = books.planned(subscription_id, number=2)
    assert begin(books, second) == {second.id}


def test_the_database_itself_refuses_a_second_live_attempt_of_a_period(books: Books) -> None:
    subscription_id = books.subscription()
    for live in LIVE:
        first = books.attempt(subscription_id, state=State.SUCCEEDED)
        with pytest.raises(sa.exc.IntegrityError, match="renewal_attempts_one_live_per_period"):
            books.attempt(subscription_id, state=live, number=2)
        books.execute("DELETE FROM billing_orchestration.renewal_attempts WHERE id = :id", id=first.id)


BLOCKING = [*OPEN, State.REVIEW]
AGAIN = pytest.mark.parametrize("again", [False, True], ids=["first send", "sent again"])


@AGAIN
@pytest.mark.parametrize("state", BLOCKING)
def test_a_subscription_whose_end_was_moved_while_a_charge_was_open_or_in_review_is_not_charged(
    books: Books, state: str, again: bool
) -> None:
    subscription_id = books.subscription()
    first = books.attempt(subscription_id, state=state)
    books.execute("UPDATE subscriptions SET ended_at = ended_at + interval '1 day'")
    second = books.attempt(subscription_id) if again else books.planned(subscription_id)
    assert second.id != first.id
    looked = look_again(books, second) if again else look(books, second)
    assert looked.held == {second.id: "an attempt for another period of it is open or in review"}
    books.execute("UPDATE billing_orchestration.renewal_attempts SET state = 'VOID' WHERE id = :id", id=first.id)
    assert second.id in (look_again(books, second) if again else look(books, second)).sent_before


def test_what_a_person_ignored_blocks_only_its_own_period(books: Books) -> None:
    subscription_id = books.subscription()
    first = books.attempt(subscription_id, state=State.REVIEW, external_payment_id="odd")
    entry = a_problem(books, "amount_differs", payment_id="odd", attempt_id=first.id)
    books.execute("UPDATE subscriptions SET ended_at = ended_at + interval '1 month'")
    second = books.planned(subscription_id)
    assert begin(books, second) == set()
    ignore(books, entry)
    assert begin(books, second) == {second.id}


@AGAIN
@pytest.mark.parametrize(("moved_back", "charged"), [(TICK, False), (20 * A_DAY, False), (0 * TICK, True)])
def test_no_period_begins_before_the_end_of_one_that_was_settled(
    books: Books, again: bool, moved_back: timedelta, charged: bool
) -> None:
    subscription_id = books.subscription("anna")
    books.settle(books.paid(user="anna"))
    books.execute("UPDATE subscriptions SET ended_at = ended_at - :back", back=moved_back)
    attempt = books.attempt(subscription_id) if again else books.planned(subscription_id)
    looked = look_again(books, attempt) if again else look(books, attempt)
    assert (attempt.id in looked.sent_before) == charged
    assert charged or looked.held == {attempt.id: "a period that was settled ends later"}


@AGAIN
def test_an_open_quarantine_entry_about_an_attempt_holds_it(books: Books, again: bool) -> None:
    subscription_id = books.subscription()
    attempt = books.attempt(subscription_id) if again else books.planned(subscription_id)
    entry = a_problem(books, "unknown_attempt", payment_id="lost", attempt_id=attempt.id)
    looked = look_again(books, attempt) if again else look(books, attempt)
    assert looked.held == {attempt.id: "an open quarantine entry is about this charge"}
    ignore(books, entry)
    assert attempt.id in (look_again(books, attempt) if again else look(books, attempt)).sent_before


def test_a_paid_attempt_that_our_records_have_lost_holds_its_subscription_whatever_its_number(books: Books) -> None:
    subscription_id, other = books.subscription(), books.subscription()
    lost = books.planned(subscription_id, number=2)
    a_problem(books, "unknown_attempt", payment_id="lost", attempt_id=lost.id, subscription_id=subscription_id)
    a_problem(books, "rejected", attempt_id=books.planned(other, number=1).id, subscription_id=other)
    assert begin(books, books.planned(subscription_id)) == set()
    # A refusal that a person looks at says nothing about the next try.
    second = books.planned(other, number=2)
    assert begin(books, second) == {second.id}


@pytest.mark.parametrize(
    ("state", "held"), [(None, True), ("VOID", True), ("UNKNOWN", False), ("SUCCEEDED", False), ("REFUNDED", False)]
)
def test_an_unreadable_record_holds_its_subscription_unless_our_records_have_its_charge_in_hand(
    books: Books, state: str | None, held: bool
) -> None:
    # The end has been moved on since, so that the named attempt is of another period.
    subscription_id = books.subscription(ended_at=NOON - A_DAY)
    named = books.planned(subscription_id)
    if state is not None:
        books.attempt(subscription_id, state=state)
    books.execute("UPDATE subscriptions SET ended_at = :noon", noon=naive(NOON))
    a_problem(books, "unreadable", payment_id="odd", attempt_id=named.id, subscription_id=subscription_id)
    looked = look(books, books.planned(subscription_id))
    assert ("an open quarantine entry is about this charge" in looked.held.values()) == held


@AGAIN
@pytest.mark.parametrize("state", sorted(set(ALL_STATES) - {*OPEN, *TAKEN}))
def test_a_success_beside_another_attempt_holds_its_period_once_that_one_is_closed_unpaid(
    books: Books, state: str, again: bool
) -> None:
    subscription_id = books.subscription()
    paid = books.attempt(subscription_id, state=State.VOID)
    books.attempt(subscription_id, number=2, state=state)
    entry = a_problem(books, "second_success", payment_id="p", attempt_id=paid.id, subscription_id=subscription_id)
    third = books.attempt(subscription_id, number=3) if again else books.planned(subscription_id, number=3)
    looked = look_again(books, third) if again else look(books, third)
    assert looked.held == {third.id: "an open quarantine entry is about this charge"}
    ignore(books, entry)
    assert third.id in (look_again(books, third) if again else look(books, third)).sent_before


@pytest.mark.parametrize("state", [State.SUCCEEDED, State.REFUNDED])
@pytest.mark.parametrize("of_itself", [False, True], ids=["another attempt", "the same attempt"])
def test_a_second_success_of_a_period_that_is_granted_does_not_hold_the_next(
    books: Books, state: str, of_itself: bool
) -> None:
    subscription_id = books.subscription(ended_at=NOON - A_DAY)
    named = taken = books.attempt(subscription_id, state=state if of_itself else State.VOID)
    if not of_itself:
        taken = books.attempt(subscription_id, number=2, state=state)
    a_problem(books, "second_success", payment_id="p", attempt_id=named.id, subscription_id=subscription_id)
    books.execute("UPDATE subscriptions SET ended_at = :noon", noon=naive(NOON))
    following = books.planned(subscription_id)
    assert following.period_start != taken.period_start
    assert begin(books, following) == {following.id}


def test_an_unreadable_record_does_not_keep_its_attempt_from_being_sent_again_with_its_key(books: Books) -> None:
    attempt = books.attempt(books.subscription())
    a_problem(books, "unreadable", payment_id="odd", attempt_id=attempt.id, subscription_id=attempt.subscription_id)
    assert look_again(books, attempt).sent_before == {attempt.id: True}


@pytest.mark.parametrize(
    ("other_end", "charged"),
    [(NOON + TICK, False), (NOON, False), (None, False), ("infinity", False), (NOON - TICK, True)],
)
@AGAIN
def test_of_two_active_subscriptions_of_one_user_and_plan_only_the_one_that_ends_last_is_charged(
    books: Books, other_end: Any, charged: bool, again: bool
) -> None:
    subscription_id = books.subscription("anna", ended_at=NOON)
    attempt = books.attempt(subscription_id) if again else books.planned(subscription_id)
    books.subscription("anna", ended_at=other_end)
    looked = look_again(books, attempt) if again else look(books, attempt)
    assert (attempt.id in looked.sent_before) == charged
    assert charged or "another ACTIVE subscription" in looked.held[attempt.id]


def test_another_users_plans_or_ended_subscription_stands_in_nobodys_way(books: Books) -> None:
    planned = books.planned(books.subscription("anna", ended_at=NOON))
    later = NOON + A_DAY
    books.subscription("berta", ended_at=later)
    books.subscription("anna", ended_at=later, plan_id=books.plan())
    books.subscription("anna", ended_at=later, status="EXPIRED")
    assert begin(books, planned) == {planned.id}


@pytest.mark.parametrize("kind", ["entry", "review"])
def test_what_is_found_while_the_subscription_is_waited_for_holds_the_charge(
    books: Books, database_url: str, kind: str
) -> None:
    """A settler that holds the subscription writes an entry, or puts an older attempt into review."""
    subscription_id = books.subscription()
    older = books.attempt(subscription_id, state=State.VOID)
    books.execute("UPDATE subscriptions SET ended_at = ended_at + interval '1 day'")
    planned = books.planned(subscription_id)
    with ThreadPoolExecutor() as pool, psycopg.connect(database_url) as settler:
        settler.execute(b"SELECT FROM subscriptions FOR NO KEY UPDATE")
        charging = start_blocked(pool, books.engine, partial(begin, books, planned))
        if kind == "entry":
            a_problem(books, "unknown_attempt", payment_id="lost", attempt_id=planned.id)
        else:
            books.execute(
                "UPDATE billing_orchestration.renewal_attempts SET state = 'REVIEW' WHERE id = :id", id=older.id
            )
        settler.commit()
        assert charging.result() == set()


def test_of_eight_runs_that_open_the_same_attempts_one_gets_each(books: Books) -> None:
    planned = [books.planned(books.subscription()) for _ in range(25)]
    rival = [books.planned(attempt.subscription_id, number=2) for attempt in planned]
    opened = at_once([partial(begin, books, *(planned if n % 2 else reversed(rival))) for n in range(8)])
    assert len([id_ for ids in opened for id_ in ids]) == 25
    assert len(books.rows("renewal_attempts")) == 25


# Sending again


@pytest.mark.parametrize("state", [State.PLANNED, State.UNKNOWN])
def test_an_attempt_that_is_sent_again_keeps_its_first_instant(books: Books, state: str) -> None:
    attempt = books.attempt(books.subscription(), state=state, first_sent_at=NOON - 2 * AN_HOUR)
    assert send_again(books, attempt) == {attempt.id: True}
    found = row(books, attempt)
    assert (found.first_sent_at, found.last_sent_at, found.sends) == (NOON - 2 * AN_HOUR, NOON, 2)


def test_an_attempt_that_was_never_sent_gets_its_first_instant(books: Books) -> None:
    attempt = books.attempt(books.subscription(), state=State.PLANNED, first_sent_at=None)
    assert send_again(books, attempt) == {attempt.id: False}
    found = row(books, attempt)
    assert (found.first_sent_at, found.last_sent_at, found.sends) == (NOON, NOON, 1)


@pytest.mark.parametrize(("age", "sent"), [(KEY_LIFETIME - TICK, True), (KEY_LIFETIME, False), (90 * A_DAY, False)])
def test_a_key_of_23_hours_is_never_sent_again(books: Books, age: timedelta, sent: bool) -> None:
    attempt = books.attempt(books.subscription(), first_sent_at=NOON - age)
    assert bool(send_again(books, attempt)) == sent
    assert row(books, attempt).sends == 1 + sent


@pytest.mark.parametrize(
    ("first", "last", "absent", "sent"),
    [
        (NOON + timedelta(minutes=2), None, None, True),
        (NOON + timedelta(minutes=3), None, None, False),
        (NOON - A_DAY / 24, NOON + timedelta(minutes=3), None, False),
        (NOON - A_DAY / 24, None, NOON - A_DAY / 12, False),
    ],
)
def test_a_key_that_a_wrong_clock_has_sent_is_never_sent_again(
    books: Books, first: datetime, last: datetime | None, absent: datetime | None, sent: bool
) -> None:
    attempt = books.attempt(
        books.subscription(), first_sent_at=first, last_sent_at=last or first, first_absent_at=absent
    )
    assert bool(send_again(books, attempt)) == sent


@pytest.mark.parametrize("state", [State.PENDING, *CLOSED_STATES])
def test_only_a_planned_or_unknown_attempt_is_sent_again(books: Books, state: str) -> None:
    attempt = books.attempt(books.subscription(), state=state)
    assert send_again(books, attempt) == {}


def test_a_success_that_is_settled_meanwhile_is_not_sent_again(books: Books, database_url: str) -> None:
    attempt = books.attempt(books.subscription())
    with ThreadPoolExecutor() as pool, psycopg.connect(database_url) as gate:
        gate.execute(b"SELECT FROM subscriptions FOR UPDATE")
        settling = start_blocked(pool, books.engine, partial(books.settle, books.renewal(attempt)))
        sending = start_blocked(pool, books.engine, partial(send_again, books, attempt), waiting=2)
        gate.commit()
        settling.result()
        assert sending.result() == {}


SECONDS_45 = timedelta(seconds=45)


@pytest.mark.parametrize(
    ("told", "waits"),
    [
        (None, True),
        (Closing(an_attempt(), State.UNKNOWN, "the connection was cut", unanswered=True), True),
        (Closing(an_attempt(), State.UNKNOWN, "a first absence"), True),
        (Closing(an_attempt(), State.UNKNOWN, "HTTP 500", unanswered=False), False),
        (Closing(an_attempt(), State.PLANNED, "withheld", unanswered=False), False),
    ],
    ids=["killed", "cut", "searched", "answered", "never left"],
)
def test_a_send_without_an_answer_is_not_repeated_before_the_provider_can_have_finished(
    books: Books, told: Closing | None, waits: bool
) -> None:
    planned, other = (books.planned(books.subscription()) for _ in range(2))
    begin(books, planned)
    if told is not None:
        conclude(books, replace(told, attempt=planned))
    answered = books.attempt(other.subscription_id)

    with books.engine.begin() as connection:
        ids = [planned.id, answered.id]
        early = claim(connection, books.stamp(), ids, NOON - KEY_LIFETIME, NOON - SECONDS_45, SHOP)
        connection.rollback()
    assert early.at_work_s.keys() == ({planned.id} if waits else set())
    assert early.sent_before == ({answered.id: True} if waits else {planned.id: True, answered.id: True})
    assert send_again(books, planned, done_before=NOON) == {planned.id: True}
    # And so is each further send.
    assert send_again(books, planned, done_before=NOON - TICK) == {}


def test_sending_nothing_is_no_work(books: Books) -> None:
    assert begin(books) == set()
    assert send_again(books) == {}
    assert conclude(books) == set()


# Closing


@pytest.mark.parametrize("state", [State.DECLINED, State.STOPPED, State.REJECTED, State.VOID])
@pytest.mark.parametrize("before", OPEN)
def test_an_open_attempt_is_closed_with_all_that_was_said(books: Books, before: str, state: str) -> None:
    attempt = books.attempt(books.subscription(), state=before)
    closing = Closing(attempt, state, "declined by the bank", "canceled one", "payment_network", "card_expired", "hard")
    assert conclude(books, closing) == {attempt.id}
    found = row(books, attempt)
    assert (found.state, found.last_error, found.external_payment_id) == (state, "declined by the bank", "canceled one")
    assert (found.decline_party, found.decline_reason, found.decline_class) == (
        "payment_network",
        "card_expired",
        "hard",
    )
    assert (found.closed_at, found.first_sent_at) == (NOON, NOON - AN_HOUR)
    (entry,) = books.rows("audit_trail")
    assert (entry.entity, entry.entity_id, entry.action) == ("attempt", str(attempt.id), state.lower())
    assert (entry.old, entry.new["state"]) == ({"state": before}, state)
    assert (entry.reason, entry.external_payment_id) == ("declined by the bank", "canceled one")


@pytest.mark.parametrize("state", CLOSED_STATES)
def test_what_is_closed_stays_as_it_is(books: Books, state: str) -> None:
    attempt = books.attempt(books.subscription(), state=state)
    before = books.snapshot()
    assert (
        conclude(
            books,
            Closing(attempt, State.UNKNOWN, "late answer", "p"),
        )
        == set()
    )
    assert conclude(books, Closing(attempt, State.DECLINED, "late answer", "p", never_sent=True)) == set()
    assert books.snapshot() == before


def test_an_attempt_that_stays_open_has_no_end_and_a_new_word_is_no_change(books: Books) -> None:
    attempt = books.attempt(books.subscription())
    assert conclude(books, Closing(attempt, State.UNKNOWN, "silence")) == {attempt.id}
    assert (row(books, attempt).last_error, row(books, attempt).closed_at) == ("silence", None)
    assert books.rows("audit_trail") == []
    assert conclude(books, Closing(attempt, State.PENDING, "pending", "p")) == {attempt.id}
    assert [entry.action for entry in books.rows("audit_trail")] == ["pending"]
    # The payment's id is not forgotten by an answer without one.
    conclude(books, Closing(attempt, State.PENDING, "still pending"))
    assert row(books, attempt).external_payment_id == "p"


def test_a_claim_that_never_left_this_machine_is_withdrawn(books: Books) -> None:
    planned = books.planned(books.subscription())
    begin(books, planned)
    conclude(books, Closing(planned, State.PLANNED, "refused connection", never_sent=True))
    found = row(books, planned)
    assert (found.state, found.first_sent_at, found.last_sent_at) == (State.PLANNED, None, None)
    assert not books.read_attempt(planned.id).may_have_been_sent


def test_the_first_absence_is_noted_with_its_instant(books: Books) -> None:
    attempt = books.attempt(books.subscription())
    conclude(books, Closing(attempt, State.UNKNOWN, "not found", absent_since=NOON))
    conclude(books, Closing(attempt, State.UNKNOWN, "silence"))
    assert books.read_attempt(attempt.id).first_absent_at == NOON
    assert len(books.rows("audit_trail")) == 1


def test_an_attempt_that_was_sent_since_it_was_read_is_not_closed_as_read(books: Books) -> None:
    attempt = books.attempt(books.subscription(), state=State.PLANNED, first_sent_at=None)
    send_again(books, attempt)
    assert conclude(books, Closing(attempt, State.VOID, "the price has changed", as_read=True)) == set()
    now = books.read_attempt(attempt.id)
    assert conclude(books, Closing(now, State.VOID, "the price has changed", as_read=True)) == {attempt.id}


def test_a_success_that_is_settled_first_is_not_overwritten_by_a_late_decline(books: Books, database_url: str) -> None:
    attempt = books.attempt(books.subscription())
    with ThreadPoolExecutor() as pool, psycopg.connect(database_url) as gate:
        gate.execute(b"SELECT FROM subscriptions FOR UPDATE")
        settling = start_blocked(pool, books.engine, partial(books.settle, books.renewal(attempt)))
        closing = Closing(attempt, State.DECLINED, "declined", "another")
        closing_it = start_blocked(pool, books.engine, partial(conclude, books, closing), waiting=2)
        gate.commit()
        settling.result()
        assert closing_it.result() == set()
    assert books.read_attempt(attempt.id).state == State.SUCCEEDED


# Reading


def test_open_attempts_are_read_whatever_became_of_their_subscription(books: Books) -> None:
    attempts = [books.attempt(books.subscription(f"user {state}"), state=state) for state in ALL_STATES]
    books.execute("DELETE FROM subscriptions WHERE user_id = 'user PENDING'")
    books.execute("UPDATE subscriptions SET ended_at = 'infinity', started_at = '-infinity'")
    with books.engine.connect() as connection:
        found = open_attempts(connection)
        assert by_ids(connection, []) == {}
    assert {attempt.id for attempt in found} == {attempt.id for attempt in attempts if attempt.state in OPEN}


# Locks of sessions


def session(books: Books) -> sa.Connection:
    return books.engine.connect().execution_options(isolation_level="AUTOCOMMIT")


def test_of_two_sessions_one_gets_each_lock(books: Books) -> None:
    ids = [uuid.uuid4() for _ in range(10)]
    with session(books) as one, session(books) as two:
        assert try_lock(one, ids[:6]) == set(ids[:6])
        assert try_lock(two, ids) == set(ids[6:])
        unlock(one, ids[:3])
        assert try_lock(two, ids[:6]) == set(ids[:3])
        unlock(one, ids)
        unlock(two, ids)
        assert try_lock(two, []) == set()


def test_locks_end_with_their_session_however_it_ends(books: Books, database_url: str) -> None:
    id_ = uuid.uuid4()
    other = create_engine(database_url)
    lost = other.connect().execution_options(isolation_level="AUTOCOMMIT")
    assert try_lock(lost, [id_])
    pid = lost.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
    with session(books) as mine:
        assert try_lock(mine, [id_]) == set()
        # As when the process that holds it is killed.
        books.execute("SELECT pg_terminate_backend(:pid)", pid=pid)
        wait_until(lambda: try_lock(mine, [id_]), "the lock of the lost session becomes free")
        unlock(mine, [id_])
    lost.invalidate()
    lost.close()
    other.dispose()


def test_a_lock_is_not_held_by_a_transaction(books: Books) -> None:
    id_ = uuid.uuid4()
    with session(books) as one, session(books) as two:
        try_lock(one, [id_])
        one.execute(sa.text("SELECT 1"))
        assert (
            one.execute(sa.text("SELECT state FROM pg_stat_activity WHERE pid = pg_backend_pid()")).scalar() == "active"
        )
        assert try_lock(two, [id_]) == set()
        unlock(one, [id_])


@pytest.mark.parametrize("state", ALL_STATES)
@pytest.mark.parametrize("sent", [True, False], ids=["sent", "never sent"])
def test_an_attempt_is_in_hand_when_our_records_know_that_it_may_have_charged(
    books: Books, state: str, sent: bool
) -> None:
    attempt = books.attempt(books.subscription(), state=state, first_sent_at=NOON if sent else None)
    with books.engine.connect() as connection:
        found = in_hand(connection, [attempt.id, an_attempt().id])
    assert found == {attempt.id: state in set(LIVE) - set(OPEN) or (sent and state in OPEN)}
