"""What a wrong clock forbids, in whole jobs: ours, PostgreSQL's or the provider's, from the start or set in mid-run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from billing_orchestration.jobs.run_failures import failure_of
from billing_orchestration.threads import Thread, Threads
from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.jobs.service import Run, Service

AUTOPAYMENT = "autopayment_job"
PAYMENTS, SUBSCRIPTIONS = "expire_payments_job", "expire_subscriptions_job"
RECONCILIATION = "reconciliation_job"
MATCHING = ("matching_pending_payments_job", "matching_successful_payments_job")
HOUR, MINUTE, SECOND = timedelta(hours=1), timedelta(minutes=1), timedelta(seconds=1)
BOTH = pytest.mark.parametrize("job", MATCHING)

# Which clock is wrong, by how much, and how the run names it. The Date header leaves a second open.
WRONG = pytest.mark.parametrize(
    ("database", "provider", "named"),
    [
        (
            -3 * HOUR,
            -3 * HOUR,
            "this machine's clock is 2 h 59 min ahead of PostgreSQL's clock and the provider's clock",
        ),
        (6 * MINUTE, 6 * MINUTE, "this machine's clock is 6 min behind PostgreSQL's clock and the provider's clock"),
        (2 * HOUR, timedelta(0), "PostgreSQL's clock is 2 h ahead of this machine's clock and the provider's clock"),
        (timedelta(0), -HOUR, "the provider's clock is 59 min 59 s behind this machine's clock and PostgreSQL's clock"),
    ],
    ids=["ours ahead", "ours behind", "PostgreSQL's", "the provider's"],
)


def code(service: Service, run: Run) -> str:
    """Why a run was red, for programs."""
    return failure_of(service.instance, run.run_id).code


def clocks(run: Run) -> str:
    """What the run shows of them."""
    return next(str(shown["clocks"]) for op, shown in run.metadata.items() if "clocks" in shown)


# --- charging


@WRONG
def test_with_a_wrong_clock_nothing_is_charged_and_the_run_is_red_and_names_it(
    service: Service, database: timedelta, provider: timedelta, named: str
) -> None:
    subscriptions = [service.subscriber() for _ in range(2)]
    service.skew(database=database, provider=provider)

    run = service.run(AUTOPAYMENT)

    assert not run.ok
    assert run.failure.startswith(named)
    assert "Nothing was charged" in run.failure
    assert code(service, run) == "ClocksApart"
    assert service.charges() == []
    assert service.sandbox.count("create") == 0
    assert service.rows("renewal_attempts") == []
    assert {row["code"] for row in run.decisions} == {"clocks_apart"}
    service.skew()
    assert service.run(AUTOPAYMENT).ok
    assert service.charged() == Counter(subscriptions)


def test_clocks_that_differ_by_more_than_two_minutes_are_said_and_charging_goes_on(service: Service) -> None:
    subscription = service.subscriber()
    service.skew(database=-3 * MINUTE)

    run = service.run(AUTOPAYMENT)

    assert run.ok, run.failure
    assert service.charged() == Counter([subscription])
    words = "PostgreSQL's clock is 3 min behind this machine's clock and the provider's clock: set it by NTP"
    assert clocks(run) == words
    assert words in run.log


def test_a_provider_without_a_date_header_is_charged_at_and_the_run_says_that_its_clock_is_not_known(
    service: Service,
) -> None:
    subscription = service.subscriber()
    service.provider.switches.date_header = False
    service.skew(provider=3 * HOUR)

    run = service.run(AUTOPAYMENT)

    assert run.ok, run.failure
    assert service.charged() == Counter([subscription])
    assert clocks(run) == "this machine's clock and PostgreSQL's clock agree; the provider's is not known"
    assert service.sandbox.count("list") == 1


def test_a_provider_that_does_not_say_what_time_it_is_is_not_charged_at(service: Service) -> None:
    service.subscriber()
    service.sandbox.misbehave("list", "cut_before", times=None)

    run = service.run(AUTOPAYMENT)

    assert not run.ok
    assert service.sandbox.count("create") == 0
    assert service.rows("renewal_attempts") == []


def test_the_providers_clock_set_in_mid_run_stops_charging_with_the_next_answer(service: Service) -> None:
    for _ in range(5):
        service.subscriber()

    def jump(answer: Any) -> Any:
        service.sandbox.clock.advance(-3 * HOUR)
        return answer

    service.sandbox.misbehave("create", "change", skip=1, transform=jump)

    run = service.run(AUTOPAYMENT, ops={"charge_renewals": {"max_concurrency": 1}})

    assert not run.ok
    assert len(service.charges()) == 2
    assert "the provider's clock is 2 h 59 min" in run.failure
    assert "Nothing more was charged" in run.failure
    assert code(service, run) == "ClocksApart"
    assert [attempt.state for attempt in service.rows("renewal_attempts")] == ["SUCCEEDED"] * 2
    service.check_books()


def sets_our_clock(service: Service, ahead: timedelta) -> Callable[[Any], Any]:
    """What sets this machine's clock while an answer is on its way."""

    def change(answer: Any) -> Any:
        service.host_ahead += ahead
        return answer

    return change


