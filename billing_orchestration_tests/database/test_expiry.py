"""Expiry in SQL: what is over, what is held back, and that nothing which changed meanwhile is overwritten."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from billing_orchestration.database.attempts import open_and_claim
from billing_orchestration.database.audit import Stamp, storable_name
from billing_orchestration.database.expiry import (
    OverSlice,
    expire_locked,
    expire_payments,
    expire_subscriptions,
    fetch_over,
    fetch_stale_payments,
    lock_over,
)
from billing_orchestration.domain.attempts import State
from billing_orchestration.domain.expiry import StalePayment
from billing_orchestration.domain.settlement_decisions import Settle
from billing_orchestration_tests.books import NOON, Books, naive
from billing_orchestration_tests.waiting import at_once, start_blocked

A_DAY = timedelta(days=1)
MONTH_LATER = NOON.replace(month=4)
STAMP = Stamp("expire_subscriptions_job", "the run", NOON)


def expire(books: Books, size: int = 100, *, wait: bool = False, over_before: datetime = NOON) -> int:
    """The next chunk that is not held back as a whole."""
    while True:
        with books.engine.begin() as connection:
            chunk = expire_subscriptions(
                connection, STAMP, over_before=over_before, reason="the grace is over", size=size, wait_for_locks=wait
            )
        if chunk.expired or not chunk.locked:
            return chunk.expired


def over(books: Books, sample_size: int = 10) -> OverSlice:
    with books.engine.connect() as connection:
        return fetch_over(connection, NOON, sample_size)


def statuses(books: Books) -> dict[int, str | None]:
    with books.engine.connect() as connection:
        rows = connection.execute(sa.text("SELECT id, status FROM subscriptions ORDER BY id"))
        return {row.id: row.status for row in rows}


# Subscriptions


def test_only_active_ones_that_ended_before_the_bound_expire(books: Books) -> None:
    tick = timedelta(microseconds=1)
    over_ids = [books.subscription(ended_at=NOON - tick), books.subscription(ended_at=NOON - 900 * A_DAY, plan_id=None)]
    for ended_at in (NOON, NOON + A_DAY, None, "infinity"):
        books.subscription(ended_at=ended_at)
    for status in ("CREATED", "EXPIRED", "CANCELED", "PAUSED", "DELETED", None):
        books.subscription(ended_at=NOON - A_DAY, status=status)
    before = statuses(books)
    assert (over(books).over, over(books).active, over(books).without_end) == (2, 6, 1)
    assert expire(books) == 2
    assert statuses(books) == {**before, **dict.fromkeys(over_ids, "EXPIRED")}
    assert expire(books) == 0


@pytest.mark.parametrize("wait", [False, True])
def test_an_expiry_is_in_the_audit_trail_with_old_new_and_reason(books: Books, wait: bool) -> None:
    subscription_id = books.subscription(ended_at=NOON - A_DAY)
    expire(books, wait=wait)
    (entry,) = books.rows("audit_trail")
    assert (entry.entity, entry.entity_id, entry.action) == ("subscription", str(subscription_id), "expired")
    assert (entry.old, entry.new) == ({"status": "ACTIVE"}, {"status": "EXPIRED"})
    assert entry.reason == f"ended {naive(NOON - A_DAY)}, the grace is over"
    assert (entry.job, entry.run_id, entry.at) == (STAMP.job, STAMP.run_id, NOON)
    assert books.row("subscriptions", subscription_id).updated_at == naive(NOON)


HELD = [State.UNKNOWN, State.PENDING, State.REVIEW]


@pytest.mark.parametrize("state", [*HELD, "PLANNED and perhaps sent"])
def test_a_subscription_whose_charge_is_not_known_is_held_back_and_shown(books: Books, state: str) -> None:
    free, held = books.subscription(ended_at=NOON - A_DAY), books.subscription(ended_at=NOON - 2 * A_DAY)
    books.attempt(held, state=state.partition(" ")[0])
    found = over(books)
    assert (found.over, found.held) == (2, 1)
    assert {(sample.id, sample.why_held is not None) for sample in found.samples} == {(free, False), (held, True)}
    assert expire(books) + expire(books, wait=True) == 1
    assert statuses(books) == {free: "EXPIRED", held: "ACTIVE"}


@pytest.mark.parametrize(
    "state", [State.SUCCEEDED, State.DECLINED, State.STOPPED, State.REJECTED, State.VOID, State.REFUNDED]
)
def test_a_subscription_whose_attempts_are_closed_expires(books: Books, state: str) -> None:
    books.attempt(books.subscription(ended_at=NOON - A_DAY), state=state)
    assert over(books).held == 0
    assert expire(books) == 1


def test_a_subscription_whose_attempt_was_never_sent_expires(books: Books) -> None:
    books.attempt(books.subscription(ended_at=NOON - A_DAY), state=State.PLANNED, first_sent_at=None)
    assert expire(books) == 1


def test_chunks_take_the_oldest_first_and_pass_over_what_is_held(books: Books) -> None:
    ids = [books.subscription(ended_at=NOON - days * A_DAY) for days in (1, 2, 3, 4, 5)]
    books.attempt(ids[4])
    assert [expire(books, size=2), expire(books, size=2), expire(books, size=2)] == [2, 2, 0]
    assert statuses(books) == {**dict.fromkeys(ids[:4], "EXPIRED"), ids[4]: "ACTIVE"}
    expired = [int(row.entity_id) for row in books.rows("audit_trail")]
    assert [set(expired[:2]), set(expired[2:])] == [{ids[3], ids[2]}, {ids[1], ids[0]}]


def test_the_sample_shows_the_oldest_of_each_kind(books: Books) -> None:
    ids = [books.subscription(f"user {days}", ended_at=NOON - days * A_DAY) for days in (1, 2, 3, 4)]
    books.attempt(ids[0])
    books.attempt(ids[1])
    samples = over(books, sample_size=1).samples
    assert [sample.id for sample in samples] == [ids[3], ids[1]]
    assert over(books, sample_size=0).samples == ()


@pytest.mark.parametrize("ended_at", ["-infinity", "4713-01-01 BC", "0001-01-01"])
def test_an_end_before_all_dates_is_shown_and_expires(books: Books, ended_at: str) -> None:
    subscription_id = books.subscription(ended_at=ended_at)
    (sample,) = over(books).samples
    assert sample.ended_at.startswith(ended_at[:4])
    assert expire(books) == 1
    assert statuses(books) == {subscription_id: "EXPIRED"}
    assert ended_at[:4] in books.rows("audit_trail")[0].reason


def test_rows_that_somebody_has_locked_are_passed_over_then_waited_for(books: Books, database_url: str) -> None:
    locked, free = books.subscription(ended_at=NOON - 2 * A_DAY), books.subscription(ended_at=NOON - A_DAY)
    with ThreadPoolExecutor() as pool, psycopg.connect(database_url) as service:
        service.execute(b"SELECT FROM subscriptions WHERE id = %s FOR UPDATE", [locked])
        assert expire(books) == 1
        assert statuses(books) == {locked: "ACTIVE", free: "EXPIRED"}
        waiting = start_blocked(pool, books.engine, partial(expire, books, wait=True))
        service.commit()
        assert waiting.result() == 1
    assert set(statuses(books).values()) == {"EXPIRED"}


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE subscriptions SET ended_at = ended_at + interval '1 month' WHERE id = %s",
        "UPDATE subscriptions SET status = 'CANCELED' WHERE id = %s",
        "UPDATE subscriptions SET ended_at = NULL WHERE id = %s",
        "DELETE FROM subscriptions WHERE id = %s",
    ],
)
def test_what_changed_while_it_was_waited_for_is_not_overwritten(books: Books, database_url: str, change: str) -> None:
    changed, free = books.subscription(ended_at=NOON - 2 * A_DAY), books.subscription(ended_at=NOON - A_DAY)
    with ThreadPoolExecutor() as pool, psycopg.connect(database_url) as service:
        service.execute(change.encode(), [changed])
        waiting = start_blocked(pool, books.engine, partial(expire, books, wait=True))
        service.commit()
        assert waiting.result() == 1
    assert statuses(books).get(changed) in ("ACTIVE", "CANCELED", None)
    assert statuses(books)[free] == "EXPIRED"
    assert [row.entity_id for row in books.rows("audit_trail")] == [str(free)]


def test_a_charge_that_is_opened_while_its_subscription_is_waited_for_holds_it_back(books: Books) -> None:
    charged, other = books.subscription(ended_at=NOON - 2 * A_DAY), books.subscription(ended_at=NOON - A_DAY)
    attempt = books.planned(charged)
    with ThreadPoolExecutor() as pool, books.engine.connect() as charging:
        assert open_and_claim(charging, books.stamp(), [attempt]).sent_before
        # A size of one: the only row of the first chunk turns out to be held, and the next one still expires.
        waiting = start_blocked(pool, books.engine, partial(expire, books, 1, wait=True))
        charging.commit()
        assert waiting.result() == 1
    assert statuses(books) == {charged: "ACTIVE", other: "EXPIRED"}


def test_a_charge_that_is_opened_while_another_row_is_waited_for_holds_it_back(books: Books, database_url: str) -> None:
    """The locking statement is older than the attempt, and the attempt's subscription is free when it gets there."""
    first, charged = books.subscription(ended_at=NOON - 3 * A_DAY), books.subscription(ended_at=NOON - 2 * A_DAY)
    attempt = books.planned(charged)
    with ThreadPoolExecutor() as pool, psycopg.connect(database_url) as service:
        service.execute(b"SELECT FROM subscriptions WHERE id = %s FOR UPDATE", [first])
        waiting = start_blocked(pool, books.engine, partial(expire, books, wait=True))
        with books.engine.begin() as charging:
            assert open_and_claim(charging, books.stamp(), [attempt]).sent_before
        service.commit()
        assert waiting.result() == 1
    assert statuses(books) == {first: "EXPIRED", charged: "ACTIVE"}


