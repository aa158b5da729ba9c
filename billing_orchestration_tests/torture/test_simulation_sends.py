"""The simulation's judge can complain of charges at the wire, of runs, and of a story's end."""

from __future__ import annotations

import copy
import json
import random
import uuid
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from http.client import HTTPMessage
from typing import Any

import pytest

from billing_orchestration.provider.wire import Answer
from billing_orchestration_tests.fixtures.postgres import Server
from billing_orchestration_tests.torture.simulation.judge import DAY
from billing_orchestration_tests.torture.simulation.mishaps import MISHAPS
from billing_orchestration_tests.torture.simulation.process import Accidents, Process
from billing_orchestration_tests.torture.simulation.runner import RunEnd
from billing_orchestration_tests.torture.simulation.story import Simulation
from billing_orchestration_tests.torture.simulation.traits import Traits
from billing_orchestration_tests.torture.simulation.world import World
from billing_orchestration_tests.torture.simulation_books import OURS, SEED, Books, books, played

__all__ = ["books", "played"]


_ATTEMPTS = "billing_orchestration.renewal_attempts"
_ATTEMPT = f"(SELECT * FROM {_ATTEMPTS} WHERE {OURS}) a"


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
    # It is not paid, and nothing has happened to its subscription since it was looked at.
    books.execute(
        f"DELETE FROM billing_orchestration.settlements t USING {_ATTEMPT}"
        " WHERE t.subscription_id = a.subscription_id AND t.period_end > a.period_start"
    )
    books.execute("UPDATE billing_orchestration.settlements SET settled_at = settled_at - interval '1 year'")
    books.journal.touched.clear()
    del books.payments[payment_id]
    books.now = row[2] + timedelta(minutes=1)
    return row[0], json.loads(row[1])


LONG_AGO = datetime(2000, 1, 1, tzinfo=timezone.utc)


def sent(books: Books, key: str, body: dict[str, Any], began: datetime = LONG_AGO) -> list[str]:
    """What the judge says about it, sent by a run that `began` then."""
    text = json.dumps(body, separators=(",", ":"))
    wrong = books.oracle.wrong_send(key, text, began)
    return [*wrong, *books.oracle.wrong_charge(key, text, books.payments.values(), books.now, books.now)]


def test_it_has_nothing_to_say_about_a_right_charge(books: Books) -> None:
    assert sent(books, *first_send(books)) == []


