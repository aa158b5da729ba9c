"""Each statement finds its rows by an index, at a size where a scan of the table would be felt.

The plans are PostgreSQL's own, for the very statements and values that the jobs send: once planned for the values,
once as the plan that a session reuses for any value. Nothing is forbidden to the planner.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from billing_orchestration.database.attempts import by_ids, claim, close, open_and_claim, open_attempts
from billing_orchestration.database.audit import Problem, open_problems, runs_that_changed
from billing_orchestration.database.case_history import case_of_payment, case_of_subscription
from billing_orchestration.database.expiry import (
    expire_locked,
    expire_payments,
    expire_subscriptions,
    fetch_over,
    fetch_stale_payments,
    lock_over,
)
from billing_orchestration.database.matching import fetch_pending, fetch_rows, fetch_settled
from billing_orchestration.database.money_checks import numbers
from billing_orchestration.database.quarantine import count_and_last, entries_since
from billing_orchestration.database.reconciliation import fetch_rows_of, fetch_rows_of_day, lock_rows, settled_row
from billing_orchestration.database.renewal_view import methods_due
from billing_orchestration.database.renewals import fetch_due
from billing_orchestration.database.settling import settle_batch
from billing_orchestration.desk.doctor import DATABASE_CHECKS
from billing_orchestration.domain.answers import Closing
from billing_orchestration.domain.attempts import State
from billing_orchestration.domain.reconciled import Day
from billing_orchestration.jobs.money_checks import CHECKS
from billing_orchestration.jobs.quarantine_page import quarantine_page
from billing_orchestration_tests.books import NOON, UNIQUE_INDEX, Books, naive
from billing_orchestration_tests.domain.given import SHOP

A_DAY = timedelta(days=1)
SIZE = 60_000
LARGE = {"subscriptions", "payments", "renewal_attempts", "settlements", "audit_trail", "saved_methods", "quarantine"}

# These indexes hold what waits for a person, and nothing else: to read one whole is no scan of its table.
OF_WHAT_WAITS = {"quarantine_one_open_per_problem"}
# All ACTIVE subscriptions are counted, and are most of the table. One customer's case is looked for by four ids, in a
# table that has an entry for each problem there ever was: docs/performance.md names it.
MEANT = ("count(*) AS active", "SELECT * FROM billing_orchestration.quarantine")

# Two years of a service: most subscriptions go on, one in five hundred is due, one in fifty is stale since months;
# every one was renewed once; some rows are PENDING, a few attempts are open.
FILL = """
    INSERT INTO subscriptions (user_id, status, started_at, ended_at, plan_id, created_at, updated_at)
    SELECT 'user ' || n, (CASE WHEN n % 10 < 7 THEN 'ACTIVE' ELSE 'EXPIRED' END)::subscriptionstatusenum,
           :now - interval '700 days',
           CASE WHEN n % 500 = 0 THEN :now - interval '1 hour' WHEN n % 100 IN (1, 2) THEN :now - interval '200 days'
                ELSE :now + (n % 30 + 1) * interval '1 day' END,
           :plan, :now, :now
    FROM generate_series(1, :size) AS n;
    INSERT INTO payments (subscription_id, payment_provider_id, payment_method, status, currency, amount,
                          external_payment_id, created_at, updated_at)
    SELECT s.id, 1, 'BANK_CARD',
           (CASE WHEN s.id % 200 = 0 AND k = 1 THEN 'PENDING' ELSE 'SUCCEEDED' END)::paymentstatusenum, 'RUB',
           299, 'payment ' || s.id || ' ' || k, :now - (s.id % 700) * interval '1 day', :now
    FROM subscriptions s, generate_series(0, 1) AS k;
    INSERT INTO billing_orchestration.renewal_attempts (
        id, subscription_id, period_start, number, state, idempotence_key, body, amount, currency, user_id, plan_id,
        payment_provider_id, payment_method_id, planned_at, first_sent_at, last_sent_at, sends, external_payment_id,
        closed_at, run_id)
    SELECT gen_random_uuid(), s.id, s.ended_at - interval '1 month', 1,
           CASE WHEN s.id % 1000 = 999 THEN 'UNKNOWN' WHEN s.id % 20 = 19 THEN 'DECLINED' ELSE 'SUCCEEDED' END,
           gen_random_uuid(), '{}', 299, 'RUB', s.user_id, :plan, 1, 'card',
           :now, :now - (s.id % 30) * interval '1 day', :now - (s.id % 30) * interval '1 day', 1,
           'payment ' || s.id || ' 1',
           CASE WHEN s.id % 1000 <> 999 THEN :now - (:size - s.id) * interval '2 hours' END, 'r'
    FROM subscriptions s ORDER BY s.id;
    INSERT INTO billing_orchestration.settlements (
        external_payment_id, kind, payment_id, subscription_id, amount, currency, settled_at, run_id)
    SELECT external_payment_id, 'renewed', id, subscription_id, 299, 'RUB',
           :now - (:size - subscription_id) * interval '2 hours', 'r'
    FROM payments WHERE external_payment_id LIKE '% 1' ORDER BY subscription_id;
    INSERT INTO billing_orchestration.saved_methods
    SELECT id, 'card', 'RUB', 1, 'payment ' || id || ' 0', :now FROM subscriptions WHERE id % 2 = 0;
    INSERT INTO billing_orchestration.audit_trail
        (at, job, run_id, entity, entity_id, action, reason, external_payment_id)
    SELECT :now - (1000000 - id) * interval '1 minute', 'job', 'r', 'payment', id::text, 'succeeded', 'reason',
           external_payment_id
    FROM payments ORDER BY id;
    INSERT INTO billing_orchestration.quarantine
        (problem_key, kind, reason, external_payment_id, subscription_id, evidence, job, run_id, opened_at, resolved_at)
    SELECT 'payment p' || n, 'amount', 'reason', 'p' || n, n, '{}', 'job', 'r', :now - (:size - n) * interval '1 hour',
           CASE WHEN n % 500 <> 0 THEN :now - (:size - n) * interval '1 hour' END
    FROM generate_series(1, :size) AS n