@pytest.mark.parametrize("wait", [False, True])
def test_a_subscription_that_is_being_expired_is_not_charged(books: Books, wait: bool) -> None:
    attempt = books.planned(books.subscription(ended_at=NOON - 2 * A_DAY))

    def charge() -> object:
        with books.engine.begin() as connection:
            return set(open_and_claim(connection, books.stamp(), [attempt]).sent_before)

    with ThreadPoolExecutor() as pool, books.engine.connect() as expiring:
        chunk = expire_subscriptions(expiring, STAMP, over_before=NOON, reason="over", size=9, wait_for_locks=wait)
        assert chunk.expired
        charging = start_blocked(pool, books.engine, charge)
        expiring.commit()
        assert charging.result() == set()


def test_a_success_that_is_settled_while_it_is_waited_for_keeps_the_subscription_active(
    books: Books, database_url: str
) -> None:
    subscription_id = books.subscription("anna", ended_at=NOON - 2 * A_DAY)
    attempt = books.attempt(subscription_id, state=State.DECLINED)
    with ThreadPoolExecutor() as pool, psycopg.connect(database_url) as gate:
        gate.execute(b"SELECT FROM subscriptions FOR UPDATE")
        settling = start_blocked(pool, books.engine, partial(books.settle, books.renewal(attempt)))
        expiring = start_blocked(pool, books.engine, partial(expire, books, wait=True), waiting=2)
        gate.commit()
        assert isinstance(settling.result()[0].decision, Settle)
        expiring.result()
    assert books.row("subscriptions", subscription_id).status == "ACTIVE"
    assert books.ended_at(subscription_id) == MONTH_LATER - 2 * A_DAY