@pytest.mark.parametrize(
    ("hours", "when"), [(3, "list"), (-3, "list"), (3, "get"), (-3, "get"), (30, "create"), (-3, "create")]
)
def test_our_clock_set_in_mid_run_changes_nothing_of_the_run(service: Service, hours: int, when: str) -> None:
    # A claim says when its key was first sent, and so until when it may be sent again.
    subscriptions = [service.subscriber() for _ in range(3)]
    lost = service.attempt(service.subscriber(), first_sent_at=NOON - 25 * HOUR)
    service.sandbox.misbehave(when, "change", transform=sets_our_clock(service, hours * HOUR))
    service.sandbox.misbehave("create", "cut_after", skip=1)

    service.run(AUTOPAYMENT, ops={"charge_renewals": {"max_concurrency": 1, "max_sends": 1}})

    assert service.charged() == Counter(subscriptions)
    sent = [attempt for attempt in service.rows("renewal_attempts") if attempt.id != lost.id]
    assert [attempt.first_sent_at for attempt in sent] == [NOON] * 3
    # Three hours earlier, a second scan right after this one would give it up.
    assert service.read_attempt(lost.id).first_absent_at == NOON
    assert service.watermark(AUTOPAYMENT) == NOON


@pytest.mark.parametrize("hours", [-3, 24])
def test_a_wrong_clock_that_is_put_right_in_mid_run_stays_wrong_for_the_run(service: Service, hours: int) -> None:
    service.subscriber()
    service.subscriber(ended_at=NOON + 24 * HOUR)
    service.attempt(service.subscriber(), first_sent_at=NOON - 25 * HOUR, first_absent_at=NOON - 10 * MINUTE)
    service.host_ahead = hours * HOUR
    service.sandbox.misbehave("list", "change", transform=sets_our_clock(service, -hours * HOUR))

    run = service.run(AUTOPAYMENT)

    assert not run.ok
    assert code(service, run) == "ClocksApart"
    assert service.sandbox.count("create") == 0
    assert [attempt.state for attempt in service.rows("renewal_attempts")] == ["UNKNOWN"]
    assert service.watermark(AUTOPAYMENT) == NOON  # as before


@pytest.mark.parametrize("job", [*MATCHING, PAYMENTS, RECONCILIATION])
def test_a_wrong_clock_that_is_put_right_in_mid_run_moves_nothing_in_any_job(service: Service, job: str) -> None:
    if job in MATCHING:
        service.tick(job)
    service.payment(service.paid_there("old", status="pending"), created_at=NOON - 5 * 24 * HOUR)
    before = service.watermark(job)
    service.host_ahead = 3 * 24 * HOUR
    service.sandbox.misbehave("list", "change", transform=sets_our_clock(service, -3 * 24 * HOUR))

    run = service.run(job)

    assert not run.ok
    assert code(service, run) == "ClocksApart"
    assert service.watermark(job) == before
    assert service.rows("reconciled_days") == []
    assert [row.status for row in service.rows("payments")] == ["PENDING"]


class SetsPostgresClock(Threads):
    """PostgreSQL's clock is set when charging begins."""

    def __init__(self, service: Service, ahead: timedelta) -> None:
        self._service, self._ahead = service, ahead

    def start(self, target: Callable[..., None], *given: Any, name: str) -> Thread:
        if name == "claim":
            self._service.database_ahead = self._ahead
        return super().start(target, *given, name=name)


