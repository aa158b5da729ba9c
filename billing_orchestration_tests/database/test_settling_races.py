"""Settling against everybody else who writes: other settlers, the service's webhook, expiry, charging.

The service takes none of our locks: its transactions here do what an ORM does, and nothing to be polite.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import partial

import psycopg
import pytest
import sqlalchemy as sa

from billing_orchestration.database.attempts import claim, close, open_and_claim
from billing_orchestration.database.audit import Stamp
from billing_orchestration.database.engine import create_engine, translate
from billing_orchestration.database.errors import DatabaseBusy
from billing_orchestration.database.expiry import expire_payments, expire_subscriptions, fetch_stale_payments
from billing_orchestration.database.settling import Settled, settle_batch
from billing_orchestration.database.settling_facts import ChangedMeanwhile
from billing_orchestration.domain.answers import Closing
from billing_orchestration.domain.attempts import State
from billing_orchestration.domain.provider_payment import ProviderPayment
from billing_orchestration.domain.settlement_decisions import CloseAsGranted, Leave, Settle
from billing_orchestration_tests.books import NOON, Books, naive
from billing_orchestration_tests.domain.given import SHOP
from billing_orchestration_tests.waiting import at_once, start_blocked

MONTH_LATER = NOON.replace(month=4)
TWO_MONTHS_LATER = NOON.replace(month=5)
A_DAY = timedelta(days=1)


def persistently(books: Books, *payments: ProviderPayment) -> list[Settled]:
    """Settle as the jobs do: the batch, then each payment by itself as long as rows change meanwhile."""
    try:
        return books.settle(*payments)
    except (ChangedMeanwhile, sa.exc.IntegrityError):
        return [_one(books, payment) for payment in payments]


def _one(books: Books, payment: ProviderPayment) -> Settled:
    for _ in range(3):
        try:
            return books.settle(payment)[0]
        except (ChangedMeanwhile, sa.exc.IntegrityError):
            continue
    raise AssertionError(f"{payment.id} was not settled in three tries")


# Many settlers


def test_eight_settlers_of_the_same_payments_grant_each_once(books: Books) -> None:
    payments = [books.paid(user=f"user {number}") for number in range(40)]
    for payment in payments[::2]:
        books.payment(payment.id)

    def settle(seed: int) -> list[Settled]:
        mine = list(payments)
        random.Random(seed).shuffle(mine)
        return books.settle(*mine)

    results = at_once([partial(settle, seed) for seed in range(8)])
    grants = [result for settled in results for result in settled if isinstance(result.decision, Settle)]
    assert sorted(result.payment.id for result in grants) == sorted(payment.id for payment in payments)
    assert all(isinstance(result.decision, (Settle, Leave)) for settled in results for result in settled)
    assert len(books.rows("subscriptions")) == len(books.rows("payments")) == len(books.rows("settlements")) == 40


def test_eight_settlers_of_one_renewal_extend_it_once(flawed_books: Books) -> None:
    books = flawed_books
    subscription_id = books.subscription()
    payment = books.renewal(books.attempt(subscription_id))
    at_once([partial(books.settle, payment) for _ in range(8)])
    assert books.ended_at(subscription_id) == MONTH_LATER
    assert len(books.rows("payments")) == 1


def test_eight_payments_of_one_customer_and_plan_make_one_subscription_of_eight_periods(books: Books) -> None:
    plan_id = books.plan(duration=1, unit="days")
    payments = [books.paid(plan_id=plan_id) for _ in range(8)]
    at_once([partial(books.settle, payment) for payment in payments])
    (subscription,) = books.rows("subscriptions")
    assert subscription.ended_at - subscription.started_at == 8 * A_DAY
    assert {row.subscription_id for row in books.rows("payments")} == {subscription.id}


def test_payments_of_one_customer_for_two_plans_make_two_subscriptions(books: Books) -> None:
    plans = [books.monthly, books.plan()]
    at_once([partial(books.settle, books.paid(plan_id=plan_id)) for plan_id in plans])
    assert {row.plan_id for row in books.rows("subscriptions")} == set(plans)


def test_a_purchase_and_a_renewal_of_one_subscription_both_extend_it(books: Books) -> None:
    subscription_id = books.subscription("anna")
    renewal = books.renewal(books.attempt(subscription_id))
    # The payer of the renewal is told differently: no common lock on the customer, only the rows' own.
    foreign = {**renewal.metadata, "user_id": "somebody else"}
    works: list[Callable[[], object]] = [
        partial(persistently, books, replace(renewal, metadata=foreign)),
        partial(persistently, books, books.paid("purchase", user="anna")),
    ]
    at_once(works)
    assert books.ended_at(subscription_id) == TWO_MONTHS_LATER


def test_a_database_that_defaults_to_repeatable_read_changes_nothing_about_it(books: Books, database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as admin:
        name = admin.info.dbname
        admin.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'repeatable read'".encode())
    books.engine = create_engine(database_url, pool_size=20)
    plan_id = books.plan(duration=1, unit="days")
    payments = [books.paid(plan_id=plan_id) for _ in range(6)]
    at_once([partial(books.settle, payment) for payment in payments])
    (subscription,) = books.rows("subscriptions")
    assert subscription.ended_at - subscription.started_at == 6 * A_DAY
    books.engine.dispose()


# The service's webhook

WEBHOOK_INSERTS = """
    INSERT INTO payments (subscription_id, payment_provider_id, status, currency, amount, external_payment_id,
                          created_at, updated_at)
    VALUES (%s, %s, 'SUCCEEDED', 'RUB', 299, %s, '2026-03-12 12:00', '2026-03-12 12:00')