def test_four_runs_at_once_expire_each_subscription_once(books: Books) -> None:
    ids = [books.subscription(ended_at=NOON - n * A_DAY) for n in range(1, 60)]

    def work(wait: bool) -> int:
        done = 0
        while expired := expire(books, size=7, wait=wait):
            done += expired
        return done

    done = at_once([partial(work, wait) for wait in (False, True, False, True)])
    assert sum(done) == len(ids)
    assert sorted(int(row.entity_id) for row in books.rows("audit_trail")) == ids


# Subscriptions, chunk after chunk


def expire_from(
    books: Books, after: tuple[str, int] | None, size: int = 100, meanwhile: Callable[[], object] = lambda: None
) -> tuple[int, tuple[str, int] | None]:
    """A chunk: how many expired, and where the next one begins (None: nothing was left to lock)."""
    with books.engine.begin() as connection:
        locked = lock_over(connection, NOON, size, after)
        meanwhile()
        if locked is None:
            return 0, None
        return expire_locked(connection, STAMP, locked, over_before=NOON, reason="the grace is over"), locked.last


def test_each_chunk_begins_where_the_one_before_it_ends(books: Books) -> None:
    # Several with one end, and ends that Python has no datetime for.
    ends = ["-infinity", "-infinity", "0044-03-15 BC", *[naive(NOON - A_DAY)] * 5, naive(NOON - A_DAY / 2)]
    ids = [books.subscription(ended_at=end) for end in reversed(ends)][::-1]
    held = books.subscription(ended_at=NOON - 2 * A_DAY)
    books.attempt(held)
    stays = books.subscription(ended_at=NOON)
    expected = [{ids[1], ids[0]}, {ids[2], ids[7]}, {ids[6], ids[5]}, {ids[4], ids[3]}, {ids[8]}]
    after = None
    for chunk in expected:
        before = {int(row.entity_id) for row in books.rows("audit_trail")}
        expired, after = expire_from(books, after, 2)
        assert {int(row.entity_id) for row in books.rows("audit_trail")} - before == chunk
        assert expired == len(chunk)
    assert expire_from(books, after, 2) == (0, None)
    assert statuses(books) == {**dict.fromkeys(ids, "EXPIRED"), held: "ACTIVE", stays: "ACTIVE"}
    assert {row.reason for row in books.rows("audit_trail", f"entity_id = '{ids[0]}'")} == {
        "ended -infinity, the grace is over"
    }


