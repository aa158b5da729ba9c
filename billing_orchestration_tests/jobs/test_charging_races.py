"""Charging while others work on the same rows: other runs, the matching jobs, the service itself. One effect each.

Where the order matters it is the test's: a run is held at a call of the provider (`interleaving`), or at a row lock.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta

import pytest
import sqlalchemy as sa

from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.jobs.interleaving import Held, Worker
from billing_orchestration_tests.jobs.service import Service
from billing_orchestration_tests.waiting import wait_for_a_blocked_session

JOB = "autopayment_job"
MATCHING = ("matching_pending_payments_job", "matching_successful_payments_job")
ONE_AT_A_TIME = {"charge_renewals": {"max_concurrency": 1}}
SENT_ONCE = {"charge_renewals": {"max_sends": 1}}
BAD_REQUEST = json.dumps({"type": "error", "id": "1", "code": "invalid_request", "description": "no"})
NOBODY_LISTENS = "http://127.0.0.1:9/v3"
A_MONTH_LATER = NOON.replace(month=4)


def never_sent(service: Service, count: int) -> list[int]:
    """Subscriptions with an attempt each that is planned and certainly never sent: nobody listened at the address."""
    subscriptions = [service.subscriber() for _ in range(count)]
    service.plan_renewals_only(ops=SENT_ONCE)
    for subscription in subscriptions:
        [attempt] = service.attempts(subscription)
        assert (attempt.state, attempt.first_sent_at) == ("PLANNED", None)
    return subscriptions


def set_price(service: Service, amount: str) -> None:
    """The service's managers change every price."""
    service.execute("UPDATE prices SET amount = :amount", amount=amount)


@pytest.mark.parametrize("answer", ["refused", "never sent"])
def test_an_attempt_that_another_run_has_sent_meanwhile_is_not_taken_for_one_that_was_never_sent(
    service: Service, answer: str
) -> None:
    first, second = never_sent(service, 2)
    held = Held()
    slow = Worker(service, {f"before charge method-{first}": held})
    slow.start(JOB, ops=ONE_AT_A_TIME)
    held.reached()
    # It has read both attempts as never sent. Another run sends the second, and loses the answer.
    service.sandbox.misbehave("create", "cut_after", payment_method_id=f"method-{second}")
    service.run(JOB, ops=SENT_ONCE)
    assert [attempt.state for attempt in service.attempts(second)] == ["UNKNOWN"]
    assert service.charged() == Counter([second])
    if answer == "refused":
        service.sandbox.misbehave(
            "create", "body_before", payment_method_id=f"method-{second}", status=400, body=BAD_REQUEST
        )
    else:
        slow.nobody_listens_for(f"method-{second}", NOBODY_LISTENS)
    held.let_go()
    slow.finished()

    assert [attempt.state for attempt in service.attempts(second)] == ["UNKNOWN"]
    # What is not known to be unsent is not planned anew, whatever has changed since.
    set_price(service, "499.00")
    for _ in range(2):
        service.run(JOB)
        service.advance(days=1)
    assert service.charged() == Counter([first, second])
    service.check_books()


def test_a_price_that_changes_while_its_planned_attempt_is_being_sent_makes_no_second_charge(service: Service) -> None:
    asked = service.subscriber(script="pending")
    service.run(JOB)
    [planned] = never_sent(service, 1)
    [pending] = service.attempts(asked)
    # One run has read the old price and is about to send the planned attempt ...
    sending = Held()
    sender = Worker(service, {f"before charge method-{planned}": sending}).start(JOB)
    sending.reached()
    # ... when the price changes, and another run plans to void the attempt and to charge the new price by a new one.
    # It has read the attempt before the first run claimed it: so it is let go as if it had waited at the provider.
    set_price(service, "399.00")
    service.execute(
        "UPDATE billing_orchestration.renewal_attempts SET first_sent_at = NULL, last_sent_at = NULL, sends = sends - 1"
        " WHERE subscription_id = :id",
        id=planned,
    )
    asking = Held()
    planner = Worker(service, {f"before get {pending.external_payment_id}": asking}).start(JOB)
    asking.reached()
    service.execute(
        "UPDATE billing_orchestration.renewal_attempts SET first_sent_at = :now, last_sent_at = :now, sends = sends + 1"
        " WHERE subscription_id = :id",
        id=planned,
        now=service.now,
    )
    asking.let_go()
    planner.finished()
    sending.let_go()
    sender.finished()

    service.run(JOB)

    assert service.charged() == Counter([planned])
    service.check_books()


