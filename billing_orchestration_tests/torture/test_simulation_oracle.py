"""The simulation's judge can complain: for each thing that it says there are books that make it say so.

Some quiet days are played once; each test gets a copy of their database and of the provider's ledger, in which all is
well, spoils something, and wants to hear of it.
"""

from __future__ import annotations

import copy
import json
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from http.client import HTTPMessage
from typing import Any

import psycopg
import pytest

from billing_orchestration.provider.wire import Answer
from billing_orchestration_tests.fixtures.postgres import Server
from billing_orchestration_tests.torture.simulation.judge import DAY, Journal, Rules
from billing_orchestration_tests.torture.simulation.oracle import Oracle
from billing_orchestration_tests.torture.simulation.story import Simulation
from billing_orchestration_tests.torture.simulation.traits import Traits, draw_traits
from billing_orchestration_tests.torture.simulation.world import World

SEED, DAYS = 7, 14
RENEWED = "SELECT external_payment_id FROM one_renewal"
OURS = f"external_payment_id = ({RENEWED})"


@dataclass
class Played:
    """What a simulation has left behind."""

    database: str
    simulation: Simulation


@dataclass
class Books:
    """A copy of it, to be spoiled."""

    connection: psycopg.Connection[Any]
    journal: Journal
    oracle: Oracle
    ledger: list[Any]
    payments: dict[str, Any]
    now: datetime

    def execute(self, statement: str) -> None:
        """Spoil the tables."""
        for index in ("payments", "renewal_attempts"):
            found = self.connection.execute(
                "SELECT format('%%I.%%I', schemaname, indexname) FROM pg_indexes"
                " WHERE tablename = %s AND indexname NOT LIKE '%%pkey'", (index,)
            )  # fmt: skip
            for (name,) in found.fetchall():
                with suppress(psycopg.errors.DependentObjectsStillExist):
                    self.connection.execute(f"DROP INDEX {name}")
        self.connection.execute("SET session_replication_role = replica")
        assert self.connection.execute(statement).rowcount, "nothing was spoiled"

    def renewed(self) -> str:
        """A renewal of ours that was settled."""
        found = self.connection.execute(RENEWED).fetchone()
        assert found is not None
        return str(found[0])

    def complaints(self) -> list[str]:
        """What the judge says every day."""
        return self.oracle.violations(self.ledger, self.payments, self.now)

    def unsettled(self) -> list[str]:
        """What it says after a green tick."""
        return self.oracle.unsettled(self.ledger, self.payments, self.now, self.now)


@pytest.fixture(scope="module")
def played(postgres_server: Server, migrated_template: str) -> Iterator[Played]:
    """Quiet days of a small service; the connections are closed, so that the database can be copied."""
    database = postgres_server.create_database(migrated_template)
    traits = replace(
        draw_traits(SEED), accidents=0.0, zone="UTC", writes_unknown=True, settles_renewals="leave",
        provider_skew=timedelta(0), service_skew=timedelta(0), list_lag=timedelta(0), max_concurrency=1,
    )  # fmt: skip
    simulation = Simulation(postgres_server.url(database), SEED, traits=traits)
    try:
        simulation.play(DAYS)
        assert not simulation.world.faults
        # One that nobody refunded, so that each test spoils a sound one.
        simulation.world.connection.execute(
            "CREATE TABLE one_renewal AS SELECT external_payment_id FROM billing_orchestration.settlements"
            " WHERE kind = 'renewed' AND NOT external_payment_id = ANY(%s) ORDER BY settled_at LIMIT 1",
            (list(simulation.world.journal.refunded),),
        )
    finally:
        simulation.world.close()
    yield Played(database, simulation)
    postgres_server.drop_database(database)


@pytest.fixture
def books(postgres_server: Server, played: Played) -> Iterator[Books]:
    """A copy for one test."""
    world = played.simulation.world
    with postgres_server.database(played.database) as url, psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET TIME ZONE 'UTC'")
        journal = copy.deepcopy(world.journal)
        rules = Rules(timezone.utc, world.traits.grace_days, world.traits.ttl_days, timedelta(0), timedelta(0))
        yield Books(
            connection, journal, Oracle(connection, journal, rules), copy.deepcopy(world.provider.ledger()),
            copy.deepcopy(world.payments()), world.now,
        )  # fmt: skip


