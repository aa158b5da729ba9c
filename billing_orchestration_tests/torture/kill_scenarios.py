"""What the killed runs work on: for each job a small service in which every kind of its work is waiting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from billing_orchestration.domain.attempts import State
from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.jobs.service import Service
from billing_orchestration_tests.torture.kill_oracle import Expected

AUTOPAYMENT = "autopayment_job"
MATCHING = ("matching_pending_payments_job", "matching_successful_payments_job")
DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
A_MONTH_LATER = NOON.replace(month=4)
SENT_ONCE = {"charge_renewals": {"max_sends": 1}}


@dataclass(frozen=True)
class Story:
    """A scenario once its rows are written: what must come of it, and how the provider misbehaves in each case."""

    expected: Expected
    misbehave: Callable[[Sandbox], None] = lambda _: None


@dataclass(frozen=True)
class Scenario:
    """A job with its work. `again_after`: how long after a killed run the next one comes."""

    name: str
    job: str
    prepare: Callable[[Service], Story]
    again_after: timedelta
    ops: Mapping[str, Any] = field(default_factory=dict)
    shards: int | None = None


def _few_renewals(service: Service, count: int = 1) -> Story:
    paid = [service.subscriber() for _ in range(count)]
    declined = service.subscriber(script="canceled:insufficient_funds")
    lost = service.subscriber()

    def misbehave(sandbox: Sandbox) -> None:
        sandbox.misbehave("create", "cut_after", payment_method_id=f"method-{lost}")

    return Story(
        Expected(
            ends={**dict.fromkeys([*paid, lost], ("ACTIVE", A_MONTH_LATER)), declined: ("ACTIVE", NOON)},
            attempts={**dict.fromkeys([*paid, lost], ("SUCCEEDED",)), declined: ("DECLINED",)},
        ),
        misbehave,
    )


def _lost(service: Service, effect: str, **subscriber: Any) -> int:
    subscription = service.subscriber(**subscriber)
    service.sandbox.misbehave("create", effect, payment_method_id=f"method-{subscription}")
    return subscription


def _run_for_new_ones(service: Service, subscriptions: list[int], **run: Any) -> None:
    """A run of autopayment that looks at these only; the others are paused meanwhile."""
    service.execute("UPDATE subscriptions SET status = 'PAUSED' WHERE NOT id = ANY(:ids)", ids=subscriptions)
    service.run(AUTOPAYMENT, ops=SENT_ONCE, **run)
    service.execute("UPDATE subscriptions SET status = 'ACTIVE'")
    service.sandbox.behave()


@dataclass
class _Renewals:
    """Subscriptions, each with what must come of it in the end."""

    service: Service
    ends: dict[int, tuple[str, Any]] = field(default_factory=dict)
    attempts: dict[int, list[str]] = field(default_factory=dict)

    def expect(self, subscription: int, end: Any, *states: str, status: str = "ACTIVE") -> int:
        """The end of the period, and the states of the attempts."""
        self.ends[subscription], self.attempts[subscription] = (status, end), list(states)
        return subscription


def _left_yesterday(renewals: _Renewals) -> tuple[int, int]:
    """Too old to be sent again today, or left pending. Returns one to be missed twice, one to be unwanted."""
    service, expect = renewals.service, renewals.expect
    before, after = NOON - 25 * HOUR, A_MONTH_LATER - 25 * HOUR
    service.set_time(before)
    unwanted = expect(_lost(service, "cut_after"), after, "SUCCEEDED", status="CANCELED")
    absent_twice = expect(_lost(service, "cut_before"), after, "VOID", "SUCCEEDED")
    old = [
        expect(_lost(service, "cut_after"), after, "SUCCEEDED"),
        expect(_lost(service, "cut_after", script="canceled:card_expired"), before, "STOPPED"),
        unwanted,
        absent_twice,
        expect(_lost(service, "cut_before"), after, "VOID", "SUCCEEDED"),
        expect(service.subscriber(script="pending:succeeded:90000"), after, "SUCCEEDED"),
        expect(service.subscriber(script="pending"), before, "PENDING"),
        expect(
            service.subscriber(script=["pending:canceled:insufficient_funds:90000", "succeeded"]),
            after, "DECLINED", "SUCCEEDED",
        ),
    ]  # fmt: skip
    _run_for_new_ones(service, old)
    return absent_twice, unwanted


def _left_this_morning(renewals: _Renewals) -> None:
    """An answer that was lost, and two charges that nobody was there to take, one with a new price since."""
    service, expect = renewals.service, renewals.expect
    service.set_time(NOON - 3 * HOUR)
    _run_for_new_ones(service, [expect(_lost(service, "reset_after"), A_MONTH_LATER - 3 * HOUR, "SUCCEEDED")])
    service.set_time(NOON - HOUR)
    dearer_plan = service.plan("199.00")
    planned = expect(service.subscriber(), A_MONTH_LATER - HOUR, "SUCCEEDED")
    dearer = expect(service.subscriber(dearer_plan), A_MONTH_LATER - HOUR, "VOID", "SUCCEEDED")
    for subscription, amount in ((planned, "299.00"), (dearer, "199.00")):
        service.attempt(
            subscription, state=State.PLANNED, first_sent_at=None, method=f"method-{subscription}", amount=amount
        )
    service.execute("UPDATE prices SET amount = 249 WHERE plan_id = :id", id=dearer_plan)


def _every_kind_of_renewal(service: Service) -> Story:
    renewals = _Renewals(service)
    expect = renewals.expect
    absent_twice, unwanted = _left_yesterday(renewals)
    _left_this_morning(renewals)
    service.execute(
        "UPDATE billing_orchestration.renewal_attempts SET first_absent_at = :at WHERE subscription_id = :id",
        at=NOON - 2 * HOUR,
        id=absent_twice,
    )
    service.execute("UPDATE subscriptions SET status = 'CANCELED' WHERE id = :id", id=unwanted)
    service.set_time(NOON)
    for _ in range(2):
        expect(service.subscriber(), A_MONTH_LATER, "SUCCEEDED")
    lost = expect(service.subscriber(), A_MONTH_LATER, "SUCCEEDED")
    expect(service.subscriber(script="canceled:card_expired"), NOON, "STOPPED")
    expect(service.subscriber(script="canceled:call_issuer"), NOON, "DECLINED")
    review = expect(service.subscriber(), NOON, "REVIEW")

    def misbehave(sandbox: Sandbox) -> None:
        sandbox.misbehave("create", "error_after", payment_method_id=f"method-{lost}")
        sandbox.misbehave(
            "create", "change", payment_method_id=f"method-{review}", set={"amount.value": "1.00"}, times=None
        )

    quarantine = {"amount_differs": 1, "unwanted_renewal": 1}
    return Story(Expected(ends=renewals.ends, attempts=renewals.attempts, quarantine=quarantine), misbehave)


def _ends_of_subscriptions(service: Service) -> Story:
    held = _lost(service, "cut_after", ended_at=NOON - 3 * DAY)
    _run_for_new_ones(service, [held])
    plan = service.plan()
    over = [service.subscription(plan_id=plan, ended_at=NOON - timedelta(days=days)) for days in (3, 4, 10)]
    grace = service.subscription(plan_id=plan, ended_at=NOON - 2 * DAY)
    paused = service.subscription(plan_id=plan, ended_at=NOON - 10 * DAY, status="PAUSED")
    ends: dict[int, tuple[str, Any]] = {
        subscription: ("EXPIRED", NOON - timedelta(days=days))
        for subscription, days in zip(over, (3, 4, 10), strict=True)
    }
    ends |= {
        held: ("ACTIVE", NOON - 3 * DAY),
        grace: ("ACTIVE", NOON - 2 * DAY),
        paused: ("PAUSED", NOON - 10 * DAY),
    }
    # The held one's success is found by a later run of another job; here it is still unknown.
    return Story(Expected(ends=ends, attempts={held: ["UNKNOWN"]}, unsettled=1))


def _stale_payments(service: Service) -> Story:
    old = NOON - 8 * DAY
    plan = service.plan()
    running = service.subscription("runs", plan_id=plan, ended_at=NOON + DAY)
    service.tolerate_duplicates()

    def stale(name: str | None, status: str | None = None, **there: Any) -> int:
        if status is not None:
            service.paid_there(name, status=status, plan_id=plan, created_at=old, **there)
        return service.payment(name, created_at=old)

    payments = {
        stale("unpaid", "pending"): "EXPIRED",
        stale("declined", "canceled"): "EXPIRED",
        stale("unheard-of"): "EXPIRED",
        stale(None): "EXPIRED",
        stale("paid-by-a-new-user", "succeeded", user="new"): "SUCCEEDED",
        stale("paid-by-a-running-one", "succeeded", user="runs"): "SUCCEEDED",
        stale("paid-back", "succeeded", user="back", refunded_amount="299.00"): "REFUNDED",
        stale("held", "waiting_for_capture"): "PENDING",
        stale("paid-in-two-rows", "succeeded", user="two"): "SUCCEEDED",
        service.payment("paid-in-two-rows", created_at=old): "EXPIRED",
        service.payment("young", created_at=NOON - 6 * DAY): "PENDING",
    }
    return Story(
        Expected(
            ends={running: ("ACTIVE", (NOON + DAY).replace(month=4))},
            payments=payments,
            bought=("new", "two"),
            refunds=1,
        )
    )


def _covered_until_an_hour_ago(service: Service) -> None:
    service.set_time(NOON - HOUR)
    for job in MATCHING:
        service.run(job)
    service.set_time(NOON)


def _pending_payments(service: Service) -> Story:
    _covered_until_an_hour_ago(service)
    plan = service.plan()
    running = service.subscription("runs", plan_id=plan, ended_at=NOON + DAY)
    just = NOON - timedelta(minutes=20)

    def pending(user: str, **there: Any) -> int:
        name = service.paid_there(f"paid-by-{user}", user=user, plan_id=plan, **there)
        return service.payment(name, created_at=just)

    payments = {
        pending("new"): "SUCCEEDED",
        pending("runs"): "SUCCEEDED",
        pending("back", refunded_amount="299.00"): "REFUNDED",
        pending("other", amount="1.00"): "PENDING",
        service.payment("unpaid", created_at=just): "PENDING",
    }
    return Story(
        Expected(
            ends={running: ("ACTIVE", (NOON + DAY).replace(month=4))},
            payments=payments,
            bought=("new",),
            quarantine={"amount_differs": 1},
            refunds=1,
        )
    )


def _successful_payments(service: Service) -> Story:
    renewed = _lost(service, "cut_after", ended_at=NOON)
    _covered_until_an_hour_ago(service)
    _run_for_new_ones(service, [renewed])
    plan = service.plan()
    running = service.subscription("runs", plan_id=plan, ended_at=NOON + DAY)
    service.paid_there("orphan-new", user="new", plan_id=plan)
    service.paid_there("orphan-of-a-running-one", user="runs", plan_id=plan)
    service.paid_there("orphan-paid-back", user="back", plan_id=plan, refunded_amount="299.00")
    service.paid_there("orphan-of-nobody", metadata={"user_id": "nobody"})
    service.paid_there("unreadable", user="odd", plan_id=plan, override={"amount": {"value": "x", "currency": "RUB"}})
    revived = service.paid_there("revived", user="late", plan_id=plan)
    canceled = service.paid_there("canceled", user="no", plan_id=plan)
    payments = {
        service.payment(revived, status="EXPIRED"): "SUCCEEDED",
        service.payment(canceled, status="CANCELED"): "CANCELED",
    }
    return Story(
        Expected(
            ends={running: ("ACTIVE", (NOON + DAY).replace(month=4)), renewed: ("ACTIVE", A_MONTH_LATER)},
            attempts={renewed: ["SUCCEEDED"]},
            payments=payments,
            bought=("new", "late"),
            quarantine={"metadata": 1, "unreadable": 1, "canceled_here": 1},
            refunds=1,
        )
    )


def _a_day_to_reconcile(service: Service) -> Story:
    """Yesterday: three successes that nobody has seen, and three rows that say otherwise than the provider."""
    at = NOON - DAY
    plan = service.plan()
    running = service.subscription("runs", plan_id=plan, ended_at=NOON + DAY)
    customer = service.subscription("customer", plan_id=plan, ended_at=NOON + 10 * DAY)
    for user, there in (("new", {}), ("runs", {}), ("back", {"refunded_amount": "299.00"})):
        service.paid_there(f"missed-of-{user}", user=user, plan_id=plan, created_at=at, **there)
    payments = {}
    for name, status, amount in (("dear", "succeeded", "199.00"), ("unpaid", "canceled", "299.00"),
                                 ("given-back", "succeeded", "299.00")):  # fmt: skip
        service.paid_there(name, user="customer", plan_id=plan, created_at=at, status=status)
        row = service.payment(name, subscription_id=customer, status="SUCCEEDED", amount=amount, created_at=at)
        payments[row] = "SUCCEEDED"
    service.provider.refund("given-back", "99.00", at=at + HOUR)
    return Story(
        Expected(
            ends={
                running: ("ACTIVE", (NOON + DAY).replace(month=4)),
                customer: ("ACTIVE", NOON + 10 * DAY),
            },
            payments=payments,
            bought=("new",),
            quarantine={"amount_differs": 1, "not_paid_there": 1, "refunded_there": 1},
            refunds=1,
        )
    )


def _at_a_time(max_concurrency: int) -> Mapping[str, Any]:
    return {"charge_renewals": {"max_concurrency": max_concurrency, "resend_wait_s": 0.0}}


SHORT = Scenario("autopayment, one by one", AUTOPAYMENT, _few_renewals, 2 * HOUR, _at_a_time(1))
ALL = (
    SHORT,
    Scenario(
        "autopayment, side by side", AUTOPAYMENT, lambda service: _few_renewals(service, 6), 2 * HOUR, _at_a_time(4)
    ),
    Scenario("autopayment, every kind of renewal", AUTOPAYMENT, _every_kind_of_renewal, 2 * HOUR, _at_a_time(4)),
    Scenario("expiry of subscriptions", "expire_subscriptions_job", _ends_of_subscriptions, 2 * HOUR),
    Scenario("expiry of payments", "expire_payments_job", _stale_payments, 2 * HOUR),
    Scenario("matching pending payments", MATCHING[0], _pending_payments, timedelta(minutes=2)),
    Scenario("matching successful payments", MATCHING[1], _successful_payments, timedelta(minutes=2)),
    Scenario("reconciliation", "reconciliation_job", _a_day_to_reconcile, 2 * HOUR),
    Scenario(
        "autopayment, divided",
        AUTOPAYMENT,
        lambda service: _few_renewals(service, 2),
        2 * HOUR,
        {"renew_shard": {"max_concurrency": 1, "resend_wait_s": 0.0}},
        shards=2,
    ),
)