def test_a_run_that_slept_for_a_day_between_claim_and_send_sends_nothing(service: Service) -> None:
    subscription = service.subscriber()
    sending = Held()
    sleeper = Worker(service, {f"before charge method-{subscription}": sending}).start(JOB)
    sending.reached()
    # Its attempt is claimed and counts as sent. A day later it is searched for, twice, and replaced by a new one.
    service.advance(hours=25)
    service.run(JOB)
    service.advance(hours=2)
    assert service.run(JOB).ok
    assert [attempt.state for attempt in service.attempts(subscription)] == ["VOID", "SUCCEEDED"]

    sleeper.service.set_time(service.now)
    sending.let_go()
    sleeper.finished()

    assert service.charged() == Counter([subscription])
    service.check_books()


def test_a_claim_that_waited_too_long_for_its_turn_is_made_anew_and_then_sent(service: Service) -> None:
    subscription = service.subscriber()
    sending = Held()
    slow = Worker(service, {f"before charge method-{subscription}": sending}).start(JOB)
    sending.reached()
    slow.service.advance(minutes=11)
    sending.let_go()

    run = slow.finished()

    assert run.ok, run.failure
    [attempt] = service.attempts(subscription)
    assert (attempt.state, attempt.sends) == ("SUCCEEDED", 2)
    assert service.sandbox.count("create") == 1
    assert service.charged() == Counter([subscription])
    service.check_books()


def test_a_run_that_meets_an_attempt_in_anothers_hands_leaves_it_alone(service: Service) -> None:
    subscription = service.subscriber()
    sending = Held()
    first = Worker(service, {f"before charge method-{subscription}": sending}).start(JOB)
    sending.reached()

    second = service.run(JOB)

    assert second.reasons(f"subscription {subscription}") == ["skipped: another run is charging it at this moment"]
    assert service.sandbox.count("create") == 0
    sending.let_go()
    assert first.finished().ok
    assert service.charged() == Counter([subscription])


def test_an_attempt_is_in_its_runs_hands_until_what_became_of_it_is_committed(service: Service) -> None:
    subscription = service.subscriber()
    with service.engine.begin() as somebody:
        # Charged, and nobody can write it down yet: what a run reads and claims with is not in the way.
        somebody.execute(sa.text("LOCK TABLE payments IN EXCLUSIVE MODE"))
        first = Worker(service).start(JOB)
        wait_for_a_blocked_session(service.engine)

        second = service.run(JOB)

    assert second.reasons(f"subscription {subscription}") == ["skipped: another run is charging it at this moment"]
    assert first.finished().ok
    assert service.sandbox.count("create") == 1
    assert service.charged() == Counter([subscription])


def test_a_lock_is_given_back_after_an_attempt_that_was_sent_twice(service: Service) -> None:
    twice = service.subscriber()
    service.sandbox.misbehave("create", "error_before", payment_method_id=f"method-{twice}")
    last, other = service.subscriber(), service.subscriber()
    sending = Held()
    worker = Worker(service, {f"before charge method-{last}": sending})
    # The other shows that not everybody fails. Then the first is sent again, and the last is still on its way.
    worker.start(JOB, ops={"charge_renewals": {"max_concurrency": 1, "resend_wait_s": 0.0}})
    sending.reached()

    with service.engine.connect() as connection:
        locks = connection.execute(
            sa.text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted")
        ).scalar_one()

    sending.let_go()
    worker.finished()
    assert locks == 1
    assert service.charged() == Counter([twice, last, other])


