"""Several payment providers in one database: every job keeps to this shop's, whatever ids the others use."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from billing_orchestration.database.engine import create_engine
from billing_orchestration.database.money_checks import numbers, paid_is_granted
from billing_orchestration.desk.explaining import explain_payment
from billing_orchestration.desk.resolving import Resolution, resolve
from billing_orchestration.domain.problem_kinds import ACCEPTED
from billing_orchestration.resources import BillingDatabase, connect_provider
from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.jobs.service import Service

A_DAY = timedelta(days=1)
JOBS = (
    "autopayment_job",
    "expire_subscriptions_job",
    "expire_payments_job",
    "matching_pending_payments_job",
    "matching_successful_payments_job",
    "reconciliation_job",
)


class TwoShops:
    """A service with two shops in one database. `service` runs the jobs of the one; `other` is the other's row."""

    def __init__(self, service: Service) -> None:
        at = NOON.replace(tzinfo=None)
        self.other = service.insert(
            "payment_providers", name="another shop", is_active=True, created_at=at, updated_at=at
        )
        service.settings = service.settings.model_copy(update={"yookassa_provider_ids": str(service.provider_id)})
        self.service = service

    def theirs(self, external_id: str, **fields: Any) -> int:
        """A payment row of the other shop's."""
        return self.service.payment(external_id, provider_id=self.other, **fields)

    def read(self, ask: Callable[[sa.Connection], Any]) -> Any:
        """What a statement finds in a session of this shop's."""
        database = BillingDatabase(lambda: self.service.settings)
        try:
            with database.read() as connection:
                return ask(connection)
        finally:
            database.close()


@pytest.fixture
def shops(service: Service) -> TwoShops:
    """Both shops, with the unique index on the provider's id."""
    return TwoShops(service)


@pytest.fixture
def same_ids(shops: TwoShops) -> TwoShops:
    """Both shops' providers number their payments alike, so there is no unique index."""
    shops.service.tolerate_duplicates()
    return shops


@pytest.mark.parametrize("job", JOBS)
def test_several_rows_are_refused_until_it_is_known_which_are_this_shop(shops: TwoShops, job: str) -> None:
    service, known = shops.service, shops.service.settings
    service.settings = known.model_copy(update={"yookassa_provider_ids": None})
    run = service.run(job)
    assert not run.ok
    assert "put those that are this shop into YOOKASSA_PROVIDER_IDS" in str(run.failure)

    assert service.run(job, load=lambda: known).ok

    wrong = known.model_copy(update={"yookassa_provider_ids": f"{service.provider_id},{shops.other + 1}"})
    refused = service.run(job, load=lambda: wrong)
    assert not refused.ok
    assert f"YOOKASSA_PROVIDER_IDS names {shops.other + 1}" in str(refused.failure)


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("status", ["PENDING", "EXPIRED", "SUCCEEDED"])
def test_no_job_touches_a_row_of_another_shop_or_asks_about_it(same_ids: TwoShops, job: str, status: str) -> None:
    service = same_ids.service
    service.set_time(NOON - timedelta(hours=5))
    subscription = service.subscription("anna", ended_at=NOON)
    old = same_ids.theirs("old", created_at=NOON - 30 * A_DAY, status=status, subscription_id=subscription)
    fresh = same_ids.theirs("fresh", created_at=service.now - timedelta(minutes=30), status=status)
    yesterday = same_ids.theirs("yesterday", created_at=NOON - A_DAY, status=status)
    before = [service.row("payments", row) for row in (old, fresh, yesterday)]

    assert service.run(job).ok

    assert [service.row("payments", row) for row in (old, fresh, yesterday)] == before
    assert service.sandbox.count("get") == 0
    assert service.rows("quarantine") == []
    assert service.charges() == []


@pytest.mark.parametrize("job", ["matching_pending_payments_job", "matching_successful_payments_job"])
@pytest.mark.parametrize("status", ["PENDING", "SUCCEEDED"])
def test_a_payment_is_settled_beside_another_shops_row_with_the_same_id(
    same_ids: TwoShops, job: str, status: str
) -> None:
    service = same_ids.service
    payment = service.paid_there("1001", plan_id=service.monthly)
    stranger = service.subscription("a stranger")
    theirs = same_ids.theirs(payment, status=status, subscription_id=stranger)
    ours = service.payment(payment)
    before = service.row("payments", theirs), service.row("subscriptions", stranger)

    assert service.run(job).ok

    assert service.status("payments", ours) == "SUCCEEDED"
    assert service.settled(payment) == ["created"]
    assert (service.row("payments", theirs), service.row("subscriptions", stranger)) == before