"""


@pytest.fixture
def large(books: Books) -> Books:
    """A database of some size, with up-to-date statistics, as autovacuum keeps them."""
    plan = books.monthly
    with books.engine.begin() as connection:
        for statement in FILL.split(";"):
            connection.execute(sa.text(statement), {"now": naive(NOON), "size": SIZE, "plan": plan})
    with books.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("VACUUM ANALYZE"))
    return books


class Plans:
    """The statements that a piece of work has sent, each with its two plans."""

    def __init__(self) -> None:
        self.found: list[tuple[str, list[tuple[str, str]]]] = []

    def scans(self) -> list[str]:
        """Which statements read a large table whole."""
        return [
            f"{mode}: {table} is scanned whole by {' '.join(statement.split())[:300]}"
            for statement, read in self.found
            for mode, table in read
            if not any(words in statement for words in MEANT)
        ]


@contextmanager
def planned(books: Books, modes: Sequence[str]) -> Iterator[tuple[sa.Connection, Plans]]:
    """A transaction that is rolled back; every statement in it is explained right before it runs."""
    plans = Plans()

    def explain(
        connection: sa.Connection, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
    ) -> None:
        if not many and not statement.startswith(("SAVEPOINT", "ROLLBACK TO", "RELEASE", "SET")):
            plans.found.append((statement, list(_whole_tables(cursor.connection, statement, parameters or {}, modes))))

    with books.engine.connect() as connection:
        connection.execute(sa.text("SET LOCAL jit = off"))
        sa.event.listen(connection, "before_cursor_execute", explain)
        yield connection, plans
        connection.rollback()


def _whole_tables(
    connection: psycopg.Connection[Any], statement: str, values: dict[str, Any], modes: Sequence[str]
) -> Iterator[tuple[str, str]]:
    names: list[str] = []

    def number(match: re.Match[str]) -> str:
        if match[1] not in names:
            names.append(match[1])
        return f"${names.index(match[1]) + 1}"

    text = re.sub(r"%\((\w+)\)s", number, statement)
    with psycopg.ClientCursor(connection) as cursor:
        for mode in modes:
            cursor.execute(f"PREPARE explained AS {text}".encode())
            cursor.execute(f"SET LOCAL plan_cache_mode = {mode}".encode())
            marks = f"({', '.join(['%s'] * len(names))})" if names else ""
            cursor.execute(
                f"EXPLAIN (FORMAT JSON) EXECUTE explained {marks}".encode(), [_plain(values[name]) for name in names]
            )
            (plan,) = cursor.fetchone() or ("[]",)
            cursor.execute(b"DEALLOCATE explained")
            cursor.execute(b"SET LOCAL plan_cache_mode = auto")
            for table in _scans_of_whole_tables(plan if isinstance(plan, list) else json.loads(plan)):
                yield mode, table


def _plain(value: Any) -> Any:
    return (
        [str(item) for item in value] if isinstance(value, list) and value and not isinstance(value[0], int) else value
    )


def _scans_of_whole_tables(plan: Any, limited: bool = False) -> Iterator[str]:
    if isinstance(plan, list):
        for part in plan:
            yield from _scans_of_whole_tables(part, limited)
    elif isinstance(plan, dict):
        scan, table = plan.get("Node Type", ""), plan.get("Relation Name")
        by_index = scan in ("Index Scan", "Index Only Scan")
        # An index that is read from end to end, to have the rows in its order, is a whole table in disguise; of one
        # that is read up to a limit, and nothing of it thrown away, only the first entries are read.
        first_entries = by_index and limited and "Filter" not in plan
        whole = scan == "Seq Scan" or (by_index and "Index Cond" not in plan and not first_entries)
        if whole and table in LARGE and plan.get("Index Name") not in OF_WHAT_WAITS:
            yield table
        for part in plan.values():
            yield from _scans_of_whole_tables(part, scan == "Limit")


# For the values at hand; and as a session plans a statement once it has repeated it a few times, for any values.
OWN, REUSED = "force_custom_plan", "force_generic_plan"


def check(books: Books, work: Callable[[sa.Connection], object], *modes: str) -> None:
    with planned(books, modes) as (connection, plans):
        work(connection)
    assert plans.found
    assert plans.scans() == []


def settling(books: Books, size: int) -> None:
    """Renewals, rows that are PENDING here, and payments unknown here."""
    renewed = [row.id for row in books.rows("renewal_attempts", "state = 'UNKNOWN'")][: max(1, size // 4)]
    with books.engine.connect() as connection:
        attempts = list(by_ids(connection, renewed).values())
    payments = [books.renewal(attempt, f"renewal {attempt.id}") for attempt in attempts]
    payments += [books.paid(f"payment {200 * n} 1", user=f"user {200 * n}") for n in range(1, size // 2 + 1)]
    payments += [books.paid(user=f"user {n * 10 + 1}", plan_id=n % 3) for n in range(size - len(payments))]

    def work(connection: sa.Connection) -> None:
        settled = settle_batch(connection, payments, stamp=books.stamp(), calendar=books.calendar, is_live=True)
        assert len(settled) == size

    check(books, work, OWN, REUSED)


def charging(books: Books) -> None:
    """Opening, claiming, closing."""
    due = [row.id for row in books.rows("subscriptions", "id % 500 = 0 AND id < 20000")]
    fresh = [books.planned(subscription_id) for subscription_id in due]
    again = [row.id for row in books.rows("renewal_attempts", "state = 'UNKNOWN'")][:16]

    def work(connection: sa.Connection) -> None:
        assert open_and_claim(connection, books.stamp(), fresh).sent_before
        claim(connection, books.stamp(), again, NOON - A_DAY, NOON, SHOP)
        attempts = by_ids(connection, again)
        assert close(connection, books.stamp(), [Closing(a, State.DECLINED, "declined") for a in attempts.values()])
        assert open_attempts(connection)

    check(books, work, OWN, REUSED)


def what_is_due(books: Books) -> None:
    """The slice of autopayment_job."""

    def work(connection: sa.Connection) -> None:
        found = fetch_due(connection, over_before=NOON, oldest=NOON - 30 * A_DAY, today=NOON)
        assert (len(found.due), found.too_old) == (SIZE // 500, SIZE // 50)

    check(books, work, OWN)


def what_is_over(books: Books) -> None:
    """The slice of expire_subscriptions_job, and its chunks."""
    bound = NOON - 3 * A_DAY

    def work(connection: sa.Connection) -> None:
        assert fetch_over(connection, bound, 100).over == SIZE // 50
        for wait in (False, True):
            chunk = expire_subscriptions(
                connection, books.stamp(), over_before=bound, reason="over", size=100, wait_for_locks=wait
            )
            assert chunk.expired == 100
        locked = lock_over(connection, bound, 100, None)
        assert locked is not None
        assert lock_over(connection, bound, 100, locked.last) is not None
        assert expire_locked(connection, books.stamp(), locked, over_before=bound, reason="over") == 100

    check(books, work, OWN, REUSED)


def stale_payments(books: Books) -> None:
    """The slice of expire_payments_job, and a chunk."""

    def work(connection: sa.Connection) -> None:
        rows = fetch_stale_payments(connection, NOON - 7 * A_DAY)
        assert len(rows) > 100
        assert expire_payments(connection, books.stamp(), [(row, "stale") for row in rows[:100]])

    check(books, work, OWN, REUSED)


def matching(books: Books) -> None:
    """The slices of both matching jobs."""
    # So many that PostgreSQL would rather read the whole table, were it asked for all of them at once.
    ids = [f"payment {n} {k}" for n in range(1, 20_000) for k in (0, 1)]

    def work(connection: sa.Connection) -> None:
        fetch_pending(connection, NOON - timedelta(hours=1), NOON, ids)
        assert len(fetch_rows(connection, ids)) == len(ids)
        assert len(fetch_settled(connection, ids)) == len(ids) / 2
        open_problems(connection, books.stamp(), [Problem("payment p", "metadata", "odd")])

    check(books, work, OWN)


def reconciling(books: Books) -> None:
    """A day's rows by the provider's ids, and rows that take the provider's truth."""
    ids = [f"payment {n} {k}" for n in range(1, 20_000) for k in (0, 1)]

    def work(connection: sa.Connection) -> None:
        rows = fetch_rows_of(connection, ids)
        assert len(rows) == len(ids)
        assert len(fetch_rows_of(connection, [], [row[0] for row in rows])) == len(ids)
        assert [row.id for row in lock_rows(connection, None, rows[0][0])] == [rows[0][0]]
        assert len(lock_rows(connection, ids[0], None)) == 1
        assert settled_row(connection, "payment 4711 1")

    check(books, work, OWN)