@pytest.mark.parametrize("planned_before", [False, True])
def test_a_subscription_that_somebody_keeps_locked_does_not_hold_up_the_others(
    impatient: Service, planned_before: bool
) -> None:
    service = impatient
    subscriptions = never_sent(service, 3) if planned_before else [service.subscriber() for _ in range(3)]
    locked, *others = subscriptions
    table, column = (
        ("billing_orchestration.renewal_attempts", "subscription_id") if planned_before else ("subscriptions", "id")
    )
    with service.engine.begin() as somebody:
        somebody.execute(sa.text(f"SELECT FROM {table} WHERE {column} = :id FOR UPDATE"), {"id": locked})
        run = service.run(JOB)

    assert not run.ok
    assert f"subscription {locked} (never sent): not sent: the database was busy" in run.failure
    assert service.charged() == Counter(others)
    assert service.run(JOB).ok
    assert service.charged() == Counter(subscriptions)
    service.check_books()


@pytest.mark.parametrize("locked_one", ["planned before", "new"])
def test_a_locked_row_holds_up_neither_what_is_new_nor_what_was_planned_before(
    impatient: Service, locked_one: str
) -> None:
    """Both kinds are claimed side by side, by different statements."""
    service = impatient
    planned = never_sent(service, 4)
    new = [service.subscriber() for _ in range(4)]
    # The last of the former and the first of the latter share a group: by then the run is wide enough.
    locked = planned[-1] if locked_one == "planned before" else new[0]
    with service.engine.begin() as somebody:
        somebody.execute(sa.text("SELECT FROM subscriptions WHERE id = :id FOR UPDATE"), {"id": locked})
        somebody.execute(
            sa.text("SELECT FROM billing_orchestration.renewal_attempts WHERE subscription_id = :id FOR UPDATE"),
            {"id": locked},
        )
        run = service.run(JOB, ops={"charge_renewals": {"max_concurrency": 8}})

    others = [subscription for subscription in (*planned, *new) if subscription != locked]
    assert service.charged() == Counter(others)
    assert f"subscription {locked} (never sent): not sent: the database was busy" in run.failure
    assert service.attempts(locked) == [] or service.attempts(locked)[0].first_sent_at is None
    assert service.run(JOB).ok
    assert service.charged() == Counter([*planned, *new])
    service.check_books()


def test_an_answer_that_cannot_be_written_down_does_not_lose_the_others_of_its_batch(impatient: Service) -> None:
    service = impatient
    locked = service.subscriber(script="canceled:insufficient_funds")
    others = [service.subscriber() for _ in range(3)]
    held = Held()
    worker = Worker(service, {f"after charge method-{locked}": held})
    worker.start(JOB, ops={"charge_renewals": {"max_concurrency": 4}})
    held.reached()
    with service.engine.begin() as somebody:
        somebody.execute(
            sa.text("SELECT FROM billing_orchestration.renewal_attempts WHERE subscription_id = :id FOR UPDATE"),
            {"id": locked},
        )
        held.let_go()
        run = worker.finished()

    assert not run.ok
    assert f"subscription {locked} (declined)" in run.failure
    assert service.charged() == Counter(others)
    service.check_books()
    # It counts as sent: the same key hears the same decline, and is no second try.
    service.run(JOB)
    assert [attempt.state for attempt in service.attempts(locked)] == ["DECLINED"]
    assert len(service.provider.known_keys()) == 4


def test_a_conclusion_that_cannot_be_written_down_does_not_hold_up_the_charges(impatient: Service) -> None:
    service = impatient
    stuck = service.subscriber(script="pending:canceled:general_decline:60")
    told = service.subscriber(script="pending:canceled:general_decline:60")
    service.run(JOB)
    service.advance(minutes=5)
    due = service.subscriber()
    with service.engine.begin() as somebody:
        somebody.execute(
            sa.text("SELECT FROM billing_orchestration.renewal_attempts WHERE subscription_id = :id FOR UPDATE"),
            {"id": stuck},
        )
        run = service.run(JOB)

    assert not run.ok
    assert f"subscription {stuck}, attempt 1: the database was busy" in run.failure
    assert [attempt.state for attempt in service.attempts(told)] == ["DECLINED"]
    assert service.charged() == Counter([due])