def test_a_stale_payment_is_expired_beside_another_shops_row_with_the_same_id(same_ids: TwoShops) -> None:
    service = same_ids.service
    theirs = same_ids.theirs("1001", created_at=NOON - 30 * A_DAY)
    ours = service.payment("1001", created_at=NOON - 30 * A_DAY)

    assert service.run("expire_payments_job").ok

    assert service.statuses("payments", ours, theirs) == ["EXPIRED", "PENDING"]


def test_a_day_is_reconciled_beside_another_shops_rows_with_the_same_ids(same_ids: TwoShops) -> None:
    service = same_ids.service
    payment = service.paid_there("1001", plan_id=service.monthly, created_at=NOON - A_DAY)
    theirs = same_ids.theirs(payment, status="CANCELED", created_at=NOON - A_DAY)
    before = service.row("payments", theirs)

    subscription = service.subscription("anna", ended_at=NOON + 20 * A_DAY)
    service.payment(payment, status="SUCCEEDED", subscription_id=subscription, created_at=NOON - A_DAY)
    run = service.run("reconciliation_job")

    assert run.ok, run.failure
    assert service.rows("quarantine") == []
    assert service.row("payments", theirs) == before


def test_a_method_of_another_provider_is_not_charged(shops: TwoShops) -> None:
    service = shops.service
    subscription = service.subscription("anna")
    shops.theirs("theirs", status="SUCCEEDED", subscription_id=subscription)

    run = service.run("autopayment_job")

    assert run.ok, run.failure
    assert [row["code"] for row in run.decisions if row["subject"] == f"subscription {subscription}"] == [
        "method_elsewhere"
    ]
    assert service.charges() == []


def test_only_payments_of_this_shop_say_which_method_is_charged(shops: TwoShops) -> None:
    service = shops.service
    subscription = service.subscriber(method="our-card")
    shops.theirs("their-card", status="SUCCEEDED", subscription_id=subscription, created_at=NOON - A_DAY)

    assert service.run("autopayment_job").ok

    assert [charge.payment_method_id for charge in service.charges()] == ["our-card"]


@pytest.mark.parametrize("state", ["STOPPED", "DECLINED"])
def test_a_decline_elsewhere_says_nothing_about_a_method_with_the_same_id(shops: TwoShops, state: str) -> None:
    service = shops.service
    stranger = service.subscription("a stranger", status="CANCELED")
    service.attempt(stranger, state=state, method="7", decline_class="hard", payment_provider_id=shops.other)
    subscription = service.subscriber(method="7")

    assert service.run("autopayment_job").ok

    assert service.charged() == {subscription: 1}


@pytest.mark.parametrize(("state", "payment"), [("PENDING", "their-payment"), ("UNKNOWN", None)])
@pytest.mark.parametrize("moved", [False, True])
def test_an_open_attempt_of_another_shop_is_left_to_it_and_its_subscription_is_not_charged(
    shops: TwoShops, state: str, payment: str | None, moved: bool
) -> None:
    service = shops.service
    subscription = service.subscriber(ended_at=NOON - A_DAY)
    sent = NOON - timedelta(hours=30)
    attempt = service.attempt(
        subscription,
        state=state,
        payment_provider_id=shops.other,
        external_payment_id=payment,
        first_sent_at=sent,
    )
    if moved:
        end = NOON.replace(tzinfo=None)
        service.execute("UPDATE subscriptions SET ended_at = :end WHERE id = :id", end=end, id=subscription)

    run = service.run("autopayment_job")

    assert run.ok, run.failure
    assert service.read_attempt(attempt.id) == attempt
    assert service.charges() == []
    assert service.sandbox.count("get") == 0
    [told] = run.reasons(f"subscription {subscription}")
    assert "open attempt" in told