def a_day_is_one_scan(books: Books) -> None:
    """By the time of a change no index finds a row: one would cost the service at each write, for one read a day."""
    with planned(books, [OWN]) as (connection, plans):
        assert fetch_rows_of_day(connection, Day.of(NOON.date(), books.calendar))
    assert len(plans.scans()) == 1


def looking_back(books: Books) -> None:
    """A customer's case, and what the run history asks."""

    def work(connection: sa.Connection) -> None:
        audit = case_of_payment(connection, "payment 4711 1", None).audit
        assert [entry.external_payment_id for entry in audit] == ["payment 4711 1"]
        assert case_of_subscription(connection, 4711).payments
        written = audit[0].at
        assert runs_that_changed(connection, ["r", "s"], written - A_DAY / 24, written + A_DAY / 24) == {"r"}

    check(books, work, OWN)


def money_checks_by_the_hour(books: Books) -> None:
    """They look back some days, whatever lies before them; so do the numbers over time."""

    def work(connection: sa.Connection) -> None:
        for money_check in CHECKS:
            money_check.ask(connection, NOON)
        numbers(connection, NOON)

    check(books, work, OWN)


def quarantine_every_five_minutes(books: Books) -> None:
    """What is open, among years of what was resolved."""

    def work(connection: sa.Connection) -> None:
        waiting, last = count_and_last(connection)
        assert waiting == SIZE // 500
        assert entries_since(connection, last - 1, 1000)
        quarantine_page(connection, NOON)

    check(books, work, OWN)