def test_what_somebody_has_locked_is_passed_over_by_the_chunks(books: Books, database_url: str) -> None:
    ids = [books.subscription(ended_at=NOON - days * A_DAY) for days in (5, 4, 3)]
    with psycopg.connect(database_url) as service:
        service.execute(b"SELECT FROM subscriptions WHERE id = ANY(%s) FOR SHARE", [[ids[0], ids[2]]])
        expired, after = expire_from(books, None)
        assert (expired, after) == (1, (str(naive(NOON - 4 * A_DAY)), ids[1]))
        assert expire_from(books, after) == (0, None)
    assert statuses(books) == {ids[0]: "ACTIVE", ids[1]: "EXPIRED", ids[2]: "ACTIVE"}


def test_a_charge_that_was_committed_after_the_chunk_was_chosen_holds_its_subscription_back(books: Books) -> None:
    charged, other = books.subscription(ended_at=NOON - 2 * A_DAY), books.subscription(ended_at=NOON - A_DAY)
    # Its attempt is younger than the statement that chose and locked: as if it was committed between the two.
    expired, _ = expire_from(books, None, meanwhile=lambda: books.attempt(charged))
    assert expired == 1
    assert statuses(books) == {charged: "ACTIVE", other: "EXPIRED"}
    assert [row.entity_id for row in books.rows("audit_trail", "action = 'expired'")] == [str(other)]