def test_it_has_nothing_to_say_about_books_that_agree(books: Books) -> None:
    assert books.complaints() == []
    assert books.unsettled() == []
    assert books.oracle.stale_subscriptions(books.now - DAY) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, "CHARGED TWICE: payment"),
        ({"payment_id": "another"}, "CHARGED TWICE: key"),
        ({"payment_id": "another", "idempotence_key": "another"}, "CHARGED TWICE: subscription and period"),
    ],
)
def test_it_sees_a_second_charge(books: Books, change: dict[str, str], complaint: str) -> None:
    entry = next(entry for entry in books.ledger if entry.kind == "charge" and entry.payment_id == books.renewed())
    books.ledger.append(replace(entry, **change))

    assert any(words.startswith(complaint) for words in books.complaints())


SPOILED_TABLES = {
    "another amount in the settlement": (
        f"UPDATE billing_orchestration.settlements SET amount = 1 WHERE {OURS}", "says 1.00"),
    "a settlement out of nothing": (
        f"UPDATE billing_orchestration.settlements SET external_payment_id = 'made-up' WHERE {OURS}",
        "GRANTED UNPAID: settlement of made-up"),
    "a grant without a payment row": (f"DELETE FROM payments WHERE {OURS}", "has 0 finished payment rows"),
    "a grant with two payment rows": (
        "INSERT INTO payments SELECT id + 100000, subscription_id, payment_provider_id, payment_method, status,"
        f" currency, amount, external_payment_id, created_at, updated_at FROM payments WHERE {OURS}",
        "has 2 finished payment rows"),
    "another amount in the row": (f"UPDATE payments SET amount = 1 WHERE {OURS}", "the ledger"),
    "a row of another subscription": (
        f"UPDATE payments SET subscription_id = subscription_id + 1 WHERE {OURS}", "its grant went to"),
    "a refund that nobody made": (f"UPDATE payments SET status = 'REFUNDED' WHERE {OURS}", "nobody refunded"),
    "a finished row without a grant": (
        f"DELETE FROM billing_orchestration.settlements WHERE {OURS}", "is SUCCEEDED without a grant"),
    "a grant that is called a refund": (
        f"UPDATE billing_orchestration.settlements SET kind = 'refunded' WHERE {OURS}", "recorded as refunded"),
    "an end that was moved": (
        "UPDATE subscriptions SET ended_at = ended_at + interval '1 day' WHERE id = (SELECT subscription_id FROM"
        f" payments WHERE {OURS})", "paid periods of"),
    "a start that was moved": (
        "UPDATE subscriptions SET started_at = started_at + interval '1 day' WHERE id = (SELECT subscription_id FROM"
        f" payments WHERE {OURS})", "and now says"),
    "a subscription that is gone": (
        f"DELETE FROM subscriptions WHERE id = (SELECT subscription_id FROM payments WHERE {OURS})",
        "which does not exist"),
    "an attempt that stays unknown": (
        "UPDATE billing_orchestration.renewal_attempts SET state = 'UNKNOWN', last_sent_at = now() - interval '9 years'"
        f" WHERE {OURS}", "OPEN TOO LONG: attempt"),
    "an attempt that is pending and paid": (
        f"UPDATE billing_orchestration.renewal_attempts SET state = 'PENDING' WHERE {OURS}",
        "is PENDING, the provider says succeeded"),
    "a subscription that is expired and not over": (
        "UPDATE subscriptions SET status = 'EXPIRED', ended_at = now() + interval '9 years' WHERE id = (SELECT"
        f" subscription_id FROM payments WHERE {OURS})", "EXPIRED TOO EARLY"),
    "a subscription that is expired while it is charged": (
        "WITH a AS (UPDATE billing_orchestration.renewal_attempts SET state = 'UNKNOWN' WHERE "
        f"{OURS} RETURNING subscription_id) UPDATE subscriptions SET status = 'EXPIRED' FROM a"
        " WHERE id = a.subscription_id",
        "EXPIRED IN THE MIDDLE OF A CHARGE"),
    "a decline without a reason": (
        "UPDATE billing_orchestration.renewal_attempts SET last_error = ' ', state = 'DECLINED'"
        f" WHERE {OURS}", "WITHOUT A REASON: renewal_attempts"),
    "a change without a reason": (
        "UPDATE billing_orchestration.audit_trail SET reason = ''", "WITHOUT A REASON: audit_trail"),
    "a problem without a reason": (
        "INSERT INTO billing_orchestration.quarantine (problem_key, kind, reason, evidence, job, run_id, opened_at)"
        " VALUES ('payment x:metadata', 'metadata', '', '{}', 'm', 'r', now())", "WITHOUT A REASON: quarantine"),
}  # fmt: skip