@pytest.mark.parametrize("hours", [3, -3])
def test_nothing_is_claimed_once_postgresqls_clock_was_set(service: Service, hours: int) -> None:
    subscriptions = [service.subscriber() for _ in range(3)]
    again = service.subscriber()
    service.attempt(again, method=f"method-{again}", first_sent_at=NOON - 2 * HOUR)

    run = service.run(AUTOPAYMENT, threads=SetsPostgresClock(service, hours * HOUR))

    assert not run.ok
    assert service.sandbox.count("create") == 0
    assert [attempt.last_sent_at for attempt in service.rows("renewal_attempts")] == [NOON - 2 * HOUR]
    assert "PostgreSQL's clock" in run.failure
    assert "Nothing more was charged" in run.failure
    assert code(service, run) == "ClocksApart"
    service.database_ahead = timedelta(0)
    assert service.run(AUTOPAYMENT).ok
    assert service.charged() == Counter([*subscriptions, again])


@pytest.mark.parametrize("minutes", [1, -1, 4])
def test_a_claim_has_postgresqls_time_which_is_the_same_for_every_machine(service: Service, minutes: int) -> None:
    subscription = service.subscriber()
    service.host_ahead = minutes * MINUTE

    assert service.run(AUTOPAYMENT).ok

    [attempt] = service.attempts(subscription)
    assert (attempt.first_sent_at, attempt.last_sent_at) == (NOON, NOON)


def test_one_odd_answer_among_good_ones_stops_nobody(service: Service) -> None:
    subscriptions = [service.subscriber() for _ in range(4)]

    def jump(hours: int) -> Any:
        def change(answer: Any) -> Any:
            service.sandbox.clock.advance(hours * HOUR)
            return answer

        return change

    service.sandbox.misbehave("create", "change", skip=1, transform=jump(3))
    # Asked again, the provider's clock is right.
    service.sandbox.misbehave("list", "change", skip=1, transform=jump(-3))

    run = service.run(AUTOPAYMENT, ops={"charge_renewals": {"max_concurrency": 1}})

    assert run.ok, run.failure
    assert service.charged() == Counter(subscriptions)
    assert service.sandbox.count("list") == 2


def test_with_a_wrong_clock_no_absence_is_noted_and_none_is_given_up(service: Service) -> None:
    subscription = service.subscriber()
    lost = service.attempt(subscription, first_sent_at=NOON - 25 * HOUR)
    service.skew(provider=-3 * HOUR)

    run = service.run(AUTOPAYMENT)

    assert not run.ok
    assert code(service, run) == "ClocksApart"
    assert service.read_attempt(lost.id).first_absent_at is None
    service.skew()
    assert service.run(AUTOPAYMENT).ok
    assert service.read_attempt(lost.id).first_absent_at == NOON
    service.advance(hours=2)
    service.skew(database=HOUR)
    assert not service.run(AUTOPAYMENT).ok
    assert service.read_attempt(lost.id).state == "UNKNOWN"
    service.skew()
    assert service.run(AUTOPAYMENT).ok
    assert [attempt.state for attempt in service.attempts(subscription)] == ["VOID", "SUCCEEDED"]
    assert len(service.charges()) == 1


def test_with_a_wrong_clock_what_the_provider_says_of_an_attempt_is_concluded(service: Service) -> None:
    subscription = service.subscriber(script="pending", ended_at=NOON - HOUR)
    assert service.run(AUTOPAYMENT).ok
    [pending] = service.attempts(subscription)
    service.provider.pay(pending.external_payment_id)
    service.skew(provider=-3 * HOUR)

    run = service.run(AUTOPAYMENT)

    assert not run.ok
    assert service.settled(pending.external_payment_id) == ["renewed"]


@pytest.mark.parametrize("shards", [None, 2], ids=["whole", "divided"])
def test_a_wrong_clock_makes_a_run_red_that_has_nothing_to_do(service: Service, shards: int | None) -> None:
    service.skew(database=6 * MINUTE)

    run = service.run(AUTOPAYMENT, shards=shards)

    assert "clock" in run.failure
    assert code(service, run) == "ClocksApart"


def test_a_divided_run_charges_nothing_either(service: Service) -> None:
    for _ in range(4):
        service.subscriber()
    service.skew(provider=HOUR)

    run = service.run(AUTOPAYMENT, shards=2)

    assert code(service, run) == "ClocksApart"
    assert service.charges() == []


def test_a_dry_run_shows_what_a_wrong_clock_holds_back(service: Service) -> None:
    subscription = service.subscriber()
    service.skew(provider=HOUR)

    run = service.run(AUTOPAYMENT, dry_run=True)

    assert code(service, run) == "ClocksApart"
    assert run.reasons(f"subscription {subscription}") == ["leave: charge, if the clocks were not apart"]