def test_a_charge_that_waits_for_a_chunk_is_not_opened(books: Books) -> None:
    attempt = books.planned(books.subscription(ended_at=NOON - 2 * A_DAY))

    def charge() -> object:
        with books.engine.begin() as connection:
            return set(open_and_claim(connection, books.stamp(), [attempt]).sent_before)

    with ThreadPoolExecutor() as pool:
        charging: list[Future[object]] = []
        expired, _ = expire_from(
            books, None, meanwhile=lambda: charging.append(start_blocked(pool, books.engine, charge))
        )
        assert expired == 1
        assert charging[0].result() == set()


def test_a_charge_that_is_under_way_keeps_its_subscription_out_of_the_chunk(books: Books) -> None:
    charged, other = books.subscription(ended_at=NOON - 2 * A_DAY), books.subscription(ended_at=NOON - A_DAY)
    attempt = books.planned(charged)
    with books.engine.connect() as charging:
        assert open_and_claim(charging, books.stamp(), [attempt]).sent_before
        assert expire_from(books, None, meanwhile=charging.commit)[0] == 1
    assert statuses(books) == {charged: "ACTIVE", other: "EXPIRED"}


def test_chunks_of_several_runs_at_once_expire_each_subscription_once(books: Books) -> None:
    ids = [books.subscription(ended_at=NOON - n % 9 * A_DAY - A_DAY) for n in range(60)]

    def work(size: int) -> int:
        done, after = expire_from(books, None, size)
        while after is not None:
            expired, after = expire_from(books, after, size)
            done += expired
        return done

    done = sum(at_once([partial(work, size) for size in (3, 5, 7, 60)]))
    assert done + expire(books) == len(ids)
    assert sorted(int(row.entity_id) for row in books.rows("audit_trail")) == ids


# Payments


def stale(books: Books, before: datetime = NOON) -> list[StalePayment]:
    with books.engine.connect() as connection:
        return fetch_stale_payments(connection, before)


def expire_rows(books: Books, rows: list[StalePayment]) -> set[int]:
    with books.engine.begin() as connection:
        return expire_payments(connection, STAMP, [(row, f"reason of {row.id}") for row in rows])


def test_stale_is_pending_and_older_than_the_bound_oldest_first(flawed_books: Books) -> None:
    books = flawed_books
    tick = timedelta(microseconds=1)
    late = books.payment("p", created_at=NOON - tick)
    early = books.payment("p", created_at=NOON - A_DAY, currency=None)
    nameless = books.payment(None, created_at=NOON - 2 * A_DAY, amount="NaN")
    books.payment("p", created_at=NOON)
    for status in ("CREATED", "SUCCEEDED", "EXPIRED", "CANCELED", "REFUNDED", None):
        books.payment("p", status=status, created_at=NOON - A_DAY)
    books.execute("UPDATE payments SET created_at = '-infinity' WHERE id = :id", id=nameless)
    rows = stale(books)
    assert [(row.id, row.external_payment_id) for row in rows] == [(nameless, None), (early, "p"), (late, "p")]
    assert [str(row.money) for row in rows] == ["NaN RUB", "None", "299.00 RUB"]


def test_each_expired_payment_is_in_the_audit_trail_with_its_own_reason(books: Books) -> None:
    ids = [books.payment("p"), books.payment(None)]
    assert expire_rows(books, stale(books)) == set(ids)
    entries = {int(row.entity_id): row for row in books.rows("audit_trail")}
    for id_, external_id in zip(ids, ("p", None), strict=True):
        row = books.row("payments", id_)
        assert (row.status, row.updated_at) == ("EXPIRED", naive(NOON))
        entry = entries[id_]
        assert (entry.old, entry.new) == ({"status": "PENDING"}, {"status": "EXPIRED"})
        assert (entry.reason, entry.external_payment_id) == (f"reason of {id_}", external_id)
    assert expire_rows(books, []) == set()