@pytest.mark.parametrize("spoiled", SPOILED_TABLES)
def test_it_sees_spoiled_tables(books: Books, spoiled: str) -> None:
    statement, complaint = SPOILED_TABLES[spoiled]
    books.execute(statement)

    assert any(complaint in words for words in books.complaints()), books.complaints()


@pytest.mark.parametrize(("began", "has_asked"), [(-1, False), (1, True)])
def test_only_a_run_after_the_last_send_has_asked_about_a_pending_charge(
    books: Books, began: int, has_asked: bool
) -> None:
    sent_at = books.now - timedelta(hours=1)
    books.execute(
        f"UPDATE billing_orchestration.renewal_attempts SET state = 'PENDING', last_sent_at = '{sent_at}' WHERE {OURS}"
    )
    books.journal.undisturbed["autopayment_job"] = [sent_at + timedelta(seconds=began)]

    assert any("is PENDING" in words for words in books.complaints()) == has_asked


def test_it_sees_a_grant_of_the_services_for_what_was_granted_here(books: Books) -> None:
    books.journal.service_grants[books.renewed()] = 1
    books.journal.service_grants["made-up"] = 1

    found = "\n".join(books.complaints())
    assert "GRANTED TWICE" in found
    assert "GRANTED UNPAID: made-up" in found


def test_it_sees_a_grant_of_what_was_refunded_or_to_be_set_aside(books: Books) -> None:
    books.journal.refunded[books.renewed()] = False
    books.journal.poisoned[books.renewed()] = "metadata"

    found = "\n".join(books.complaints())
    assert "refunded in full before it was granted" in found
    assert "GRANTED WRONGLY" in found


def test_it_sees_a_paid_payment_that_is_lost_or_set_aside_or_not_shown(books: Books) -> None:
    books.execute(f"DELETE FROM payments WHERE {OURS}")
    lost = books.renewed()
    books.execute(f"DELETE FROM billing_orchestration.settlements WHERE {OURS}")
    assert any(f"NOT GRANTED: {lost}" in words and words.endswith("lost") for words in books.unsettled())

    books.journal.poisoned[lost] = "metadata"
    assert any(f"NOT SHOWN: {lost}" in words for words in books.unsettled())

    del books.journal.poisoned[lost]
    books.execute(
        "INSERT INTO billing_orchestration.quarantine (problem_key, kind, reason, evidence, job, run_id, opened_at,"
        f" external_payment_id) VALUES ('x', 'metadata', 'y', '{{}}', 'm', 'r', now(), '{lost}')"
    )
    assert any("nothing was wrong with it" in words for words in books.unsettled())


def test_it_sees_a_row_that_the_service_wrote_and_nobody_granted(books: Books) -> None:
    books.journal.service_rows.add(books.renewed())
    books.execute(f"DELETE FROM billing_orchestration.settlements WHERE {OURS}")

    assert any("NOT GRANTED" in words for words in books.unsettled())


def test_it_sees_what_the_expiring_jobs_have_left(books: Books) -> None:
    books.execute(f"UPDATE payments SET status = 'PENDING', created_at = created_at - interval '1 year' WHERE {OURS}")
    books.execute("UPDATE subscriptions SET status = 'ACTIVE', ended_at = ended_at - interval '1 year'")

    assert any("OPEN TOO LONG: payment" in words for words in books.oracle.stale_payments(books.payments, books.now))
    assert any("OPEN TOO LONG: subscription" in words for words in books.oracle.stale_subscriptions(books.now))