@pytest.mark.parametrize("planned_before", [False, True])
def test_what_is_canceled_between_reading_and_sending_is_not_charged(service: Service, planned_before: bool) -> None:
    first, changed = never_sent(service, 2) if planned_before else [service.subscriber() for _ in range(2)]
    held = Held()
    worker = Worker(service, {f"before charge method-{first}": held}).start(JOB, ops=ONE_AT_A_TIME)
    held.reached()
    service.execute("UPDATE subscriptions SET status = 'CANCELED' WHERE id = :id", id=changed)
    held.let_go()

    run = worker.finished()

    assert run.ok, run.failure
    [reason] = run.reasons(f"subscription {changed}")
    assert reason.startswith("skipped: looked at again right before sending")
    assert service.charged() == Counter([first])
    assert service.sandbox.count("create") == 1


def test_a_change_that_is_not_committed_yet_is_waited_for_before_sending(service: Service) -> None:
    canceled = service.subscriber()
    with service.engine.connect() as customer:
        customer.execute(sa.text("UPDATE subscriptions SET status = 'CANCELED' WHERE id = :id"), {"id": canceled})
        worker = Worker(service).start(JOB)
        wait_for_a_blocked_session(service.engine)
        customer.commit()

    assert worker.finished().ok
    assert service.sandbox.count("create") == 0
    assert service.attempts(canceled) == []


def test_a_cancellation_while_the_charge_is_under_way_keeps_the_grant_and_asks_a_person(service: Service) -> None:
    subscription = service.subscriber()
    held = Held()
    worker = Worker(service, {f"after charge method-{subscription}": held}).start(JOB)
    held.reached()
    service.execute("UPDATE subscriptions SET status = 'CANCELED' WHERE id = :id", id=subscription)
    held.let_go()

    worker.finished()

    # The customer paid, so the period is theirs; whether it is paid back is a person's decision.
    assert service.ended_at(subscription) == A_MONTH_LATER
    assert service.row("subscriptions", subscription).status == "CANCELED"
    [problem] = service.rows("quarantine")
    assert (problem.kind, problem.subscription_id) == ("unwanted_renewal", subscription)
    service.check_books()


def test_an_expiry_while_the_charge_is_under_way_is_taken_back_by_the_success(service: Service) -> None:
    subscription = service.subscriber()
    held = Held()
    worker = Worker(service, {f"after charge method-{subscription}": held}).start(JOB)
    held.reached()
    service.execute("UPDATE subscriptions SET status = 'EXPIRED' WHERE id = :id", id=subscription)
    held.let_go()

    assert worker.finished().ok
    assert service.row("subscriptions", subscription).status == "ACTIVE"
    assert service.ended_at(subscription) == A_MONTH_LATER
    service.check_books()


def test_a_matching_job_that_settles_a_charge_before_its_own_run_does_is_no_second_grant(service: Service) -> None:
    subscription = service.subscriber()
    held = Held()
    worker = Worker(service, {f"after charge method-{subscription}": held}).start(JOB)
    held.reached()
    for job in MATCHING:
        assert service.run(job).ok
    assert service.ended_at(subscription) == A_MONTH_LATER
    held.let_go()

    assert worker.finished().ok
    assert service.ended_at(subscription) == A_MONTH_LATER
    assert [attempt.state for attempt in service.attempts(subscription)] == ["SUCCEEDED"]
    assert len(service.rows("payments", "status = 'SUCCEEDED' AND external_payment_id NOT LIKE 'method-%'")) == 1
    service.check_books()


