"""The slice of what is due: one statement's worth of facts for each subscription, whatever is in its neighbours."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa

from billing_orchestration.database.renewals import DueSlice, fetch_due
from billing_orchestration.domain.attempts import State
from billing_orchestration.domain.methods import PAYMENT, OlderMethod, Question
from billing_orchestration.domain.renewals import DueSubscription, Holds
from billing_orchestration.domain.shards import Shard, divide
from billing_orchestration_tests.books import NOON, UTC, Books, naive

A_DAY = timedelta(days=1)
TICK = timedelta(microseconds=1)
# The billing day of NOON, in UTC.
TODAY = datetime(2026, 3, 12, tzinfo=UTC)
TONIGHT = TODAY + A_DAY
OLDEST = TODAY - 30 * A_DAY


def fetch(
    books: Books, *, over_before: datetime = TONIGHT, oldest: datetime = OLDEST, shard: Shard | None = None
) -> DueSlice:
    with books.engine.connect() as connection:
        return fetch_due(connection, over_before=over_before, oldest=oldest, today=TODAY, shard=shard)


def due(books: Books, subscription_id: int) -> DueSubscription:
    return {subscription.id: subscription for subscription in fetch(books).due}[subscription_id]


def ids(found: DueSlice) -> list[int]:
    return [subscription.id for subscription in found.due]


# Which


def test_due_is_active_and_ended_before_tonight_the_earliest_first(books: Books) -> None:
    late = books.subscription(ended_at=TONIGHT - TICK)
    early = books.subscription(ended_at=OLDEST)
    books.subscription(ended_at=TONIGHT)
    books.subscription(ended_at="infinity")
    for status in ("CREATED", "EXPIRED", "CANCELED", "PAUSED", "DELETED", None):
        books.subscription(status=status)
    found = fetch(books)
    assert ids(found) == [early, late]
    assert (found.too_old, found.not_recurring, found.without_end) == (0, 0, 0)


def test_what_ended_too_long_ago_is_counted_and_not_fetched(books: Books) -> None:
    for ended_at in (OLDEST - TICK, "-infinity", "4713-01-01 BC", "0001-01-01"):
        books.subscription(ended_at=ended_at)
    books.subscription(ended_at=OLDEST - A_DAY, plan_id=None)
    books.subscription(ended_at=OLDEST - A_DAY, plan_id=books.plan(recurring=False))
    found = fetch(books)
    assert (ids(found), found.too_old, found.not_recurring) == ([], 5, 1)
    assert len(found.too_old_examples) == 5
    assert found.too_old_examples[-1][1] == "-infinity"


def test_without_an_end_nothing_is_due_and_it_is_counted(books: Books) -> None:
    books.subscription(ended_at=None)
    books.subscription(ended_at=None, status="EXPIRED")
    found = fetch(books)
    assert (ids(found), found.without_end) == ([], 1)


@pytest.mark.parametrize("recurring", [False, None])
def test_a_plan_that_does_not_recur_is_counted_and_not_fetched(books: Books, recurring: bool | None) -> None:
    books.subscription(plan_id=books.plan(recurring=recurring))
    found = fetch(books)
    assert (ids(found), found.not_recurring) == ([], 1)


def test_a_subscription_without_a_plan_is_fetched_to_be_reported(books: Books) -> None:
    subscription = due(books, books.subscription(plan_id=None))
    assert (subscription.plan_id, subscription.plan_duration, subscription.prices) == (None, None, ())


def test_bounds_mean_the_same_instant_in_every_zone(books: Books) -> None:
    inside = books.subscription(ended_at=TONIGHT - TICK)
    books.subscription(ended_at=TONIGHT)
    zone = timezone(timedelta(hours=-9, minutes=-30))
    found = fetch(books, over_before=TONIGHT.astimezone(zone), oldest=OLDEST.astimezone(zone))
    assert ids(found) == [inside]


def test_all_that_decides_is_in_one_record(books: Books) -> None:
    subscription_id = books.subscription("anna", ended_at=NOON - A_DAY)
    books.payment("card", subscription_id=subscription_id, status="SUCCEEDED")
    assert due(books, subscription_id) == DueSubscription(
        id=subscription_id,
        user_id="anna",
        plan_id=books.monthly,
        started_at=NOON - 60 * A_DAY,
        ended_at=NOON - A_DAY,
        plan_duration=1,
        plan_duration_unit="month",
        method_id="card",
        method_currency="RUB",
        method_provider_id=books.provider_id,
        prices=(Decimal("299.00"),),
        plan_name=books.row("plans", books.monthly).name,
        question=Question(PAYMENT, "card", books.provider_id),
    )


@pytest.mark.parametrize("started_at", [None, "infinity", "-infinity", "4713-01-01 BC", "0001-01-01", "9999-12-31"])
def test_a_start_that_python_cannot_compute_with_reads_as_none_and_hides_no_other(
    books: Books, started_at: str | None
) -> None:
    odd, plain = books.subscription(started_at=started_at), books.subscription()
    found = {subscription.id: subscription for subscription in fetch(books).due}
    assert found[odd].started_at is None
    assert found[plain].started_at == NOON - 59 * A_DAY


def test_absurd_rows_everywhere_hide_no_other(flawed_books: Books) -> None:
    books = flawed_books
    plain = books.subscription("plain")
    books.payment("card", subscription_id=plain, status="SUCCEEDED")
    odd_plan = books.plan(None, duration=None, unit=None)
    books.price(odd_plan, "NaN")
    books.price(odd_plan, "-5.00")
    books.price(odd_plan, "1.00", currency=None)
    odd = books.subscription("", plan_id=odd_plan, started_at=None)
    books.payment(None, subscription_id=odd, status="SUCCEEDED", currency=None, amount="NaN")
    books.payment("card", subscription_id=odd, status="SUCCEEDED")
    books.payment("card", status="SUCCEEDED")
    books.execute("UPDATE payments SET created_at = 'infinity', updated_at = '-infinity' WHERE currency IS NULL")
    books.execute("UPDATE plans SET created_at = '-infinity', updated_at = 'infinity'")
    found = {subscription.id: subscription for subscription in fetch(books).due}
    assert found[plain].method_id == "card"
    assert (found[odd].method_id, found[odd].method_currency, found[odd].prices) == (None, None, ())


# The saved method


def paid(books: Books, subscription_id: int, external_id: str | None, days_ago: int, **fields: Any) -> int:
    fields.setdefault("status", "SUCCEEDED")
    return books.payment(external_id, subscription_id=subscription_id, created_at=NOON - days_ago * A_DAY, **fields)


def test_without_records_of_ours_the_method_is_that_of_the_latest_success(books: Books) -> None:
    subscription_id = books.subscription()
    paid(books, subscription_id, "old", 90)
    paid(books, subscription_id, "latest", 30, currency="EUR")
    for number, status in enumerate(("CREATED", "PENDING", "EXPIRED", "CANCELED", "REFUNDED", None)):
        paid(books, subscription_id, f"not paid {number}", 1, status=status)
    paid(books, books.subscription(), "another subscription's", 1)
    subscription = due(books, subscription_id)
    assert (subscription.method_id, subscription.method_currency) == ("latest", "EUR")


def test_of_two_successes_of_one_instant_the_later_row_counts(books: Books) -> None:
    subscription_id = books.subscription()
    paid(books, subscription_id, "first", 30)
    paid(books, subscription_id, "second", 30)
    assert due(books, subscription_id).method_id == "second"


def test_a_renewals_payment_is_never_taken_for_a_saved_method(books: Books) -> None:
    subscription_id = books.subscription("anna", ended_at=NOON - 60 * A_DAY)
    paid(books, subscription_id, "card", 90)
    for number in (1, 2):
        books.settle(books.renewal(books.attempt(subscription_id), f"renewal {number}"))
    books.execute("UPDATE subscriptions SET ended_at = :end", end=naive(NOON))
    assert due(books, subscription_id).method_id == "card"


def kept(books: Books) -> int:
    """A subscription whose method, saved just now, our own records hold."""
    books.price(books.monthly, "5.00", "USD")
    settled = books.settle(
        books.paid("p", user="anna", method_id="ours", method_saved=True, currency="USD", amount="5.00")
    )
    assert settled[0].subscription_id is not None
    books.execute("UPDATE subscriptions SET ended_at = :end", end=naive(NOON))
    return settled[0].subscription_id


def test_what_our_own_records_hold_comes_before_an_older_payment(books: Books) -> None:
    subscription_id = kept(books)
    paid(books, subscription_id, "the service's", 30, currency="RUB")
    subscription = due(books, subscription_id)
    assert (subscription.method_id, subscription.method_currency) == ("ours", "USD")
    assert subscription.method_provider_id == books.provider_id
    assert subscription.question == Question(PAYMENT, "p", books.provider_id)


def test_a_newer_payment_is_asked_about_before_what_our_own_records_hold(books: Books) -> None:
    subscription_id = kept(books)
    paid(books, subscription_id, "newer", 0, currency="USD")
    subscription = due(books, subscription_id)
    assert subscription.question == Question(PAYMENT, "newer", books.provider_id)
    assert subscription.older == (OlderMethod("ours", Question(PAYMENT, "p", books.provider_id), None, True),)
    books.execute(
        "INSERT INTO billing_orchestration.asked_methods (payment_provider_id, about, name, answer, asked_at, run_id)"
        " VALUES (:provider, 'payment', 'newer', 'not_saved', now(), 'r')",
        provider=books.provider_id,
    )
    subscription = due(books, subscription_id)
    assert (subscription.method_id, subscription.older) == ("ours", ())


def test_what_our_own_records_hold_outlives_its_payment_row_but_no_refund(books: Books) -> None:
    subscription_id = kept(books)
    books.execute("UPDATE payments SET subscription_id = NULL")
    assert due(books, subscription_id).method_id == "ours"
    books.execute("UPDATE payments SET status = 'REFUNDED'")
    assert due(books, subscription_id).method_id is None
    books.execute("DELETE FROM payments")
    assert due(books, subscription_id).method_id == "ours"


def test_without_any_success_there_is_no_method(books: Books) -> None:
    subscription = due(books, books.subscription())
    assert (subscription.method_id, subscription.method_currency, subscription.method_provider_id) == (None, None, None)
    assert subscription.prices == ()


# The price


def test_prices_are_those_of_the_plan_in_the_methods_currency(books: Books) -> None:
    plan_id = books.plan("10.00", currency="EUR")
    books.price(plan_id, "999.99")
    books.price(plan_id, "11.00", currency="EUR")
    books.price(plan_id, "12.00", currency=None)
    in_euros, in_roubles, in_dollars = (books.subscription(plan_id=plan_id) for _ in range(3))
    for subscription_id, currency in ((in_euros, "EUR"), (in_roubles, "RUB"), (in_dollars, "USD")):
        paid(books, subscription_id, f"card {subscription_id}", 30, currency=currency)
    assert due(books, in_euros).prices == (Decimal("10.00"), Decimal("11.00"))
    assert due(books, in_roubles).prices == (Decimal("999.99"),)
    assert due(books, in_dollars).prices == ()


# Tries


def test_the_attempts_of_the_present_period_come_with_it_and_no_others(books: Books) -> None:
    subscription_id = books.subscription(ended_at=NOON - A_DAY)
    earlier = books.attempt(subscription_id, state=State.SUCCEEDED)
    books.execute("UPDATE subscriptions SET ended_at = :end", end=naive(NOON))
    mine = [books.attempt(subscription_id, number=n, state=State.DECLINED) for n in (1, 2)]
    books.attempt(books.subscription(), state=State.DECLINED)
    subscription = due(books, subscription_id)
    assert subscription.attempts == tuple(mine)
    assert earlier not in subscription.attempts


def test_a_try_counts_from_the_first_instant_of_today(books: Books) -> None:
    yesterday, today = books.subscription(), books.subscription()
    books.attempt(yesterday, state=State.DECLINED, first_sent_at=TODAY - TICK)
    books.attempt(today, state=State.DECLINED, first_sent_at=TODAY)
    assert due(books, yesterday).last_tried_at is None
    assert due(books, today).last_tried_at == TODAY


def test_the_latest_try_of_any_period_counts(books: Books) -> None:
    subscription_id = books.subscription(ended_at=NOON - A_DAY)
    books.attempt(subscription_id, state=State.VOID, first_sent_at=TODAY)
    books.execute("UPDATE subscriptions SET ended_at = :end", end=naive(NOON))
    books.attempt(subscription_id, state=State.DECLINED, first_sent_at=NOON)
    assert due(books, subscription_id).last_tried_at == NOON


@pytest.mark.parametrize(("code", "tried"), [("401", False), ("403", False), ("400", True)])
def test_a_refusal_of_the_shop_itself_is_no_try_of_the_card(books: Books, code: str, tried: bool) -> None:
    subscription_id = books.subscription()
    books.attempt(subscription_id, state=State.REJECTED, decline_class=code)
    assert (due(books, subscription_id).last_tried_at is not None) == tried


def test_a_rejection_without_a_code_counts_as_a_try(books: Books) -> None:
    subscription_id = books.subscription()
    books.attempt(subscription_id, state=State.REJECTED, decline_class=None)
    assert due(books, subscription_id).last_tried_at is not None


@pytest.mark.parametrize(
    ("state", "declined"), [("DECLINED", True), ("STOPPED", True), ("REJECTED", False), ("UNKNOWN", False)]
)
def test_a_decline_of_a_card_today_counts_for_all_its_subscriptions(books: Books, state: str, declined: bool) -> None:
    one, other = books.subscription(), books.subscription()
    for subscription_id in (one, other):
        books.payment(None, subscription_id=subscription_id, status="SUCCEEDED")
    books.execute(
        """
        INSERT INTO billing_orchestration.saved_methods
        SELECT id, 'card', 'RUB', :provider, 'p', now() FROM subscriptions
        """,
        provider=books.provider_id,
    )
    books.attempt(one, state=state, first_sent_at=NOON)
    assert (due(books, other).method_declined_at == NOON) == declined


def test_the_slice_is_a_handful_of_statements_however_much_is_due(books: Books) -> None:
    counted: list[str] = []
    sa.event.listen(books.engine, "before_cursor_execute", lambda *event: counted.append(event[2]))
    fetch(books)
    few = len(counted)
    for _ in range(30):
        books.attempt(books.subscription(), state=State.DECLINED)
    counted.clear()
    assert len(fetch(books).due) == 30
    assert len(counted) == few <= 10


# What stands in the way


def test_the_end_of_the_last_settled_period_comes_with_it(books: Books) -> None:
    for user in ("anna", "berta"):
        books.subscription(user)
    books.settle(books.paid(user="anna"))
    books.settle(books.paid(user="berta"), stamp=books.stamp())
    books.settle(books.paid(user="berta", refunded="299.00"))
    subscription_id = books.rows("subscriptions")[1].id
    books.execute("UPDATE subscriptions SET ended_at = :end", end=naive(NOON))
    assert due(books, subscription_id).settled_until == datetime(2026, 4, 12, 12, tzinfo=UTC)
    assert due(books, books.subscription()).settled_until is None


def test_of_several_active_subscriptions_of_a_user_and_plan_all_but_the_last_name_it(books: Books) -> None:
    first, second = books.subscription("anna", ended_at=NOON - A_DAY), books.subscription("anna")
    last = books.subscription("anna")  # as late as the one before: the younger one counts
    for unlike in ({"plan_id": books.plan()}, {"status": "EXPIRED"}):
        books.subscription("anna", ended_at=NOON + A_DAY, **unlike)
    books.subscription("berta", ended_at=NOON + A_DAY)
    found = {subscription.id: subscription.outlasted_by for subscription in fetch(books).due}
    assert [found[id_] for id_ in (first, second, last)] == [last, last, None]
    endless = books.subscription("anna", ended_at=None)
    assert due(books, last).outlasted_by == endless


def test_attempts_in_review_come_along_unless_a_person_ignored_their_payment(books: Books) -> None:
    subscriptions = [books.subscription(status=status) for status in ("ACTIVE", "EXPIRED", "ACTIVE")]
    attempts = [
        books.attempt(subscription_id, state=State.REVIEW, external_payment_id=f"odd {subscription_id}")
        for subscription_id in subscriptions
    ]
    for attempt in attempts:
        books.settle(books.renewal(attempt, attempt.external_payment_id or "", amount="1.00"))
    assert fetch(books).in_review == tuple(attempts)
    books.execute(
        "UPDATE billing_orchestration.quarantine SET resolution = 'ignored', resolved_at = now() WHERE attempt_id = :a",
        a=attempts[2].id,
    )
    assert fetch(books).in_review == tuple(attempts[:2])


def test_open_entries_that_name_an_attempt_come_along(books: Books) -> None:
    held = books.planned(books.subscription())
    books.settle(books.renewal(held, "lost", amount="1.00"))
    [entry] = books.rows("quarantine")
    holds = fetch(books).holds
    assert holds.find(held) == f"quarantine entry {entry.id} (unknown_attempt) is open and is about this charge"
    # Whichever try of it was paid.
    assert holds.find(books.planned(held.subscription_id, number=2)) == holds.find(held)
    books.execute("UPDATE billing_orchestration.quarantine SET resolved_at = now()")
    assert fetch(books).holds == Holds()


# Shards


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_shards_together_hold_everything_once(books: Books, count: int) -> None:
    declined, *_ = subscriptions = [books.subscription() for _ in range(8)]
    for subscription_id in subscriptions[4:]:
        books.attempt(subscription_id, first_sent_at=NOON)
    books.attempt(declined, state=State.DECLINED, first_sent_at=NOON)
    for _ in range(3):
        books.subscription(ended_at=OLDEST - TICK)
        books.subscription(ended_at=None)
        books.subscription(plan_id=books.plan(recurring=False))
    whole = fetch(books)

    parts = [fetch(books, shard=shard) for shard in divide(count)]

    assert len(whole.due) == 8
    assert sorted((one for part in parts for one in part.due), key=lambda one: one.id) == list(whole.due)
    opened = [attempt for part in parts for attempt in part.open_attempts]
    assert sorted(attempt.id for attempt in opened) == sorted(attempt.id for attempt in whole.open_attempts)
    for part in parts:
        assert {attempt.subscription_id for attempt in part.open_attempts} <= set(ids(part))
    assert sorted(one for part in parts for one in part.too_old_examples) == sorted(whole.too_old_examples)
    for name in ("too_old", "not_recurring", "without_end"):
        assert sum(getattr(part, name) for part in parts) == getattr(whole, name) == 3