@pytest.mark.parametrize("reason", [None, "", " "])
def test_it_sees_a_due_subscription_of_which_a_run_says_nothing(books: Books, reason: str | None) -> None:
    books.execute("UPDATE subscriptions SET status = 'ACTIVE'")
    due = books.oracle.due(books.now, 30)
    assert due
    decisions = [{"subject": f"subscription {number}", "reason": "told"} for number in due]

    assert books.oracle.unexplained(due, decisions) == []
    spoiled = [{**decisions[0], "reason": reason}, *decisions[1:]]
    assert len(books.oracle.unexplained(due, spoiled)) == 1


def test_it_sees_due_subscriptions_that_could_be_charged_and_were_not(books: Books) -> None:
    sent = books.oracle.rows(
        f"SELECT subscription_id, period_start FROM billing_orchestration.renewal_attempts WHERE {OURS}"
    )
    assert books.oracle.not_charged({row.subscription_id: row.period_start for row in sent}) == []

    books.execute(
        "DELETE FROM payments WHERE external_payment_id IN"
        " (SELECT external_payment_id FROM billing_orchestration.renewal_attempts)"
    )
    books.execute("UPDATE billing_orchestration.renewal_attempts SET state = 'DECLINED', first_sent_at = NULL,"
                  " last_sent_at = NULL, period_start = period_start - interval '1 year'")  # fmt: skip
    books.execute(f"UPDATE subscriptions SET status = 'ACTIVE', ended_at = '{books.now - timedelta(hours=1)}'")
    chargeable = books.oracle.chargeable(books.now, books.now)

    assert chargeable
    assert [words.partition(" ended")[0] for words in books.oracle.not_charged(chargeable)] == [
        f"NOT CHARGED: subscription {number}" for number in chargeable
    ]


# --- At the wire


def first_send(books: Books) -> tuple[str, dict[str, Any]]:
    """A renewal of the books as if it were about to be sent for the first time in its life, and all were well."""
    payment_id = books.renewed()
    books.execute(
        "UPDATE subscriptions s SET status = 'ACTIVE', ended_at = a.period_start AT TIME ZONE 'UTC'"
        f" FROM billing_orchestration.renewal_attempts a WHERE a.{OURS} AND s.id = a.subscription_id"
    )
    books.execute(f"UPDATE billing_orchestration.renewal_attempts SET state = 'PLANNED', sends = 1 WHERE {OURS}")
    books.execute(
        "UPDATE prices p SET amount = a.amount FROM billing_orchestration.renewal_attempts a"
        f" WHERE a.{OURS} AND p.plan_id = a.plan_id AND p.currency::text = a.currency"
    )
    row = books.connection.execute(
        f"SELECT idempotence_key::text, body, period_start FROM billing_orchestration.renewal_attempts WHERE {OURS}"
    ).fetchone()
    assert row is not None
    # Nothing has happened to its subscription since it was looked at.
    books.execute("UPDATE billing_orchestration.settlements SET settled_at = settled_at - interval '1 year'")
    books.journal.touched.clear()
    del books.payments[payment_id]
    books.now = row[2] + timedelta(minutes=1)
    return row[0], json.loads(row[1])


LONG_AGO = datetime(2000, 1, 1, tzinfo=timezone.utc)