WRONG_SENDS = {
    "a key that nobody wrote down": ("", " is not in the database at the moment of its POST"),
    "a first send that is not committed": (
        f"UPDATE billing_orchestration.renewal_attempts SET first_sent_at = NULL WHERE {OURS}", "first_sent_at"),
    "another body": (f"UPDATE billing_orchestration.renewal_attempts SET body = '{{}}' WHERE {OURS}", "another body"),
    "an attempt that is closed": (
        f"UPDATE {_ATTEMPTS} SET state = 'STOPPED' WHERE {OURS}", " is sent while its attempt is "),
    "a subscription that was canceled": ("UPDATE subscriptions SET status = 'CANCELED'", "CHARGED UNWANTED: key"),
    "a period that is paid": (
        "UPDATE subscriptions SET ended_at = ended_at + interval '1 month'", "CHARGED UNWANTED: key"),
    "a plan that does not recur": ("UPDATE plans SET is_recurring = false", "is not recurring"),
    "another price": ("UPDATE prices SET amount = amount + 1", "CHARGED WRONGLY"),
    "two prices": ("INSERT INTO prices (plan_id, currency, amount) SELECT plan_id, currency, 1 FROM prices",
                   "CHARGED WRONGLY"),
    "a period that is over": (
        f"UPDATE plans SET duration = -9 WHERE id = (SELECT plan_id FROM {_ATTEMPT})", "CHARGED FOR WHAT IS OVER"),
    "another period's charge in review": (
        f"INSERT INTO {_ATTEMPTS} (id, subscription_id, period_start, number, state, idempotence_key, body, amount,"
        " currency, user_id, plan_id, payment_provider_id, payment_method_id, planned_at, run_id)"
        f" SELECT gen_random_uuid(), subscription_id, '2001-01-01', 1, 'REVIEW', gen_random_uuid(), body, amount,"
        f" currency, user_id, plan_id, payment_provider_id, payment_method_id, planned_at, run_id FROM {_ATTEMPT}",
        "CHARGED BESIDE AN OPEN CHARGE"),
    "days that are paid": (
        "INSERT INTO billing_orchestration.settlements (external_payment_id, kind, payment_id, subscription_id, amount,"
        " currency, period_end, settled_at, run_id) SELECT 'another', 'extended', 1, subscription_id, 1, 'RUB',"
        f" period_start + interval '1 day', '2001-01-01', 'r' FROM {_ATTEMPT}", "CHARGED WITHIN A PAID PERIOD"),
    "another subscription that ends later": (
        "INSERT INTO subscriptions (user_id, status, started_at, ended_at, plan_id, created_at, updated_at)"
        " SELECT user_id, 'ACTIVE', started_at, ended_at + interval '1 day', plan_id, created_at, updated_at"
        f" FROM subscriptions WHERE id = (SELECT subscription_id FROM {_ATTEMPT})", "CHARGED BESIDE A LATER ONE"),
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
        (["card_expired"], 1, "CHARGED IN VAIN"),
        (["3d_secure_failed"], 1, "CHARGED IN VAIN"),
        (["canceled_by_merchant"], 1, "CHARGED IN VAIN"),
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


def purchase_of(books: Books, body: dict[str, Any]) -> Any:
    """The purchase that saved the card which a renewal is charged by, with its row, long ago."""
    payment = copy.deepcopy(books.payments[body["payment_method_id"]])
    books.execute(f"UPDATE payments SET updated_at = '2001-01-01' WHERE external_payment_id = '{payment.id}'")
    return payment


@pytest.mark.parametrize("refunded", ["", "here", "there"])
def test_it_sees_a_charge_by_a_card_that_a_newer_purchase_has_replaced(books: Books, refunded: str) -> None:
    key, body = first_send(books)
    newer = purchase_of(books, body)
    assert sent(books, key, body) == []
    newer.id = newer.method_id = "newer"
    newer.created_at += DAY
    newer.refunded = newer.amount if refunded == "there" else newer.refunded
    books.payments["newer"] = newer
    books.execute(
        "INSERT INTO payments SELECT id + 100000, subscription_id, payment_provider_id, payment_method,"
        f" '{'REFUNDED' if refunded == 'here' else 'SUCCEEDED'}', currency, amount, 'newer', created_at, updated_at"
        f" FROM payments WHERE external_payment_id = '{body['payment_method_id']}'"
    )

    assert any("CHARGED AN OLD CARD" in words for words in sent(books, key, body)) == (not refunded)


def test_it_sees_a_charge_by_a_card_whose_purchase_was_refunded(books: Books) -> None:
    key, body = first_send(books)
    purchase_of(books, body)
    books.execute(f"UPDATE payments SET status = 'REFUNDED' WHERE external_payment_id = '{body['payment_method_id']}'")

    assert any("CHARGED A REFUNDED CARD" in words for words in sent(books, key, body))


@pytest.mark.parametrize(
    ("reason", "minutes", "is_seen"),
    [
        ("card_expired", 40, True),
        # Another run was told while this one was under way.
        ("card_expired", 5, False),
        ("insufficient_funds", 40, False),
        ("3d_secure_failed", 40, False),
    ],
)
def test_it_sees_a_charge_by_a_card_that_was_declined_for_good_in_another_period(
    books: Books, reason: str, minutes: int, is_seen: bool
) -> None:
    key, body = first_send(books)
    [other] = books.oracle.rows(
        f"SELECT id::text AS id FROM {_ATTEMPTS} WHERE NOT coalesce({OURS}, false) ORDER BY planned_at LIMIT 1"
    )
    told_at = f"(SELECT last_sent_at FROM {_ATTEMPT}) - interval '{minutes} minutes'"
    books.execute(f"UPDATE {_ATTEMPTS} SET closed_at = {told_at} WHERE id = '{other.id}'")
    declined = copy.deepcopy(next(iter(books.payments.values())))
    declined.id, declined.method_id, declined.status = "declined", body["payment_method_id"], "canceled"
    declined.metadata = {**body["metadata"], "renewal_attempt_id": other.id, "period_start": "2001-01-01"}
    declined.cancellation = {"party": "payment_network", "reason": reason}
    books.payments["declined"] = declined

    found = sent(books, key, body)

    assert any("CHARGED A STOPPED CARD" in words for words in found) == is_seen, found
    assert is_seen or found == []


# --- in a world where nothing has happened


@pytest.fixture
def world(postgres_server: Server, migrated_template: str) -> Iterator[World]:
    """An installation in which nothing has happened."""
    with postgres_server.database(migrated_template) as url:
        world = World(url, SEED, datetime(2026, 3, 12, 3, tzinfo=timezone.utc), Traits(mishaps=frozenset(MISHAPS)))
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


def declined(world: World, method: str, key: str = "some key") -> None:
    """The card said no."""
    told = {"status": "canceled", "payment_method": {"id": method}}
    world.charges.note_answer(key, Answer(200, HTTPMessage(), json.dumps(told).encode()))


def test_it_sees_a_card_that_is_tried_again_on_the_day_it_was_declined(world: World) -> None:
    assert post(world, "one") == []
    declined(world, "card")
    world.pass_time(60)

    assert post(world, "two", subscription=2, method="another card") == []
    assert any(" is charged again" in words for words in post(world, "three", subscription=3))
    world.pass_time(86_400)
    assert post(world, "four", subscription=4) == []


def test_it_sees_a_subscription_that_is_tried_with_two_keys_on_one_day(world: World) -> None:
    assert post(world, "one", method="a card") == []
    assert any("TRIED TWICE A DAY: subscription " in words for words in post(world, "two", method="another"))


def test_it_sees_a_key_that_is_sent_with_two_bodies_or_after_the_provider_has_forgotten_it(world: World) -> None:
    assert post(world, "one") == []
    world.pass_time(86_399)
    assert post(world, "one") == []
    assert any("two bodies" in words for words in post(world, "one", amount="300.00"))
    world.pass_time(1)
    assert any("RE-SENT TOO LATE" in words for words in post(world, "one"))


@pytest.mark.parametrize(("taken", "complains"), [("before the send", False), ("after the send", True)])
def test_a_key_of_a_send_that_a_restored_database_has_lost_is_new_to_it(
    world: World, taken: str, complains: bool
) -> None:
    taken_at = world.now + timedelta(seconds=-1 if taken == "before the send" else 1)
    assert post(world, "one") == []
    world.pass_time(2 * 86_400)

    world.charges.forget_tries(taken_at)

    assert any("RE-SENT TOO LATE" in words for words in post(world, "one")) == complains


@pytest.mark.parametrize(("ahead_s", "complains"), [(300, False), (420, True), (-10_800, True)])
def test_it_sees_a_charge_that_was_claimed_by_a_wrong_clock(
    world: World, monkeypatch: pytest.MonkeyPatch, ahead_s: int, complains: bool
) -> None:
    monkeypatch.setattr(world.oracle, "claimed_at", lambda _: world.now + timedelta(seconds=ahead_s))
    assert any("CLAIMED BY A WRONG CLOCK: key " in words for words in post(world, "one")) == complains


def test_it_sees_a_key_that_is_sent_again_before_the_provider_can_have_finished(world: World) -> None:
    assert post(world, "one") == []
    world.pass_time(44)
    assert any("RE-SENT TOO SOON" in words for words in post(world, "one"))
    world.pass_time(45)
    assert post(world, "one") == []
    # What was answered may be sent again at once.
    declined(world, "card", "one")
    assert post(world, "one") == []


def test_it_sees_a_run_that_crashes_or_leaves_a_thread_behind(world: World) -> None:
    process = Process(world, Accidents(random.Random(1)), world.now)
    process.threads.start(process.threads.make_queue().get, name="lingers")

    world.look_after("a_job", process, RunEnd("r", crash=ValueError("what")))

    assert "lingers has not" in world.faults[0]
    assert " has not: it may still change something" in world.faults[0]
    assert "CRASH of " in world.faults[1]


WRONG = timedelta(hours=1)


def test_it_sees_a_charge_by_a_clock_that_was_wrong_before(world: World) -> None:
    world.set_clocks(WRONG, timedelta(0))
    process = Process(world, Accidents(random.Random(1)), world.now)

    process._look_at_clocks()
    assert any("it was wrong before the run began" in words for words in world.faults)

    world.faults.clear()
    world.set_clocks(-WRONG, timedelta(0))
    process._look_at_clocks()
    assert world.faults == []


def test_it_sees_what_a_run_does_by_a_wrong_clock(world: World) -> None:
    before = world.oracle.bound_to_time()
    assert world.oracle.done_by_a_wrong_clock("a_job", before) == []
    world.service.payment(world.now, Decimal(1), "RUB", external_id=None, status="EXPIRED")

    [words] = world.oracle.done_by_a_wrong_clock("a_job", before)
    assert "DONE BY A WRONG CLOCK" in words


@pytest.fixture
def story(postgres_server: Server, migrated_template: str) -> Iterator[Simulation]:
    """A simulation that has not begun, each of whose runs is red."""
    with postgres_server.database(migrated_template) as url:
        played = Simulation(url, SEED, traits=Traits())
        played.world.run = lambda *_, **__: RunEnd("r", failure="as always")  # type: ignore[method-assign]
        try:
            yield played
        finally:
            played.world.close()


def test_it_sees_a_story_that_ends_red(story: Simulation) -> None:
    story.play(0)

    assert any(" is red at the end of the calm days: " in words for words in story.world.faults)


def test_it_sees_a_charge_that_is_still_open_after_the_calm_days(story: Simulation) -> None:
    story.world.service.execute(
        f"INSERT INTO {_ATTEMPTS} (id, subscription_id, period_start, number, state, idempotence_key, body, amount,"
        " currency, user_id, plan_id, payment_provider_id, payment_method_id, planned_at, run_id)"
        " VALUES (gen_random_uuid(), 1, '2001-01-01', 1, 'UNKNOWN', gen_random_uuid(), '{}', 1, 'RUB', 'u', 1, 1, 'm',"
        " '2001-01-01', 'r')"
    )
    story.nothing_is_left_open()

    assert any(" after the calm days" in words for words in story.world.faults)


def test_it_sees_a_red_backfill_of_a_gap(story: Simulation) -> None:
    gap = {"from": "2026-01-01T00:00:00+00:00", "until": "2026-01-01T01:00:00+00:00"}
    story.world.service.execute(
        "INSERT INTO billing_orchestration.quarantine (problem_key, kind, reason, evidence, job, run_id, opened_at)"
        " VALUES ('g', 'gap', 'an outage', %s, 'matching_pending_payments_job', 'r', now())",
        json.dumps(gap),
    )
    story.ticks.tick(story.world.now)

    assert any("a backfill of " in words for words in story.world.faults)


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