Change = Callable[[Books, int], Any]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE payments SET status = 'SUCCEEDED'",
        "UPDATE payments SET status = NULL",
        "UPDATE payments SET external_payment_id = 'another'",
        "UPDATE payments SET external_payment_id = NULL",
        "DELETE FROM payments",
    ],
)
@pytest.mark.parametrize("meanwhile", [False, True])
def test_a_payment_that_is_not_what_was_asked_about_is_not_expired(
    books: Books, database_url: str, change: str, meanwhile: bool
) -> None:
    books.payment("p")
    rows = stale(books)
    if meanwhile:
        with ThreadPoolExecutor() as pool, psycopg.connect(database_url) as service:
            service.execute(change.encode())
            waiting = start_blocked(pool, books.engine, partial(expire_rows, books, rows))
            service.commit()
            assert waiting.result() == set()
    else:
        books.execute(change)
        assert expire_rows(books, rows) == set()
    assert all(row.status != "EXPIRED" for row in books.rows("payments"))
    assert books.rows("audit_trail") == []


def test_a_payment_that_was_only_touched_while_it_was_waited_for_expires(books: Books, database_url: str) -> None:
    ids = {books.payment("p"), books.payment("q")}
    rows = stale(books)
    with ThreadPoolExecutor() as pool, psycopg.connect(database_url) as service:
        service.execute(b"UPDATE payments SET updated_at = now() WHERE external_payment_id = 'p'")
        waiting = start_blocked(pool, books.engine, partial(expire_rows, books, rows))
        service.commit()
        assert waiting.result() == ids
    assert sorted(int(row.entity_id) for row in books.rows("audit_trail")) == sorted(ids)


def test_payments_are_locked_in_the_order_of_their_ids(books: Books, database_url: str) -> None:
    """As settling locks them: two transactions wait for each other instead of deadlocking."""
    ids = [books.payment(f"p{n}") for n in range(20)]
    rows = sorted(stale(books), key=lambda row: row.id, reverse=True)
    with ThreadPoolExecutor() as pool, psycopg.connect(database_url) as service:
        service.execute("SELECT FROM payments WHERE id = %s FOR UPDATE", (ids[10],))
        waiting = start_blocked(pool, books.engine, partial(expire_rows, books, rows))
        free = service.execute("SELECT id FROM payments FOR UPDATE SKIP LOCKED").fetchall()
        service.rollback()
        assert waiting.result() == set(ids)
    assert sorted(id_ for (id_,) in free) == ids[10:]


def test_an_id_that_no_index_holds_is_cut_in_the_audit_trail_alone(books: Books) -> None:
    long, short = books.payment("x" * 900), books.payment('with "quotes", {braces}')
    assert expire_rows(books, stale(books)) == {long, short}
    names = {int(row.entity_id): row.external_payment_id for row in books.rows("audit_trail")}
    assert names[short] == 'with "quotes", {braces}'
    assert names[long] == storable_name("x" * 900)


def test_a_payment_that_got_its_provider_id_after_it_was_read_is_not_expired(books: Books) -> None:
    books.payment(None)
    rows = stale(books)
    books.execute("UPDATE payments SET external_payment_id = 'just created at the provider'")
    assert expire_rows(books, rows) == set()


def test_a_payment_that_was_expired_is_settled_when_it_is_paid_after_all(books: Books) -> None:
    row_id = books.payment("p")
    expire_rows(books, stale(books))
    books.settle(books.paid("p"))
    assert books.row("payments", row_id).status == "SUCCEEDED"
    assert [row.action for row in books.rows("audit_trail", "entity = 'payment'")] == ["expired", "succeeded"]


def test_expiring_and_settling_the_same_payments_at_once_loses_none(books: Books) -> None:
    payments = [books.paid(f"p{n}", user=f"user {n}") for n in range(30)]
    for payment in payments:
        books.payment(payment.id)
    rows = stale(books)

    def settle() -> int:
        return len(books.settle(*payments))

    def expire_them() -> int:
        return len(expire_rows(books, list(reversed(rows))))

    at_once([settle, expire_them, settle, expire_them])
    assert {row.status for row in books.rows("payments")} == {"SUCCEEDED"}
    assert len(books.rows("settlements")) == len(books.rows("subscriptions")) == 30