"""
WEBHOOK_INSERTS_NAMED = WEBHOOK_INSERTS.replace("%s, %s", ":subscription, :provider").replace("%s", ":id")


def test_a_webhook_that_finishes_the_row_first_is_waited_for_and_nothing_is_granted_again(
    books: Books, database_url: str
) -> None:
    subscription_id = books.subscription("anna")
    row_id = books.payment("p", subscription_id=subscription_id)
    payment = books.paid("p", user="anna")
    with ThreadPoolExecutor() as pool, psycopg.connect(database_url) as webhook:
        webhook.execute(b"UPDATE payments SET status = 'SUCCEEDED' WHERE id = %s", [row_id])
        webhook.execute(b"UPDATE subscriptions SET ended_at = %s WHERE id = %s", [naive(MONTH_LATER), subscription_id])
        settler = start_blocked(pool, books.engine, partial(books.settle, payment))
        webhook.commit()
        (settled,) = settler.result()
    assert isinstance(settled.decision, Leave)
    assert books.ended_at(subscription_id) == MONTH_LATER
    assert books.rows("settlements") == []


def test_a_webhook_that_gives_up_leaves_the_grant_to_the_settler(books: Books, database_url: str) -> None:
    row_id = books.payment("p")
    with ThreadPoolExecutor() as pool, psycopg.connect(database_url) as webhook:
        webhook.execute(b"UPDATE payments SET status = 'SUCCEEDED' WHERE id = %s", [row_id])
        settler = start_blocked(pool, books.engine, partial(books.settle, books.paid("p")))
        webhook.rollback()
        (settled,) = settler.result()
    assert isinstance(settled.decision, Settle)
    assert books.row("payments", row_id).status == "SUCCEEDED"


def test_a_webhook_that_inserts_the_row_first_is_waited_for_where_payment_ids_are_unique(
    books: Books, database_url: str
) -> None:
    payment = books.paid("p", user="anna")
    with ThreadPoolExecutor() as pool, psycopg.connect(database_url) as webhook:
        webhook.execute(WEBHOOK_INSERTS.encode(), [None, books.provider_id, "p"])
        settler = start_blocked(pool, books.engine, partial(persistently, books, payment))
        webhook.commit()
        (settled,) = settler.result()
    assert isinstance(settled.decision, Leave)
    assert len(books.rows("payments")) == 1
    assert books.rows("subscriptions") == []


@pytest.mark.parametrize("unique", [True, False])
def test_a_webhook_that_writes_a_renewals_row_and_extends_it_first_is_not_granted_again(
    unique: bool, books: Books, database_url: str
) -> None:
    if not unique:
        books.tolerate_duplicates()
    subscription_id = books.subscription("anna")
    attempt = books.attempt(subscription_id)
    with ThreadPoolExecutor() as pool, psycopg.connect(database_url) as webhook:
        webhook.execute(WEBHOOK_INSERTS.encode(), [subscription_id, books.provider_id, "renewal"])
        webhook.execute(b"UPDATE subscriptions SET ended_at = %s WHERE id = %s", [naive(MONTH_LATER), subscription_id])
        settler = start_blocked(pool, books.engine, partial(persistently, books, books.renewal(attempt)))
        webhook.commit()
        (settled,) = settler.result()
    assert isinstance(settled.decision, CloseAsGranted)
    assert books.ended_at(subscription_id) == MONTH_LATER
    assert len(books.rows("payments")) == 1
    assert books.read_attempt(attempt.id).state == State.SUCCEEDED


def test_a_webhook_that_writes_a_purchases_row_and_extends_first_is_not_granted_again(
    flawed_books: Books, database_url: str
) -> None:
    books = flawed_books
    subscription_id = books.subscription("anna")
    with ThreadPoolExecutor() as pool, psycopg.connect(database_url) as webhook:
        webhook.execute(WEBHOOK_INSERTS.encode(), [subscription_id, books.provider_id, "p"])
        webhook.execute(b"UPDATE subscriptions SET ended_at = %s WHERE id = %s", [naive(MONTH_LATER), subscription_id])
        settler = start_blocked(pool, books.engine, partial(persistently, books, books.paid("p", user="anna")))
        webhook.commit()
        (settled,) = settler.result()
    assert isinstance(settled.decision, Leave)
    assert books.ended_at(subscription_id) == MONTH_LATER
    assert len(books.rows("payments")) == 1


def test_a_subscription_that_the_service_cancels_meanwhile_is_not_extended_by_a_purchase(
    books: Books, database_url: str
) -> None:
    subscription_id = books.subscription("anna")
    with ThreadPoolExecutor() as pool, psycopg.connect(database_url) as service:
        service.execute(b"UPDATE subscriptions SET status = 'CANCELED' WHERE id = %s", [subscription_id])
        settler = start_blocked(pool, books.engine, partial(books.settle, books.paid("p", user="anna")))
        service.commit()
        assert settler.exception() is None
    (settled,) = settler.result()
    assert isinstance(settled.decision, Settle)
    assert settled.subscription_id != subscription_id
    assert books.ended_at(subscription_id) == NOON


def test_the_services_writer_waits_for_the_settler_and_sees_its_grant(books: Books, database_url: str) -> None:
    subscription_id = books.subscription("anna")
    extend = b"UPDATE subscriptions SET ended_at = ended_at + interval '1 day' WHERE id = %s"

    def webhook() -> None:
        with psycopg.connect(database_url) as service:
            service.execute(extend, [subscription_id])

    with ThreadPoolExecutor() as pool, books.engine.connect() as connection:
        settle_batch(
            connection,
            [books.paid("p", user="anna")],
            stamp=books.stamp(),
            calendar=books.calendar,
            is_live=False,
        )
        waiting = start_blocked(pool, books.engine, webhook)
        connection.commit()
        waiting.result()
    assert books.ended_at(subscription_id) == MONTH_LATER + A_DAY


@pytest.mark.parametrize("first", ["a row that is PENDING", "no row yet"])
def test_webhooks_and_settlers_of_the_same_payments_grant_each_once(
    books: Books, database_url: str, first: str
) -> None:
    """The webhook does what a sound one does: it looks at the row under lock, or inserts it and heeds the refusal.

    Where both insert, the two may deadlock (the row's index entry against the subscription): PostgreSQL ends one of
    them, which is repeated like any other failure, the webhook by its redelivery.
    """
    plan_id = books.plan(duration=1, unit="days")
    users = [f"user {number}" for number in range(5)]
    subscriptions = {user: books.subscription(user, plan_id=plan_id) for user in users}
    payments = [books.paid(f"p{number}", user=users[number % 5], plan_id=plan_id) for number in range(25)]
    exists = first == "a row that is PENDING"
    if exists:
        for payment in payments:
            books.payment(payment.id, subscription_id=subscriptions[str(payment.metadata["user_id"])])
    # So that a deadlock is found at once, not after the usual second.
    engine = create_engine(database_url, pool_size=20, session={"deadlock_timeout": "20ms"})
    extend = sa.text("UPDATE subscriptions SET ended_at = ended_at + interval '1 day' WHERE id = :id")

    def deliver(connection: sa.Connection, payment: ProviderPayment) -> None:
        subscription_id = subscriptions[str(payment.metadata["user_id"])]
        look = "SELECT status FROM payments WHERE external_payment_id = :id FOR UPDATE"
        status = connection.execute(sa.text(look), {"id": payment.id}).scalar()
        if status == "SUCCEEDED":
            return
        if status is None:
            values = {"subscription": subscription_id, "provider": books.provider_id, "id": payment.id}
            connection.execute(sa.text(WEBHOOK_INSERTS_NAMED), values)
        else:
            finish = "UPDATE payments SET status = 'SUCCEEDED' WHERE external_payment_id = :id"
            connection.execute(sa.text(finish), {"id": payment.id})
        connection.execute(extend, {"id": subscription_id})

    def settle(connection: sa.Connection, payment: ProviderPayment) -> None:
        settle_batch(connection, [payment], stamp=books.stamp(), calendar=books.calendar, is_live=False)

    def work(one: Callable[[sa.Connection, ProviderPayment], None], seed: int) -> int:
        failures = 0
        for payment in random.Random(seed).sample(payments, len(payments)):
            for _ in range(20):
                try:
                    with engine.begin() as connection:
                        one(connection, payment)
                    break
                except (ChangedMeanwhile, sa.exc.IntegrityError, sa.exc.OperationalError):
                    failures += 1
            else:
                raise AssertionError(f"{payment.id} did not get through in twenty tries")
        return failures

    failures = at_once([partial(work, one, seed) for seed, one in enumerate([settle, deliver] * 3)])
    assert not (exists and any(failures)), "nobody stands in anybody's way when there is a row to lock"
    for subscription_id in subscriptions.values():
        assert books.ended_at(subscription_id) == NOON + 5 * A_DAY
    assert [row.status for row in books.rows("payments")] == ["SUCCEEDED"] * 25
    assert len(books.rows("subscriptions")) == 5
    engine.dispose()


# Charging and expiry


def test_an_attempt_opened_while_a_late_success_is_settled_makes_it_a_second_success(
    books: Books, database_url: str
) -> None:
    subscription_id = books.subscription("anna")
    first = books.attempt(subscription_id, state=State.DECLINED)
    second = books.planned(subscription_id, number=2)
    with ThreadPoolExecutor() as pool, books.engine.connect() as charging:
        assert open_and_claim(charging, books.stamp(), [second]).sent_before == {second.id: False}
        settler = start_blocked(pool, books.engine, partial(persistently, books, books.renewal(first)))
        charging.commit()
        (settled,) = settler.result()
    assert getattr(settled.decision, "kind", None) == "second_success"
    assert books.ended_at(subscription_id) == NOON
    assert books.read_attempt(first.id).state == State.DECLINED


def test_a_lost_renewal_that_a_run_claims_at_this_moment_is_settled_as_that_attempts(
    books: Books, database_url: str
) -> None:
    subscription_id = books.subscription("anna")
    lost = books.planned(subscription_id)
    with ThreadPoolExecutor() as pool, books.engine.connect() as charging:
        assert open_and_claim(charging, books.stamp(), [lost]).sent_before
        settling = start_blocked(pool, books.engine, partial(persistently, books, books.renewal(lost)))
        charging.commit()
        (settled,) = settling.result()
    assert isinstance(settled.decision, Settle)
    assert books.read_attempt(lost.id).state == State.SUCCEEDED


def test_no_attempt_is_opened_for_a_period_that_a_late_success_is_paying(books: Books) -> None:
    subscription_id = books.subscription("anna")
    first = books.attempt(subscription_id, state=State.DECLINED)
    second = books.planned(subscription_id, number=2)

    def charge() -> object:
        with books.engine.begin() as connection:
            return set(open_and_claim(connection, books.stamp(), [second]).sent_before)

    with ThreadPoolExecutor() as pool, books.engine.connect() as settler:
        settle_batch(settler, [books.renewal(first)], stamp=books.stamp(), calendar=books.calendar, is_live=False)
        charging = start_blocked(pool, books.engine, charge)
        settler.commit()
        assert charging.result() == set()


# Deadlocks: two transactions that want the same two rows, each holding one of them, with a third one in the way so
# that both are certainly under way.


def blocked_pair(
    books: Books, database_url: str, gate: str, first: Callable[[], object], second: Callable[[], object]
) -> None:
    """Hold `gate` (a locking SELECT) until both wait, then let go: both must end, neither as a deadlock's victim."""
    with ThreadPoolExecutor() as pool, psycopg.connect(database_url) as other:
        other.execute(gate.encode())
        one = start_blocked(pool, books.engine, first)
        two = start_blocked(pool, books.engine, second, waiting=2)
        other.commit()
        one.result()
        two.result()


def test_two_runs_that_open_attempts_of_the_same_periods_wait_for_each_other(books: Books, database_url: str) -> None:
    """They may disagree on the number, so that the attempts have other ids, in another order."""
    ids = [books.subscription() for _ in range(8)]
    stamp = books.stamp()
    runs = [[books.planned(subscription_id, number=number) for subscription_id in ids] for number in (1, 2)]
    orders = [[a.subscription_id for a in sorted(run, key=lambda attempt: attempt.id)] for run in runs]
    assert orders[0] != orders[1]
    # Whoever comes first is stopped at the first period, and whoever goes by ids holds others by then.
    gate = books.planned(ids[0], number=3)
    with ThreadPoolExecutor() as pool, books.engine.connect() as other:
        assert open_and_claim(other, stamp, [gate]).sent_before
        one, two = (
            start_blocked(
                pool,
                books.engine,
                in_transaction(books, partial(open_and_claim, stamp=stamp, attempts=run)),
                waiting=waiting,
            )
            for waiting, run in enumerate(runs, start=1)
        )
        other.rollback()
        assert sum(len(looked.result().sent_before) for looked in (one, two)) == len(ids)  # type: ignore[attr-defined]
    assert len(books.rows("renewal_attempts")) == len(ids)


def settler_of(books: Books, *payments: ProviderPayment) -> Callable[[], object]:
    return partial(books.settle, *payments)


def in_transaction(books: Books, work: Callable[[sa.Connection], object]) -> Callable[[], object]:
    def run() -> object:
        with books.engine.begin() as connection:
            return work(connection)

    return run


def over(books: Books, connection: sa.Connection, size: int = 100) -> int:
    return expire_subscriptions(
        connection, books.stamp(), over_before=NOON + A_DAY, reason="over", size=size, wait_for_locks=True
    ).expired


def test_expiry_that_waits_locks_subscriptions_in_the_order_of_settling(books: Books, database_url: str) -> None:
    # By id: 1, 2, 3. By end: 3, 2, 1.
    users = ["anna", "berta", "clara"]
    ids = [books.subscription(user, ended_at=NOON - index * A_DAY) for index, user in enumerate(users)]
    blocked_pair(
        books,
        database_url,
        f"SELECT FROM subscriptions WHERE id = {ids[1]} FOR UPDATE",
        settler_of(books, *(books.paid(user=user) for user in users)),
        in_transaction(books, partial(over, books)),
    )
    assert {row.status for row in books.rows("subscriptions")} == {"ACTIVE"}


def test_expiry_lets_go_of_a_chunk_that_is_held_before_it_takes_the_next(books: Books) -> None:
    first, oldest = (
        books.subscription("anna", ended_at=NOON - A_DAY),
        books.subscription("berta", ended_at=NOON - 2 * A_DAY),
    )
    attempt = books.planned(oldest)
    with ThreadPoolExecutor() as pool, books.engine.connect() as charging:
        assert open_and_claim(charging, books.stamp(), [attempt]).sent_before
        expiring = start_blocked(pool, books.engine, in_transaction(books, partial(over, books, size=1)))
        # Has the first one, and waits for the oldest behind expiry.
        settling = start_blocked(
            pool, books.engine, settler_of(books, books.paid(user="anna"), books.paid(user="berta")), waiting=2
        )
        charging.commit()
        settling.result()
        expiring.result()
    assert books.ended_at(first) == MONTH_LATER - A_DAY
    assert books.row("subscriptions", oldest).status == "ACTIVE"


def test_charging_locks_subscriptions_in_the_order_of_settling(books: Books, database_url: str) -> None:
    users = ["anna", "berta", "clara"]
    ids = [books.subscription(user) for user in users]
    planned = [books.planned(subscription_id) for subscription_id in reversed(ids)]
    blocked_pair(
        books,
        database_url,
        f"SELECT FROM subscriptions WHERE id = {ids[1]} FOR UPDATE",
        settler_of(books, *(books.paid(user=user) for user in users)),
        in_transaction(books, lambda connection: open_and_claim(connection, books.stamp(), planned)),
    )
    assert books.rows("renewal_attempts") == []


@pytest.mark.parametrize("again", ["close", "claim"])
def test_charging_locks_attempts_in_the_order_of_settling(books: Books, database_url: str, again: str) -> None:
    ids = [books.subscription(f"user {number}") for number in range(6)]
    # Written in the reverse order, so that whoever takes them as they lie in the table starts at the other end.
    attempts = [books.attempt(subscription_id) for subscription_id in reversed(ids)]
    first = attempts[-1]
    assert min(attempt.id for attempt in attempts) != first.id
    stamp = books.stamp()

    def work(connection: sa.Connection) -> object:
        if again == "claim":
            return claim(connection, stamp, [a.id for a in attempts], NOON - A_DAY, NOON, SHOP)
        return close(connection, stamp, [Closing(a, State.UNKNOWN, "silence") for a in attempts])

    blocked_pair(
        books,
        database_url,
        f"SELECT FROM billing_orchestration.renewal_attempts WHERE id = '{first.id}' FOR UPDATE",
        settler_of(books, *(books.renewal(attempt, f"p{attempt.subscription_id}") for attempt in attempts)),
        in_transaction(books, work),
    )
    assert {row.state for row in books.rows("renewal_attempts")} == {State.SUCCEEDED}


ACTORS, ROUNDS = 6, 60


def test_settling_charging_and_both_expiries_in_any_order_never_deadlock(flawed_books: Books) -> None:
    """Hundreds of transactions over the same few rows, in threads, each picking at random; and the service, which
    now and then keeps one row for some milliseconds, so that others queue up with what they hold."""
    books = flawed_books
    stamp = Stamp("job", "run", NOON)
    plan_id = books.plan(duration=1, unit="days")
    users = [f"user {number}" for number in range(8)]
    ends = {user: NOON - index * A_DAY for index, user in enumerate(users)}
    subscriptions = [books.subscription(user, ended_at=ends[user], plan_id=plan_id) for user in users]
    paid: set[str] = set()

    def settle(chance: random.Random) -> None:
        payments = []
        for user in chance.sample(users, 4):
            payment = books.paid(user=user, plan_id=plan_id)
            if chance.random() < 0.5:
                books.payment(payment.id, status=chance.choice(["PENDING", "EXPIRED"]))
            payments.append(payment)
        for row in books.rows("renewal_attempts", "state IN ('PLANNED', 'UNKNOWN', 'PENDING')"):
            if row.user_id not in {payment.metadata["user_id"] for payment in payments}:
                payments.append(books.renewal(books.read_attempt(row.id), f"renewal {row.id}"))
        persistently(books, *payments)
        paid.update(payment.id for payment in payments)

    def charge(chance: random.Random) -> None:
        planned = [books.planned(id_, number=chance.randrange(1, 9)) for id_ in chance.sample(subscriptions, 8)]
        with books.engine.begin() as connection:
            opened = set(open_and_claim(connection, stamp, planned).sent_before)
        with books.engine.begin() as connection:
            claim(connection, stamp, [attempt.id for attempt in planned], NOON - A_DAY, NOON, SHOP)
        states = [State.UNKNOWN, State.PENDING, State.DECLINED, State.DECLINED]
        closings = [Closing(a, chance.choice(states), "answer") for a in planned if a.id in opened]
        with books.engine.begin() as connection:
            close(connection, stamp, closings)

    def expire(chance: random.Random) -> None:
        wait = chance.random() < 0.8
        with books.engine.begin() as connection:
            expire_subscriptions(
                connection, stamp, over_before=NOON + 90 * A_DAY, reason="over", size=5, wait_for_locks=wait
            )

    def expire_stale(chance: random.Random) -> None:
        with books.engine.begin() as connection:
            rows = fetch_stale_payments(connection, NOON + A_DAY)
            chance.shuffle(rows)
            expire_payments(connection, stamp, [(row, "stale") for row in rows])

    def serve(chance: random.Random) -> None:
        with books.engine.begin() as connection:
            reopen = "UPDATE subscriptions SET status = 'ACTIVE' WHERE id = :id"
            connection.execute(sa.text(reopen), {"id": chance.choice(subscriptions)})
            connection.execute(sa.text("SELECT pg_sleep(0.003)"))

    def work(seed: int) -> list[str]:
        chance = random.Random(seed)
        failures = []
        for _ in range(ROUNDS):
            actor = chance.choice([settle, charge, expire, expire_stale, serve, serve])
            try:
                actor(chance)
            except sa.exc.OperationalError as error:
                failures.append(f"{actor.__name__}: {translate(error)}")
        return failures

    assert list(itertools.chain(*at_once([partial(work, seed) for seed in range(ACTORS)]))) == []
    settled = books.rows("settlements")
    assert len(settled) > 2 * ROUNDS
    assert {row.external_payment_id for row in settled} <= paid
    live = ("PLANNED", "UNKNOWN", "PENDING", "SUCCEEDED", "REVIEW", "REFUNDED")
    periods = [(row.subscription_id, row.period_start) for row in books.rows("renewal_attempts") if row.state in live]
    assert len(periods) == len(set(periods))
    # Every period that was granted is in an end, and nothing else is: no extension was lost or made twice.
    for user in users:
        granted = [row.period_end - row.period_start for row in settled if row.user_id == user]
        lasted = [
            row.ended_at - (naive(ends[user]) if row.id in subscriptions else row.started_at)
            for row in books.rows("subscriptions", "user_id = :user", user=user)
        ]
        assert sum(lasted, timedelta()) == sum(granted, timedelta()), user


def test_a_lock_that_is_not_given_back_fails_the_batch_and_writes_nothing(books: Books, database_url: str) -> None:
    books.payment("p")
    before = books.snapshot()
    impatient = create_engine(database_url, session={"lock_timeout": "200ms"})
    with psycopg.connect(database_url) as service:
        service.execute(b"SELECT FROM payments FOR UPDATE")
        books.engine, patient = impatient, books.engine
        with pytest.raises(sa.exc.OperationalError) as failure:
            books.settle(books.paid("p"))
    assert isinstance(translate(failure.value), DatabaseBusy)
    books.engine = patient
    impatient.dispose()
    assert books.snapshot() == before