# --- attempts from the future


def test_an_attempt_from_the_future_is_searched_for_back_to_where_it_may_be_and_never_sent_again(
    service: Service,
) -> None:
    subscription = service.subscriber(ended_at=NOON - 3 * HOUR)
    service.sandbox.misbehave("create", "cut_after", times=None)
    service.run(AUTOPAYMENT)
    service.sandbox.behave()
    [attempt] = service.attempts(subscription)
    # The machine's clock was five hours ahead when it wrote this.
    service.execute(
        "UPDATE billing_orchestration.renewal_attempts SET first_sent_at = first_sent_at + interval '5 hours',"
        " last_sent_at = last_sent_at + interval '5 hours'"
    )
    sends = service.sandbox.count("create")

    run = service.run(AUTOPAYMENT)

    assert run.ok, run.failure
    assert service.sandbox.count("create") == sends
    assert service.read_attempt(attempt.id).state == "SUCCEEDED"
    assert service.charged() == Counter([subscription])
    service.check_books()


def test_an_attempt_from_the_future_that_two_searches_miss_is_given_up_and_its_key_is_never_sent_again(
    service: Service,
) -> None:
    subscription = service.subscriber(ended_at=NOON - 3 * HOUR)
    lost = service.attempt(subscription, first_sent_at=NOON + 5 * HOUR)

    assert service.run(AUTOPAYMENT).ok
    assert service.read_attempt(lost.id).first_absent_at == NOON
    # Its instant is no longer in the future, and looks fresh.
    service.advance(hours=6)
    assert service.run(AUTOPAYMENT).ok
    assert service.read_attempt(lost.id).state == "VOID"
    service.advance(days=1)
    assert service.run(AUTOPAYMENT).ok

    assert [attempt.state for attempt in service.attempts(subscription)] == ["VOID", "SUCCEEDED"]
    assert str(lost.idempotence_key) not in {request.idempotence_key for request in service.sandbox.requests}


# --- matching


@BOTH
def test_with_a_wrong_clock_what_is_found_is_settled_and_no_watermark_moves(service: Service, job: str) -> None:
    plan = service.plan()
    service.tick(job)
    service.advance(minutes=10)
    in_sight = service.paid_there(user="anna", plan_id=plan, created_at=service.now - 5 * MINUTE)
    service.payment(in_sight, created_at=service.now - 5 * MINUTE)
    service.wrong_by(30 * MINUTE)

    run = service.tick(job)

    assert not run.ok
    assert "this machine's clock is" in run.failure
    assert "no time counts as covered" in run.failure
    assert code(service, run) == "ClocksApart"
    assert service.settled(in_sight) == ["created"]
    assert service.watermark(job) == NOON


@BOTH
def test_a_clock_ahead_for_hours_loses_no_purchase(service: Service, job: str) -> None:
    plan = service.plan()
    service.tick(job)
    right = NOON
    service.wrong_by(3 * HOUR)
    for _ in range(6):
        right += HOUR
        service.now = right + 3 * HOUR
        service.sandbox.clock.set(right)
        bought = service.paid_there(f"at {right}", user=f"user of {right}", plan_id=plan, created_at=right - MINUTE)
        service.payment(bought, created_at=right - MINUTE)
        assert not service.tick(job).ok
        # The mark stays where it was, so that each window reaches back to it.
        assert service.watermark(job) == NOON
    service.database_ahead = service.provider_ahead = timedelta(0)
    service.set_time(right + 2 * MINUTE)

    assert service.tick(job).ok

    assert len(service.rows("settlements")) == 6
    assert service.watermark(job) == service.now


@BOTH
def test_a_gap_is_not_reported_by_a_wrong_clock(service: Service, job: str) -> None:
    service.tick(job)
    service.wrong_by(timedelta(days=30))

    assert not service.tick(job).ok

    assert service.rows("quarantine") == []


@BOTH
def test_a_watermark_in_the_future_is_not_trusted_and_put_right(service: Service, job: str) -> None:
    plan = service.plan()
    service.tick(job)
    service.execute("UPDATE billing_orchestration.watermarks SET covered_until = :at", at=NOON + 3 * HOUR)
    for hours in (2, 6 * 24):
        name = service.paid_there(f"{hours} h ago", user=f"{hours}", plan_id=plan, created_at=NOON - hours * HOUR)
        service.payment(name, created_at=NOON - hours * HOUR)

    # A backfill proves nothing about the hours in between.
    assert service.run(job, partition="2026-03-12-11:00").ok
    assert service.watermark(job) == NOON + 3 * HOUR
    run = service.tick(job)

    assert run.ok, run.failure
    assert len(service.rows("settlements")) == 2
    assert service.watermark(job) == NOON
    assert service.rows("quarantine") == []