def test_a_shop_whose_providers_change_after_the_reading_sends_nothing_of_the_other(shops: TwoShops) -> None:
    service = shops.service
    subscription = service.subscriber()
    service.plan_renewals_only()
    [planned] = service.attempts(subscription)
    service.execute("UPDATE billing_orchestration.renewal_attempts SET payment_provider_id = :other", other=shops.other)

    assert service.run("autopayment_job").ok

    assert service.charges() == []
    assert service.attempts(subscription)[0].state == planned.state


@pytest.mark.parametrize("refunded", ["0.00", "299.00"])
def test_a_payment_whose_only_row_is_another_shops_is_before_a_person(shops: TwoShops, refunded: str) -> None:
    service = shops.service
    service.paid_there("odd", plan_id=service.monthly, refunded_amount=refunded)
    row = shops.theirs("odd")

    assert service.run("matching_successful_payments_job").ok

    assert service.status("payments", row) == "PENDING"
    assert service.quarantined("odd") == ["metadata"]


def test_what_another_shop_has_granted_is_not_granted_again(shops: TwoShops) -> None:
    service = shops.service
    service.paid_there("granted", plan_id=service.monthly)
    subscription = service.subscription("anna", ended_at=NOON + 20 * A_DAY)
    shops.theirs("granted", status="SUCCEEDED", subscription_id=subscription)
    before = service.snapshot()

    assert service.run("matching_successful_payments_job").ok

    assert service.snapshot() == before


def test_the_money_checks_and_the_plotted_numbers_are_of_this_shop(same_ids: TwoShops) -> None:
    service = same_ids.service
    same_ids.theirs("stale", created_at=NOON - 30 * A_DAY)
    same_ids.theirs("nobody's", status="SUCCEEDED", created_at=NOON - 2 * A_DAY)
    assert same_ids.read(lambda connection: numbers(connection, NOON))["oldest unfinished payment, hours"] == 0
    assert same_ids.read(lambda connection: paid_is_granted(connection, NOON)).passed

    payment = service.paid_there("1001", plan_id=service.monthly)
    assert service.run("matching_successful_payments_job").ok
    stranger = service.subscription("a stranger")
    same_ids.theirs(payment, status="SUCCEEDED", subscription_id=stranger)
    assert same_ids.read(lambda connection: paid_is_granted(connection, NOON)).passed

    # Ours is granted to nobody, whatever the other shop has granted under the same id.
    service.payment("1002", status="SUCCEEDED", created_at=NOON - 2 * A_DAY)
    same_ids.theirs("1002", status="SUCCEEDED", subscription_id=stranger)
    [told] = same_ids.read(lambda connection: paid_is_granted(connection, NOON)).broken
    assert "1002" in told


def test_a_persons_word_about_the_books_changes_no_row_of_another_shop(same_ids: TwoShops) -> None:
    service = same_ids.service
    ours = service.payment("gone", status="SUCCEEDED", created_at=NOON - A_DAY)
    theirs = same_ids.theirs("gone", status="SUCCEEDED", created_at=NOON - A_DAY)
    service.run("reconciliation_job")
    [entry] = service.rows("quarantine")

    def decide(engine: sa.Engine) -> None:
        word = Resolution(ACCEPTED, "the provider is right", "olga")
        connect = lambda: connect_provider(service.settings)  # noqa: E731
        resolve(engine, connect, service.calendar, entry.id, word, lambda: service.now)

    database = BillingDatabase(lambda: service.settings)
    try:
        decide(database.engine)
    finally:
        database.close()

    assert service.statuses("payments", ours, theirs) == ["EXPIRED", "SUCCEEDED"]


def test_explain_names_the_other_shop_and_does_not_ask_about_its_payment(shops: TwoShops) -> None:
    service = shops.service
    shops.theirs("theirs")
    database = BillingDatabase(lambda: service.settings)
    try:
        lines = explain_payment(database.engine, lambda: connect_provider(service.settings), "theirs")
    finally:
        database.close()

    assert any(f"of payment provider {shops.other}, which is not this shop's" in line for line in lines)
    assert service.sandbox.requests == []


def test_a_session_that_names_no_shop_reads_every_row(shops: TwoShops) -> None:
    shops.theirs("stale", created_at=NOON - A_DAY)
    engine = create_engine(shops.service.settings.billing_database_url)
    with engine.connect() as connection:
        assert numbers(connection, NOON)["oldest unfinished payment, hours"] == 24
    engine.dispose()
