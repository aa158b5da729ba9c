"""A database that is set back to a backup while the provider remembers: what was charged since is not charged again.

The service's tables and ours are set back together. The provider's ledger is the judge.
"""

from __future__ import annotations

from billing_orchestration_tests.books import NOON, OURS
from billing_orchestration_tests.jobs.service import Service

JOB = "autopayment_job"
MATCHING = "matching_successful_payments_job"
A_MONTH_LATER = NOON.replace(month=4)
_TABLES = (
    "subscriptions",
    "payments",
    *(f"billing_orchestration.{name}" for name in (*OURS, "watermarks")),
)


def back_up(service: Service) -> None:
    """Keep all rows as they are now."""
    service.execute("CREATE SCHEMA IF NOT EXISTS backup")
    for name in _TABLES:
        copy = f"backup.{name.split('.')[-1]}"
        service.execute(f"DROP TABLE IF EXISTS {copy}")
        service.execute(f"CREATE TABLE {copy} AS TABLE {name}")


def restore(service: Service) -> None:
    """Set all rows back to the backup."""
    service.execute(f"TRUNCATE {', '.join(_TABLES)}")
    for name in _TABLES:
        service.execute(f"INSERT INTO {name} SELECT * FROM backup.{name.split('.')[-1]}")


def test_a_charge_that_the_database_has_lost_is_settled_by_a_matching_tick_and_not_made_again(
    service: Service,
) -> None:
    subscription = service.subscriber()
    service.tick(MATCHING)
    back_up(service)
    assert service.run(JOB).ok
    restore(service)
    assert service.ended_at(subscription) == NOON
    service.advance(minutes=20)

    assert service.tick(MATCHING).ok

    assert service.ended_at(subscription) == A_MONTH_LATER
    assert [attempt.state for attempt in service.attempts(subscription)] == ["SUCCEEDED"]
    service.advance(days=1, hours=1)
    assert service.run(JOB).ok
    assert service.charged() == {subscription: 1}
    service.check_books()


def test_a_lost_charge_that_does_not_fit_any_more_holds_its_period_until_a_person_has_looked(service: Service) -> None:
    subscription = service.subscriber()
    service.tick(MATCHING)
    back_up(service)
    assert service.run(JOB).ok
    restore(service)
    service.execute("UPDATE prices SET amount = 399")
    service.advance(minutes=20)
    service.tick(MATCHING)
    [entry] = service.rows("quarantine")
    assert (entry.kind, entry.subscription_id) == ("unknown_attempt", subscription)
    assert "299.00 RUB is no price of plan" in entry.reason
    # The key has grown too old to protect anybody.
    service.advance(days=1, hours=1)

    run = service.run(JOB)

    assert run.ok
    assert service.charged() == {subscription: 1}
    assert run.reasons(f"subscription {subscription}") == [
        f"leave: quarantine entry {entry.id} (unknown_attempt) is open and is about this charge"
    ]


def test_a_hundred_charges_of_a_night_that_was_lost_are_each_granted_once(service: Service) -> None:
    subscriptions = [service.subscriber() for _ in range(100)]
    service.tick(MATCHING)
    back_up(service)
    assert service.run(JOB).ok
    restore(service)
    service.advance(minutes=20)

    assert service.tick(MATCHING).ok

    assert [service.ended_at(subscription) for subscription in subscriptions] == [A_MONTH_LATER] * 100
    service.advance(days=2)
    service.run(JOB)
    assert len(service.charges()) == 100
    service.check_books()