@BOTH
def test_the_webhooks_minute_is_counted_by_the_providers_clock(service: Service, job: str) -> None:
    service.skew(provider=-90 * SECOND)
    there = NOON - 90 * SECOND
    fresh = service.paid_there(plan_id=service.plan(), created_at=there - 40 * SECOND)
    service.payment(fresh, created_at=there)

    assert service.tick(job).ok

    assert service.settled(fresh) == []


# --- expiry


@WRONG
def test_with_a_wrong_clock_no_payment_expires_and_what_is_paid_is_settled(
    service: Service, database: timedelta, provider: timedelta, named: str
) -> None:
    ago = NOON - timedelta(days=8)
    paid, unpaid = (
        service.payment(service.paid_there(status=status, plan_id=service.plan(), created_at=ago), created_at=ago)
        for status in ("succeeded", "pending")
    )
    service.skew(database=database, provider=provider)

    run = service.run(PAYMENTS)

    assert code(service, run) == "ClocksApart"
    assert run.failure.startswith(named)
    assert "1 payments stay PENDING" in run.failure
    assert service.statuses("payments", paid, unpaid) == ["SUCCEEDED", "PENDING"]
    service.skew()
    assert service.run(PAYMENTS).ok
    assert service.status("payments", unpaid) == "EXPIRED"


@pytest.mark.parametrize("ahead", [6 * MINUTE, -timedelta(days=4)])
def test_with_a_wrong_clock_no_subscription_expires(service: Service, ahead: timedelta) -> None:
    subscription = service.subscription(ended_at=NOON - timedelta(days=5))
    service.skew(database=ahead)

    run = service.run(SUBSCRIPTIONS)

    assert code(service, run) == "ClocksApart"
    assert "stopped before anything was applied" in run.failure
    assert service.status("subscriptions", subscription) == "ACTIVE"
    service.skew(database=3 * MINUTE)
    said = service.run(SUBSCRIPTIONS)
    assert said.ok, said.failure
    assert "PostgreSQL's clock is 3 min ahead of this machine's clock" in clocks(said)
    assert service.status("subscriptions", subscription) == "EXPIRED"


# --- ticks


@pytest.mark.parametrize("job", [AUTOPAYMENT, PAYMENTS, SUBSCRIPTIONS, *MATCHING])
def test_a_tick_that_is_a_little_ahead_of_this_machines_clock_stands_for_now(service: Service, job: str) -> None:
    for ahead in (SECOND, 2 * MINUTE):
        run = service.tick(job, as_of=NOON + ahead)
        assert run.ok, run.failure
        assert run.report["as_of"] == "2026-03-12T12:00:00+00:00 (from config)"
    assert "lies in the future" in service.tick(job, as_of=NOON + 2 * MINUTE + SECOND).failure
    # A person's instant is not a tick.
    assert "lies in the future" in service.run(job, as_of=NOON + SECOND).failure


def test_a_watermark_never_runs_ahead_of_this_machines_clock(service: Service) -> None:
    for job in MATCHING:
        assert service.tick(job, as_of=NOON + MINUTE).ok
        assert service.watermark(job) == datetime(2026, 3, 12, 12, tzinfo=timezone.utc)


# --- reconciliation


@WRONG
def test_with_a_wrong_clock_a_day_does_not_count_as_reconciled_and_what_is_paid_is_settled(
    service: Service, database: timedelta, provider: timedelta, named: str
) -> None:
    service.paid_there("paid", user="anna", plan_id=service.monthly, created_at=NOON - timedelta(days=1))
    service.skew(database=database, provider=provider)

    run = service.run(RECONCILIATION)

    assert not run.ok
    assert run.failure.startswith(named)
    assert "does not count as reconciled" in run.failure
    assert code(service, run) == "ClocksApart"
    assert service.settled("paid") == ["created"]
    assert service.rows("reconciled_days") == []
    service.skew()
    assert service.run(RECONCILIATION).ok
    assert len(service.rows("reconciled_days")) == 1