def doctor(books: Books) -> None:
    """All that it asks of the database. Shared ids are looked for only where nothing forbids them: one scan."""
    books.execute(
        "CREATE OR REPLACE VIEW renewal_view AS SELECT subscription_id, payment_method_id, true AS may_charge"
        " FROM billing_orchestration.saved_methods"
    )
    with planned(books, [OWN]) as (connection, plans):
        for look in DATABASE_CHECKS:
            assert list(look(connection, lambda: NOON))
        assert len(methods_due(connection, "renewal_view", NOON, NOON + 3 * A_DAY, 50)) == 50
    assert plans.found
    repeated = books.scalars("SELECT 1 WHERE to_regclass(:name) IS NULL", name=UNIQUE_INDEX)
    assert [scan for scan in plans.scans() if not repeated or "row_number() OVER" not in scan] == []


def a_scan_is_noticed(books: Books) -> None:
    """What this file looks for can be found."""
    with planned(books, [OWN, REUSED]) as (connection, plans):
        connection.execute(sa.text("SELECT max(updated_at) FROM payments WHERE amount = :amount"), {"amount": 1})
    assert len(plans.scans()) == 2


def test_every_statement_finds_its_rows_by_an_index(large: Books, subtests: pytest.Subtests) -> None:
    """One test, so that the data is made once; in it, each piece of work with either index on the payments' ids."""
    works = {
        "settling one": partial(settling, size=1),
        "settling a batch": partial(settling, size=200),
        "charging": charging,
        "what is due": what_is_due,
        "what is over": what_is_over,
        "stale payments": stale_payments,
        "matching": matching,
        "reconciling": reconciling,
        "a day is one scan": a_day_is_one_scan,
        "looking back": looking_back,
        "the money checks": money_checks_by_the_hour,
        "the quarantine": quarantine_every_five_minutes,
        "doctor": doctor,
        "a scan is noticed": a_scan_is_noticed,
    }
    for ids in ("unique", "repeated"):
        if ids == "repeated":
            large.tolerate_duplicates()
        for name, work in works.items():
            with subtests.test(f"{name}, payment ids are {ids}"):
                work(large)