def test_a_lost_answer_that_a_matching_job_settles_while_it_waits_to_be_sent_again_is_no_second_grant(
    service: Service,
) -> None:
    subscription = service.subscriber()
    other = service.subscriber()
    service.sandbox.misbehave("create", "cut_after", payment_method_id=f"method-{subscription}")
    held = Held()
    worker = Worker(service, {f"before charge method-{other}": held})
    worker.start(JOB, ops={"charge_renewals": {"max_concurrency": 1, "resend_wait_s": 0.3}})
    held.reached()
    service.run("matching_successful_payments_job")
    held.let_go()

    run = worker.finished()

    assert run.ok, run.failure
    assert service.ended_at(subscription) == A_MONTH_LATER
    assert service.charged() == Counter([subscription, other])
    service.check_books()


class Webhook:
    """The service's own handler of `payment.succeeded`: it grants a payment that has no SUCCEEDED row yet.

    Like a careful handler it does so in one transaction, under a lock on the row where there is one.
    """

    def __init__(self, service: Service) -> None:
        self.service = service

    def deliver(self, payment_id: str, connection: sa.Connection) -> None:
        charge = next(entry for entry in self.service.provider.ledger() if entry.payment_id == payment_id)
        row = connection.execute(
            sa.text("SELECT id, status::text FROM payments WHERE external_payment_id = :id FOR UPDATE"),
            {"id": payment_id},
        ).first()
        if row is not None and row.status == "SUCCEEDED":
            return
        subscription_id = int(charge.metadata["subscription_id"])
        if row is not None:
            connection.execute(sa.text("UPDATE payments SET status = 'SUCCEEDED' WHERE id = :id"), {"id": row.id})
        else:
            inserted = connection.execute(
                sa.text("""
                    INSERT INTO payments (subscription_id, payment_provider_id, payment_method, status, currency,
                                          amount, external_payment_id, created_at, updated_at)
                    VALUES (:subscription, :provider, 'BANK_CARD', 'SUCCEEDED', :currency, :amount, :id, :at, :at)
                    ON CONFLICT DO NOTHING RETURNING id
                """),
                {
                    "subscription": subscription_id,
                    "provider": self.service.provider_id,
                    "currency": charge.currency,
                    "amount": charge.amount,
                    "id": payment_id,
                    "at": self.service.now.replace(tzinfo=None),
                },
            ).first()
            if inserted is None:
                return
        connection.execute(
            sa.text("UPDATE subscriptions SET ended_at = ended_at + interval '1 month' WHERE id = :id"),
            {"id": subscription_id},
        )


@pytest.mark.parametrize("unique", [True, False])
def test_a_webhook_that_is_granting_the_renewal_at_this_moment_is_waited_for(service: Service, unique: bool) -> None:
    """Also on a database whose data never allowed a unique index on the provider's payment id."""
    if not unique:
        service.execute("DROP INDEX IF EXISTS payments_external_payment_id_unique")
        names = [row.indexname for row in service.rows("pg_indexes", "tablename = 'payments'")]
        for name in names:
            if name != "payments_pkey":
                service.execute(f"DROP INDEX {name}")
    subscription = service.subscriber()
    held = Held()
    worker = Worker(service, {f"after charge method-{subscription}": held}).start(JOB)
    held.reached()
    [charge] = service.charges()
    with service.engine.connect() as handler:
        Webhook(service).deliver(charge.payment_id, handler)
        held.let_go()
        wait_for_a_blocked_session(service.engine)
        handler.commit()

    assert worker.finished().ok
    assert service.ended_at(subscription) == A_MONTH_LATER
    assert len(service.rows("payments", "external_payment_id = :id", id=charge.payment_id)) == 1
    assert [attempt.state for attempt in service.attempts(subscription)] == ["SUCCEEDED"]
    service.check_books()


def test_a_webhook_that_has_granted_the_renewal_before_us_is_left_to_it(service: Service) -> None:
    subscription = service.subscriber()
    held = Held()
    worker = Worker(service, {f"after charge method-{subscription}": held}).start(JOB)
    held.reached()
    [charge] = service.charges()
    with service.engine.begin() as handler:
        Webhook(service).deliver(charge.payment_id, handler)
    held.let_go()

    assert worker.finished().ok
    assert service.ended_at(subscription) == A_MONTH_LATER
    assert [attempt.state for attempt in service.attempts(subscription)] == ["SUCCEEDED"]
    service.check_books()