def sent(books: Books, key: str, body: dict[str, Any], began: datetime = LONG_AGO) -> list[str]:
    """What the judge says about it, sent by a run that `began` then."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    wrong = books.oracle.wrong_send(key, text, began)
    return [*wrong, *books.oracle.wrong_charge(key, text, books.payments.values(), books.now, books.now)]


def test_it_has_nothing_to_say_about_a_right_charge(books: Books) -> None:
    assert sent(books, *first_send(books)) == []


WRONG_SENDS = {
    "a key that nobody wrote down": ("", "SENT WITHOUT A RECORD: key"),
    "a first send that is not committed": (
        f"UPDATE billing_orchestration.renewal_attempts SET first_sent_at = NULL WHERE {OURS}", "first_sent_at"),
    "another body": (f"UPDATE billing_orchestration.renewal_attempts SET body = '{{}}' WHERE {OURS}", "another body"),
    "an attempt that is closed": (
        f"UPDATE billing_orchestration.renewal_attempts SET state = 'STOPPED' WHERE {OURS}", "is STOPPED"),
    "a subscription that was canceled": ("UPDATE subscriptions SET status = 'CANCELED'", "CHARGED UNWANTED: key"),
    "a period that is paid": (
        "UPDATE subscriptions SET ended_at = ended_at + interval '1 month'", "CHARGED UNWANTED: key"),
    "a plan that does not recur": ("UPDATE plans SET is_recurring = false", "is not recurring"),
    "another price": ("UPDATE prices SET amount = amount + 1", "CHARGED WRONGLY"),
    "two prices": ("INSERT INTO prices (plan_id, currency, amount) SELECT plan_id, currency, 1 FROM prices",
                   "CHARGED WRONGLY"),
    "another customer": ("UPDATE subscriptions SET user_id = 'somebody else'", "CHARGED A STRANGER"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_SENDS)
def test_it_sees_a_charge_that_must_not_be_sent(books: Books, wrong: str) -> None:
    key, body = first_send(books)
    statement, complaint = WRONG_SENDS[wrong]
    if statement:
        books.execute(statement)
    else:
        key = str(uuid.uuid4())

    assert any(complaint in words for words in sent(books, key, body)), sent(books, key, body)


def test_a_subscription_may_change_after_the_last_look_at_it_and_not_before(books: Books) -> None:
    key, body = first_send(books)
    number = int(body["metadata"]["subscription_id"])
    looked_at = books.now.replace(tzinfo=timezone.utc) - timedelta(seconds=10)
    books.execute(f"UPDATE billing_orchestration.renewal_attempts SET last_sent_at = '{looked_at}' WHERE {OURS}")
    books.execute(f"UPDATE subscriptions SET status = 'PAUSED' WHERE id = {number}")

    books.journal.touched[number] = looked_at + timedelta(seconds=1)
    assert sent(books, key, body) == []
    books.journal.touched[number] = looked_at - timedelta(seconds=1)
    assert any("CHARGED UNWANTED" in words for words in sent(books, key, body))


@pytest.mark.parametrize(("later", "is_seen"), [(0, False), (1, True)])
def test_it_sees_a_charge_whose_subscription_was_looked_at_by_an_earlier_run_only(
    books: Books, later: int, is_seen: bool
) -> None:
    key, body = first_send(books)
    claimed_at = books.now.replace(tzinfo=timezone.utc)
    books.execute(f"UPDATE billing_orchestration.renewal_attempts SET last_sent_at = '{claimed_at}' WHERE {OURS}")

    found = sent(books, key, body, began=claimed_at + timedelta(seconds=later))

    assert any("SENT WITHOUT A LOOK" in words for words in found) == is_seen, found


def test_it_sees_a_charge_before_its_day_and_long_after_it(books: Books) -> None:
    key, body = first_send(books)
    books.now -= 2 * DAY
    assert any("CHARGED EARLY" in words for words in sent(books, key, body))
    books.now += 60 * DAY
    assert any("CHARGED TOO LATE" in words for words in sent(books, key, body))


@pytest.mark.parametrize(
    ("reasons", "days_later", "complaint"),
    [
        (["insufficient_funds"], 1, None),
        (["insufficient_funds"], 9, "CHARGED TOO LATE"),
        (["card_expired"], 1, "CHARGED AGAIN"),
        (["3d_secure_failed"], 1, "CHARGED AGAIN"),
        (["canceled_by_merchant"], 1, "CHARGED AGAIN"),
        (["general_decline"] * 2, 1, None),
        (["general_decline", "call_issuer", "a_word_of_tomorrow"], 1, "CHARGED TOO OFTEN"),
        ([None], 0, "CHARGED AGAIN"),
    ],
)
def test_it_sees_a_charge_that_a_decline_forbids(
    books: Books, reasons: list[str | None], days_later: int, complaint: str | None
) -> None:
    """None: a payment that is not canceled, but pending."""
    some = copy.deepcopy(next(iter(books.payments.values())))
    key, body = first_send(books)
    books.now += days_later * DAY
    for number, reason in enumerate(reasons):
        payment = copy.deepcopy(some)
        payment.metadata = {**body["metadata"], "renewal_attempt_id": f"earlier {number}"}
        payment.status = "canceled" if reason else "pending"
        payment.cancellation = {"party": "yoo_money", "reason": reason} if reason else None
        payment.idempotence_key = f"earlier {number}"
        books.payments[f"earlier {number}"] = payment

    found = sent(books, key, body)
    assert found == [] if complaint is None else any(complaint in words for words in found), found


@pytest.fixture
def world(postgres_server: Server, migrated_template: str) -> Iterator[World]:
    """An installation in which nothing has happened."""
    with postgres_server.database(migrated_template) as url:
        world = World(url, SEED, datetime(2026, 3, 12, 3, tzinfo=timezone.utc), Traits())
        try:
            yield world
        finally:
            world.close()


def post(world: World, key: str, subscription: int = 1, method: str = "card", amount: str = "299.00") -> list[str]:
    """What the world says about a charge, besides that its tables know nothing of it."""
    body = {
        "amount": {"value": amount, "currency": "RUB"}, "payment_method_id": method,
        "metadata": {"subscription_id": str(subscription), "period_start": "2026-03-11", "user_id": "user"},
    }  # fmt: skip
    before = len(world.faults)
    world.charges.look_at(key, json.dumps(body).encode(), world.now, world.now, reaches=True)
    return [words for words in world.faults[before:] if "SENT WITHOUT A RECORD" not in words]


def declined(world: World, method: str) -> None:
    """The card said no."""
    told = {"status": "canceled", "payment_method": {"id": method}}
    world.charges.note_answer("some key", Answer(200, HTTPMessage(), json.dumps(told).encode()))


def test_it_sees_a_card_that_is_tried_again_on_the_day_it_was_declined(world: World) -> None:
    assert post(world, "one") == []
    declined(world, "card")
    world.pass_time(60)

    assert post(world, "two", subscription=2, method="another card") == []
    assert any("TRIED TWICE A DAY: method card" in words for words in post(world, "three", subscription=3))
    world.pass_time(86_400)
    assert post(world, "four", subscription=4) == []


def test_it_sees_a_subscription_that_is_tried_with_two_keys_on_one_day(world: World) -> None:
    assert post(world, "one", method="a card") == []
    assert any("TRIED TWICE A DAY: subscription 1" in words for words in post(world, "two", method="another"))


def test_it_sees_a_key_that_is_sent_with_two_bodies_or_after_the_provider_has_forgotten_it(world: World) -> None:
    assert post(world, "one") == []
    world.pass_time(86_399)
    assert post(world, "one") == []
    assert any("two bodies" in words for words in post(world, "one", amount="300.00"))
    world.pass_time(1)
    assert any("RE-SENT TOO LATE" in words for words in post(world, "one"))


@pytest.mark.parametrize("how", ["a dry run", "a second run"])
@pytest.mark.parametrize("meddles", [False, True])
def test_it_sees_a_run_that_changes_what_it_must_not(
    postgres_server: Server, migrated_template: str, how: str, meddles: bool
) -> None:
    with postgres_server.database(migrated_template) as url:
        played = Simulation(url, SEED, traits=Traits())
        try:
            world = played.world
            run = world.run

            def meddling(*given: Any, **named: Any) -> Any:
                outcome = run(*given, **named)
                if meddles:
                    world.service.payment(world.now, Decimal(1), "RUB", external_id=None)
                return outcome

            world.run = meddling  # type: ignore[method-assign]
            operator = played.operator
            {"a dry run": operator.dry_run, "a second run": operator.same_again}[how]("matching_pending_payments_job")
            assert [how in words for words in world.faults] == [True] * meddles
        finally:
            played.world.close()
