"""A database that is set back to a backup while the provider remembers: what was charged since is not charged again.

The service's tables and ours are set back together. The provider's ledger is the judge.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest

from billing_orchestration.provider.client import PaymentProvider, Slice
from billing_orchestration_tests.books import NOON, OURS
from billing_orchestration_tests.jobs.service import Service

JOB = "autopayment_job"
MATCHING = "matching_successful_payments_job"
EXPIRY = "expire_subscriptions_job"
A_MONTH_LATER = NOON.replace(month=4)
_TABLES = (
    "subscriptions",
    "payments",
    *(f"billing_orchestration.{name}" for name in (*OURS, "watermarks")),
)


@pytest.fixture(autouse=True)
def has_just_begun(service: Service) -> None:
    """Nobody has looked yet whether our records are whole."""
    service.records_are_whole = False
    service.execute("DELETE FROM billing_orchestration.watermarks")


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


# --- before the first charge of a run, where no matching run has come before it


def charged_and_restored(service: Service, **later: float) -> int:
    """A subscription that was charged and whose charge the database has lost, some time ago by now."""
    subscription = service.subscriber()
    service.tick(MATCHING)
    back_up(service)
    assert service.run(JOB).ok
    restore(service)
    service.advance(**(later or {"days": 1, "hours": 1}))
    return subscription


@pytest.mark.parametrize("shards", [None, 3], ids=["whole", "in shards"])
def test_a_run_settles_what_the_database_has_lost_before_it_charges_anybody(
    service: Service, shards: int | None
) -> None:
    subscription = charged_and_restored(service)
    other = service.subscriber()

    run = service.run(JOB, shards=shards)

    assert run.ok, run.failure
    assert service.charged() == {subscription: 1, other: 1}
    assert service.ended_at(subscription) == A_MONTH_LATER
    [attempt] = service.attempts(subscription)
    assert attempt.state == "SUCCEEDED"
    service.check_books()


def test_a_try_before_the_lost_one_does_not_hide_it(service: Service) -> None:
    subscription = service.subscriber(script=["canceled:insufficient_funds", "succeeded"])
    service.run(JOB)
    service.advance(days=1)
    service.tick(MATCHING)
    back_up(service)
    service.run(JOB)
    assert service.charged() == {subscription: 1}
    restore(service)
    # Nor does the loss of all records: the first try would be planned with its old number.
    service.execute("TRUNCATE billing_orchestration.renewal_attempts, billing_orchestration.watermarks")
    service.advance(days=1, hours=1)

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.charged() == {subscription: 1}
    assert [(row.number, row.state) for row in service.attempts(subscription)] == [(2, "SUCCEEDED")]


def test_a_dry_run_shows_what_is_lost_and_writes_nothing(service: Service) -> None:
    subscription = charged_and_restored(service)
    before = service.snapshot()

    run = service.run(JOB, dry_run=True)

    assert service.snapshot() == before
    [reason] = run.reasons(f"subscription {subscription}")
    assert "(succeeded at the provider) is a charge for it that our records do not show" in reason


def test_a_lost_charge_that_is_still_pending_holds_its_period_and_is_settled_once_paid(service: Service) -> None:
    subscription = service.subscriber(script="pending")
    service.tick(MATCHING)
    back_up(service)
    service.run(JOB)
    [payment] = service.provider.payments()
    restore(service)
    service.advance(days=1, hours=1)

    runs = [service.run(JOB), service.run(JOB)]

    assert service.sandbox.count("create") == 1
    assert [run.ok for run in runs] == [True, True]
    [entry] = service.rows("quarantine")
    assert (entry.kind, entry.subscription_id) == ("unknown_attempt", subscription)
    assert "pending at the provider" in entry.reason
    service.provider.pay(payment.id)
    service.advance(minutes=2)
    service.tick(MATCHING)
    assert service.ended_at(subscription) == A_MONTH_LATER
    assert [row.resolution for row in service.rows("quarantine")] == ["settled"]


def left_pending_and_restored(service: Service) -> tuple[int, str]:
    """A subscription whose charge is pending and lost, and a matching run that has covered all the time since."""
    subscription = service.subscriber(script=["pending", "succeeded"])
    service.run(JOB)
    service.tick(MATCHING)
    service.execute("DELETE FROM billing_orchestration.renewal_attempts")
    service.advance(days=1, hours=1)
    assert service.tick(MATCHING).ok
    service.advance(minutes=20)
    assert service.tick(MATCHING).ok
    [payment] = service.provider.payments()
    return subscription, payment.id


def lost_and_odd(service: Service, **odd: Any) -> tuple[int, Any]:
    """A subscription whose charge our records have lost, and the charge, whose record is odd."""
    subscription = service.subscriber()
    service.tick(MATCHING)
    back_up(service)
    assert service.run(JOB).ok
    restore(service)
    [charge] = (payment for payment in service.provider.payments() if "renewal_attempt_id" in payment.metadata)
    charge.override.update(odd)
    charge.touch(charge.changed_at)
    return subscription, charge


def lost_and_unreadable(service: Service, **odd: Any) -> tuple[int, Any]:
    """The same, and matching has seen it."""
    lost = lost_and_odd(service, captured_at="soon", **odd)
    service.advance(minutes=10)
    assert service.tick(MATCHING).ok
    return lost


@pytest.mark.parametrize(
    ("matching_first", "shards", "odd"),
    [
        (False, None, {"status": "who knows"}),
        (False, 3, {"test": "maybe"}),
        (True, None, {"captured_at": "soon"}),
        (True, 3, {"captured_at": "soon"}),
    ],
    ids=str,
)
def test_a_lost_charge_whose_record_cannot_be_read_is_not_made_again(
    service: Service, odd: dict[str, str], shards: int | None, matching_first: bool
) -> None:
    subscription, _ = lost_and_odd(service, **odd)
    if matching_first:  # it settles what is paid, and its watermark says so to the search
        service.advance(minutes=10)
        assert service.tick(MATCHING).ok
    service.advance(days=1, hours=1)

    for _ in range(2):  # the entry holds it as well as the search does
        assert service.run(JOB, shards=shards).ok
        service.advance(days=1)

    assert service.charged() == {subscription: 1}
    [entry] = service.rows("quarantine")
    assert (entry.kind, entry.subscription_id) == ("unreadable", subscription)
    assert service.ended_at(subscription) == NOON


def test_a_record_that_cannot_be_read_holds_nothing_where_our_records_have_its_charge(service: Service) -> None:
    subscription = service.subscriber()
    assert service.run(JOB).ok
    [charge] = (payment for payment in service.provider.payments() if "renewal_attempt_id" in payment.metadata)
    charge.override.update(captured_at="soon")
    charge.touch(charge.changed_at)
    service.advance(minutes=10)
    assert service.tick(MATCHING).ok
    [entry] = service.rows("quarantine")
    assert (entry.kind, entry.subscription_id) == ("unreadable", subscription)
    service.advance(days=31)

    assert service.run(JOB).ok

    assert service.charged() == {subscription: 2}


def test_an_open_entry_learns_whose_charge_it_is_about_once_that_can_be_read(service: Service) -> None:
    subscription, charge = lost_and_unreadable(service, metadata="none")
    [entry] = service.rows("quarantine")
    assert (entry.attempt_id, entry.subscription_id) == (None, None)
    del charge.override["metadata"]
    charge.touch(charge.changed_at)

    for _ in range(3):
        service.advance(days=1, hours=1)
        service.tick(MATCHING)
        assert service.run(JOB).ok

    assert service.charged() == {subscription: 1}
    [entry] = service.rows("quarantine")
    assert entry.subscription_id == subscription


@pytest.mark.parametrize("more", [{}, {"captured_at": "soon"}], ids=["readable otherwise", "unreadable"])
def test_a_lost_second_try_whose_period_cannot_be_read_holds_its_subscription(
    service: Service, more: dict[str, str]
) -> None:
    subscription = service.subscriber(script=["canceled:insufficient_funds", "succeeded", "succeeded"])
    service.tick(MATCHING)
    back_up(service)
    assert service.run(JOB).ok
    service.advance(days=1)
    assert service.run(JOB).ok
    restore(service)
    [charge] = service.provider.charges()
    payment = service.provider.payment(charge.payment_id)
    payment.override.update(more, metadata={**payment.metadata, "period_start": "?"})
    payment.touch(payment.changed_at)
    service.advance(minutes=10)
    assert service.tick(MATCHING).ok

    for _ in range(2):
        service.advance(days=1, hours=1)
        assert service.run(JOB).ok

    assert service.charged() == {subscription: 1}


@pytest.mark.parametrize("paid", [True, False])
def test_a_lost_charge_that_can_be_read_again_is_settled_or_holds_nothing_more(service: Service, paid: bool) -> None:
    subscription, charge = lost_and_unreadable(service)
    service.advance(days=1, hours=1)
    assert service.run(JOB).ok
    charge.override.clear()
    if not paid:
        charge.override["status"] = "canceled"
    charge.touch(charge.changed_at)

    assert service.run(JOB).ok
    assert service.rows("quarantine", "resolved_at IS NULL") == []
    assert service.run(JOB).ok

    assert service.charged() == {subscription: 1 if paid else 2}  # that of the canceled one took no money
    assert service.ended_at(subscription) > NOON


def test_an_unreadable_record_of_a_charge_whose_answer_is_known_holds_nothing(service: Service) -> None:
    subscription = service.subscriber(script=["canceled:insufficient_funds", "succeeded"])
    assert service.run(JOB).ok
    [charge] = (payment for payment in service.provider.payments() if "renewal_attempt_id" in payment.metadata)
    charge.override.update(status="voided")
    charge.touch(charge.changed_at)
    service.advance(days=1)
    service.run("reconciliation_job", partition="2026-03-12")
    [entry] = service.rows("quarantine")
    assert (entry.kind, entry.subscription_id) == ("unreadable", subscription)

    assert service.run(JOB).ok

    assert service.charged() == {subscription: 1}


def test_a_record_that_may_be_anybodys_charge_leaves_our_records_in_doubt(service: Service) -> None:
    service.subscriber()
    service.paid_there("odd", user="nobody")
    service.provider.payment("odd").override.update(metadata="none", status="who knows")

    assert service.run(JOB).ok

    assert service.watermark(JOB) is None


@pytest.mark.parametrize("shards", [None, 3], ids=["whole", "in shards"])
def test_a_matching_run_that_has_come_before_does_not_hide_a_lost_charge_that_is_still_pending(
    service: Service, shards: int | None
) -> None:
    subscription, _ = left_pending_and_restored(service)

    run = service.run(JOB, shards=shards)

    assert run.ok, run.failure
    assert service.sandbox.count("create") == 1
    assert service.attempts(subscription) == []
    [entry] = service.rows("quarantine")
    assert (entry.kind, entry.subscription_id) == ("unknown_attempt", subscription)
    # Nobody searches for it any more: the entry holds it.
    service.advance(days=1)
    service.tick(MATCHING)
    assert service.run(JOB, shards=shards).ok
    assert service.sandbox.count("create") == 1


@pytest.mark.parametrize("shards", [None, 3], ids=["whole", "in shards"])
def test_a_lost_charge_that_is_paid_after_the_last_matching_run_is_settled_and_not_made_again(
    service: Service, shards: int | None
) -> None:
    subscription, payment_id = left_pending_and_restored(service)
    service.advance(minutes=1)
    service.provider.pay(payment_id)

    run = service.run(JOB, shards=shards)

    assert run.ok, run.failure
    assert service.sandbox.count("create") == 1
    assert service.ended_at(subscription) == A_MONTH_LATER
    service.check_books()


def test_a_lost_charge_that_is_paid_while_the_list_is_read_is_settled_and_not_made_again(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscription, payment_id = left_pending_and_restored(service)

    def paid_after(read: Callable[..., Slice]) -> Callable[..., Slice]:
        def reading(client: PaymentProvider, start: datetime, end: datetime) -> Slice:
            found = read(client, start, end)
            if service.provider.payment(payment_id).status == "pending":
                service.provider.pay(payment_id)
            return found

        return reading

    for name in ("fetch_unfinished", "fetch_day"):
        monkeypatch.setattr(PaymentProvider, name, paid_after(getattr(PaymentProvider, name)))

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.sandbox.count("create") == 1
    assert service.ended_at(subscription) == A_MONTH_LATER


@pytest.mark.parametrize("status", ["pending", "paid"])
def test_what_a_lost_charge_holds_does_not_expire_before_it_is_decided(service: Service, status: str) -> None:
    subscription = service.subscriber(script="pending" if status == "pending" else "succeeded")
    service.tick(MATCHING)
    back_up(service)
    service.run(JOB)
    [payment] = service.provider.payments()
    restore(service)
    if status == "paid":
        # It does not fit any more, so a person decides.
        service.execute("UPDATE prices SET amount = 399")
    service.advance(days=4)
    assert service.run(JOB).ok
    [entry] = service.rows("quarantine")
    assert (entry.kind, entry.subscription_id) == ("unknown_attempt", subscription)

    run = service.run(EXPIRY)

    assert run.ok, run.failure
    assert service.status("subscriptions", subscription) == "ACTIVE"
    # A person says that nothing was paid.
    service.execute("UPDATE billing_orchestration.quarantine SET resolved_at = now(), resolution = 'ignored'")
    assert service.run(EXPIRY).ok
    assert service.status("subscriptions", subscription) == "EXPIRED"
    assert [charge.payment_id for charge in service.charges()] == ([payment.id] if status == "paid" else [])


def tried_until_paid_and_restored(service: Service, last: int = 3) -> int:
    """A subscription whose first try was pending and is declined, and whose `last` try was paid; the database knows
    no more than that the first is pending."""
    declined = ["canceled:insufficient_funds"] * (last - 2)
    subscription = service.subscriber(script=["pending", *declined, "succeeded", "succeeded", "succeeded"])
    assert service.run(JOB).ok
    [first] = service.attempts(subscription)
    service.tick(MATCHING)
    back_up(service)
    service.advance(days=1)
    service.provider.cancel(first.external_payment_id, "insufficient_funds", party="payment_network")
    for _ in range(last - 1):
        assert service.run(JOB).ok
        service.advance(days=1)
    assert service.charged() == {subscription: 1}
    restore(service)
    service.advance(hours=1)
    return subscription


@pytest.mark.parametrize("matching_first", [False, True], ids=["no matching run first", "a matching run first"])
@pytest.mark.parametrize("shards", [None, 2], ids=["whole", "in shards"])
def test_a_lost_success_beside_a_try_that_counts_as_pending_still_is_not_charged_again_and_is_granted(
    service: Service, shards: int | None, matching_first: bool
) -> None:
    subscription = tried_until_paid_and_restored(service)
    if matching_first:
        service.tick(MATCHING)
        assert [entry.kind for entry in service.rows("quarantine")] == ["second_success"]

    run = service.run(JOB, shards=shards)

    assert run.ok, run.failure
    assert service.charged() == {subscription: 1}
    assert service.ended_at(subscription) == A_MONTH_LATER
    assert [attempt.state for attempt in service.attempts(subscription)] == ["DECLINED", "SUCCEEDED"]
    assert [entry.resolution for entry in service.rows("quarantine")] == ["settled"] * matching_first
    service.check_books()


def test_a_paid_subscription_does_not_expire_because_its_payment_came_beside_a_pending_try(service: Service) -> None:
    subscription = tried_until_paid_and_restored(service, last=2)
    service.tick(MATCHING)
    [entry] = service.rows("quarantine")
    assert (entry.kind, entry.subscription_id) == ("second_success", subscription)
    service.advance(days=4)
    # The pending try is declined, and the provider does not answer for the payment: it cannot be granted yet.
    service.sandbox.misbehave("get", "error_before", payment_id=entry.external_payment_id, times=None)
    run = service.run(JOB)
    assert f"payment {entry.external_payment_id}" in run.failure
    assert [attempt.state for attempt in service.attempts(subscription)] == ["DECLINED", "VOID"]

    assert service.run(EXPIRY).ok

    assert service.status("subscriptions", subscription) == "ACTIVE"
    service.sandbox.behave()
    assert service.run(JOB).ok
    assert service.charged() == {subscription: 1}
    assert service.ended_at(subscription) == A_MONTH_LATER
    service.check_books()


def test_launches_one_after_another_do_not_leave_a_lost_charge_behind(service: Service) -> None:
    for minutes in (0, 7, 14, 21):
        service.set_time(NOON + timedelta(minutes=minutes))
        service.subscriber()
        assert service.run(JOB).ok
        # Those within a quarter of an hour have not looked, and say nothing of what was lost before them.
        assert service.watermark(JOB) == NOON + timedelta(minutes=21 if minutes == 21 else 0)


def test_a_list_that_breaks_off_lets_nobody_be_charged(service: Service) -> None:
    subscription = charged_and_restored(service)
    service.sandbox.misbehave("list", effect="error_before", times=None)

    run = service.run(JOB)

    assert not run.ok
    assert "the list of payments broke off" in run.failure
    assert service.charged() == {subscription: 1}
    assert service.attempts(subscription) == []


def test_a_watermark_that_has_left_a_gap_does_not_prove_that_nothing_is_lost(service: Service) -> None:
    subscription = charged_and_restored(service, days=9)
    # It catches up seven days, and the charge is older than that.
    service.tick(MATCHING)
    assert service.ended_at(subscription) == NOON

    assert service.run(JOB).ok

    assert service.charged() == {subscription: 1}
    assert service.ended_at(subscription) == A_MONTH_LATER


def test_the_first_run_of_an_installation_searches_a_month_and_those_that_follow_what_is_new(service: Service) -> None:
    for day in range(3):
        service.subscriber()
        service.tick(MATCHING)
        asked = service.sandbox.count("list")

        run = service.run(JOB)

        since = run.metadata["fetch_open_renewals"]["searched for lost charges since"]
        assert since == ["2026-02-09T23:30:00+00:00", "2026-03-12T11:15:00+00:00", "2026-03-13T11:15:00+00:00"][day]
        # Two lists of what was not finished yesterday, two of the last minutes; one request asks what time it is there.
        assert (service.sandbox.count("list") - asked > 5) == (day == 0)
        service.advance(days=1)
    assert len(service.charges()) == 3


def test_a_run_without_anybody_to_charge_asks_nothing(service: Service) -> None:
    assert service.run(JOB).ok
    assert service.sandbox.requests == []


@pytest.mark.parametrize("hours", [-6, 6], ids=["behind", "ahead"])
@pytest.mark.parametrize("shards", [None, 2], ids=["whole", "in shards"])
def test_with_a_wrong_clock_our_records_do_not_count_as_whole(service: Service, shards: int | None, hours: int) -> None:
    subscription = charged_and_restored(service)
    service.wrong_by(timedelta(hours=hours))

    assert not service.run(JOB, shards=shards).ok

    assert service.watermark(JOB) is None
    assert service.charged() == {subscription: 1}