def each_ends_a_month_later(service: Service, subscriptions: list[int]) -> bool:
    return all(service.ended_at(subscription) == A_MONTH_LATER for subscription in subscriptions)


def test_eight_runs_at_once_charge_each_period_once(service: Service) -> None:
    subscriptions = [service.subscriber() for _ in range(12)]
    lost = [service.subscriber() for _ in range(3)]
    for subscription in lost:
        service.sandbox.misbehave("create", "cut_after", payment_method_id=f"method-{subscription}")
    declined = service.subscriber(script="canceled:insufficient_funds")

    workers = [Worker(service).start(JOB) for _ in range(8)]
    runs = [worker.finished() for worker in workers]

    assert all(run.ok for run in runs), [run.failure for run in runs]
    assert service.charged() == Counter([*subscriptions, *lost])
    assert each_ends_a_month_later(service, [*subscriptions, *lost])
    # Eight runs, one try: the card was declined once.
    assert len(service.attempts(declined)) == 1
    assert len(service.provider.known_keys()) == 16
    service.check_books()


def test_backfills_of_three_days_at_once_charge_each_period_once(service: Service) -> None:
    ends = [NOON - timedelta(days=age) for age in (1, 1, 2, 2, 3, 3)]
    subscriptions = [service.subscriber(ended_at=end) for end in ends]
    declined = service.subscriber(script="canceled:insufficient_funds", ended_at=NOON - timedelta(days=3))
    days = ["2026-03-09", "2026-03-10", "2026-03-11"]

    workers = [Worker(service).start(JOB, partition=day) for day in days]
    runs = [worker.finished() for worker in workers]
    before = service.snapshot()
    again = [Worker(service).start(JOB, partition=day) for day in days]
    repeated = [worker.finished() for worker in again]

    assert all(run.ok for run in (*runs, *repeated)), [run.failure for run in (*runs, *repeated)]
    assert service.charged() == Counter(subscriptions)
    assert len(service.attempts(declined)) == 1
    assert service.snapshot() == before
    service.check_books()


def test_charging_matching_and_the_webhook_on_the_same_rows_grant_each_success_once(service: Service) -> None:
    subscriptions = [service.subscriber() for _ in range(16)]
    for subscription in subscriptions[:4]:
        service.sandbox.misbehave("create", "cut_after", payment_method_id=f"method-{subscription}")
    stop = False
    webhook = Webhook(service)

    def deliver_all() -> None:
        # Every notification again and again, as an impatient sender does.
        while not stop:
            for entry in service.charges():
                # Locks taken in another order than ours: the handler that loses answers 500 and is called again.
                with suppress(sa.exc.OperationalError), service.engine.begin() as connection:
                    webhook.deliver(entry.payment_id, connection)

    handlers = [_started(deliver_all) for _ in range(2)]
    workers = [Worker(service).start(job) for job in (JOB, JOB, *MATCHING, *MATCHING)]
    runs = [worker.finished() for worker in workers]
    rounds = [service.run(job) for job in (JOB, *MATCHING)]
    stop = True
    for handler in handlers:
        handler()

    assert all(run.ok for run in (*runs, *rounds)), [run.failure for run in (*runs, *rounds)]
    assert service.charged() == Counter(subscriptions)
    assert each_ends_a_month_later(service, subscriptions)
    per_payment = Counter(row.external_payment_id for row in service.rows("payments", "status = 'SUCCEEDED'"))
    assert set(per_payment.values()) == {1}
    service.check_books()


def _started(work: Callable[[], None]) -> Callable[[], None]:
    """Run it in a thread; what comes back waits for its end and raises what it raised."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)

    def join() -> None:
        future.result(timeout=60)
        pool.shutdown()

    return join
