"""A matching tick that finds nothing starts no run. Whatever it finds, or cannot find out, starts one as ever."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.schedule_definition import ScheduleExecutionData
from dagster._grpc.impl import get_external_schedule_execution
from pydantic import SecretStr

from billing_orchestration.definitions import build_definitions
from billing_orchestration.jobs.matching_look import Looker, Nothing, Start
from billing_orchestration.resources import BillingDatabase, Clock, ProviderConnection
from billing_orchestration_tests.fixtures.receiver import Receiver
from billing_orchestration_tests.jobs.service import Service
from billing_orchestration_tests.waiting import wait_until

PENDING, SUCCESSFUL = "matching_pending_payments_job", "matching_successful_payments_job"
JOBS = (PENDING, SUCCESSFUL)


@pytest.fixture(scope="module")
def history() -> Iterator[dg.DagsterInstance]:
    """A run history on disk, as a schedule asks for one."""
    with dg.instance_for_test() as instance:
        yield instance


@pytest.fixture
def looks(service: Service, history: dg.DagsterInstance) -> Iterator[Looks]:
    """The schedules of a service whose last runs covered their hours ten minutes ago."""
    looks = Looks(service, history)
    for job in JOBS:
        assert service.tick(job, as_of=service.now - timedelta(minutes=10)).ok
    yield looks
    for record in history.get_run_records():
        history.delete_run(record.dagster_run.run_id)


class Looks:
    """Evaluates the schedules as the code server does: the real function, a real database, the sandbox over HTTP."""

    def __init__(self, service: Service, history: dg.DagsterInstance) -> None:
        self.service = service
        self.history = history
        self.settings = service.settings
        # One code server: it remembers what it has told.
        self._schedules = {
            job: build_definitions().resolve_schedule_def(f"{job.removesuffix('_job')}_every_2_minutes_schedule")
            for job in JOBS
        }

    def with_settings(self, **changed: Any) -> None:
        self.settings = self.settings.model_copy(update=changed)

    def tick(self, job: str, at: datetime | None = None) -> Any:
        """What a tick, now, makes of it."""
        service = self.service
        resources = {
            "billing_database": BillingDatabase(lambda: self.settings),
            "payment_provider": ProviderConnection(lambda: self.settings, service.connect_provider, service.host_now),
            "clock": Clock(service.host_now, service.database_now, service.steady_s),
        }
        with dg.build_schedule_context(
            instance=self.history, scheduled_execution_time=at or service.now, resources=resources
        ) as context:
            return self._schedules[job](context)

    def skipped(self, job: str) -> str:
        """The words of a tick that starts no run."""
        found = self.tick(job)
        assert isinstance(found, dg.SkipReason), found
        return found.skip_message or ""

    def starts(self, job: str, at: datetime | None = None) -> dg.RunRequest:
        """The run that a tick starts."""
        found = self.tick(job, at)
        assert isinstance(found, dg.RunRequest), found
        return found


# --- Nothing to do


def test_a_tick_that_finds_nothing_starts_no_run_and_says_what_it_compared(looks: Looks) -> None:
    service = looks.service
    for number in range(3):
        service.payment(f"waits-{number}", created_at=service.now - timedelta(minutes=20 + number))
    service.paid_row(service.paid_there(plan_id=service.monthly), service.subscription(plan_id=service.monthly))

    assert looks.skipped(PENDING) == "1 paid there, 1 of them not PENDING here, 3 PENDING here"
    assert looks.skipped(SUCCESSFUL) == "1 paid there, 1 settled here"


@pytest.mark.parametrize("job", JOBS)
def test_a_look_writes_nothing_and_leaves_no_connection_behind(looks: Looks, job: str) -> None:
    service = looks.service
    connections = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    before, connected = service.snapshot(), service.scalars(connections)

    looks.skipped(job)

    assert service.snapshot() == before
    wait_until(lambda: service.scalars(connections) == connected)


def test_what_was_just_paid_is_left_to_the_webhook_and_seen_by_the_next_tick(looks: Looks) -> None:
    service = looks.service
    service.paid_there(plan_id=service.monthly, created_at=service.now - timedelta(seconds=30))

    assert looks.skipped(SUCCESSFUL) == "1 paid there, 0 settled here, 1 left to the webhook"
    service.advance(minutes=2)
    assert looks.starts(SUCCESSFUL)


def test_another_sellers_payment_is_no_difference_unless_the_shop_says_so(looks: Looks) -> None:
    looks.service.paid_there(metadata={})

    assert looks.skipped(SUCCESSFUL) == "1 paid there, 0 settled here, 1 of other sellers"
    looks.with_settings(foreign_payments="quarantine")
    assert looks.starts(SUCCESSFUL)


# --- Something to do


def test_a_paid_payment_that_is_pending_here_starts_the_run_that_the_tick_has_always_started(looks: Looks) -> None:
    service = looks.service
    service.payment(service.paid_there(plan_id=service.monthly), created_at=service.now - timedelta(minutes=20))

    for job, op in ((PENDING, "diff_pending_payments"), (SUCCESSFUL, "diff_successful_payments")):
        request = looks.starts(job)
        assert request.run_key == service.now.isoformat()
        assert request.partition_key == "2026-03-12-11:00"
        assert request.run_config == {
            "resources": {"run": {"config": {"as_of": service.now.isoformat()}}},
            "ops": {op: {"config": {"webhook_grace_s": 60}}},
        }
        assert request.tags == {"dagster/priority": "10"}


def test_a_paid_payment_without_a_row_starts_a_run_of_the_job_that_creates_it(looks: Looks) -> None:
    looks.service.paid_there(plan_id=looks.service.monthly)

    assert looks.starts(SUCCESSFUL)
    assert looks.skipped(PENDING)


def test_a_payment_of_an_old_pending_row_is_seen_by_its_capture(looks: Looks) -> None:
    service = looks.service
    created = service.now - timedelta(days=5)
    paid = service.paid_there(
        plan_id=service.monthly, created_at=created, captured_at=service.now - timedelta(hours=0.5)
    )
    service.payment(paid, created_at=created)

    assert looks.starts(PENDING)


def test_a_new_case_for_a_person_starts_a_run_and_one_that_waits_for_its_person_does_not(looks: Looks) -> None:
    service = looks.service
    odd = service.paid_there(plan_id=service.monthly, amount="1.00")

    assert looks.starts(SUCCESSFUL)
    assert service.tick(SUCCESSFUL).ok
    assert service.quarantined(odd)
    assert looks.skipped(SUCCESSFUL) == "1 paid there, 0 settled here, 1 before a person"

    service.paid_there("another-odd-one", plan_id=service.monthly, amount="2.00", user="boris")
    assert looks.starts(SUCCESSFUL)


def test_a_case_about_books_or_about_a_row_says_nothing_about_the_grant(looks: Looks) -> None:
    service = looks.service
    paid = service.paid_there(plan_id=service.monthly)
    for key, kind, evidence in (
        (f"payment {paid}:amount_differs", "amount_differs", '{"books": {}}'),
        ("payment 7:not_writable", "not_writable", "{}"),
    ):
        service.execute(
            "INSERT INTO billing_orchestration.quarantine (problem_key, kind, reason, external_payment_id, evidence,"
            " job, run_id, opened_at) VALUES (:key, :kind, 'r', :paid, CAST(:evidence AS jsonb), 'j', 'r', :at)",
            key=key, kind=kind, paid=paid, evidence=evidence, at=service.now,
        )  # fmt: skip

    assert looks.starts(SUCCESSFUL)


def test_a_record_that_cannot_be_used_starts_a_run_until_it_waits_for_a_person(looks: Looks) -> None:
    service = looks.service
    service.paid_there()
    service.sandbox.misbehave("list", "change", times=None, set={"items.0.amount.value": "much"})

    assert looks.starts(PENDING)
    assert service.tick(PENDING).ok
    assert looks.skipped(PENDING)


# --- At least one run an hour


@pytest.mark.parametrize("job", JOBS)
def test_a_run_covers_the_hour_whole_within_every_hour(looks: Looks, job: str) -> None:
    service = looks.service
    marked, lags = set(), []
    for _ in range(5 * 30):
        service.advance(minutes=2)
        found = looks.tick(job)
        if isinstance(found, dg.RunRequest):
            assert service.tick(job).ok
            marked.add(found.partition_key)
        watermark = service.watermark(job)
        assert watermark is not None
        lags.append(service.now - watermark)

    assert {f"2026-03-12-{hour}:00" for hour in (12, 13, 14, 15)} <= marked
    assert len(marked) <= 6
    # What `matching_keeps_up` allows.
    assert max(lags) < timedelta(hours=1)


@pytest.mark.parametrize("watermark", ["missing", "behind", "in the future"])
@pytest.mark.parametrize("job", JOBS)
def test_an_hour_that_no_run_has_covered_starts_one(looks: Looks, job: str, watermark: str) -> None:
    watermarks = "billing_orchestration.watermarks"
    if watermark == "missing":
        looks.service.execute(f"DELETE FROM {watermarks}")
    else:
        by = {"behind": "-41 minutes", "in the future": "1 hour"}[watermark]
        looks.service.execute(f"UPDATE {watermarks} SET covered_until = covered_until + interval '{by}'")

    assert looks.starts(job)


# --- What a look cannot find out


def test_a_list_longer_than_a_page_starts_a_run(looks: Looks) -> None:
    service = looks.service
    for number in range(101):
        service.paid_there(f"many-{number}", metadata={})

    assert looks.starts(PENDING)


@pytest.mark.parametrize("fault", ["error_before", "html_before", "wrong key", "no database", "clocks apart"])
def test_a_look_that_fails_starts_a_run_and_is_told_once(
    looks: Looks, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    service = looks.service
    looks.skipped(PENDING)
    if fault == "wrong key":
        looks.with_settings(yookassa_secret_key=SecretStr("test_another"))
    elif fault == "no database":
        looks.with_settings(billing_database_url="postgresql://u:a-password@127.0.0.1:9/d")
    elif fault == "clocks apart":
        service.skew(database=timedelta(minutes=3))
    else:
        service.sandbox.misbehave("list", fault, times=None)

    for _ in range(3):
        assert looks.starts(PENDING)

    told = [record.getMessage() for record in caplog.records if "Each tick starts its run" in record.getMessage()]
    assert len(told) == 1
    assert not any(secret in told[0] for secret in ("test_another", "a-password"))


def test_without_settings_a_tick_starts_its_run_which_names_them(looks: Looks, monkeypatch: Any) -> None:
    for name in ("BILLING_DATABASE_URL", "YOOKASSA_SHOP_ID", "YOOKASSA_SECRET_KEY"):
        monkeypatch.delenv(name, raising=False)
    schedule = build_definitions().resolve_schedule_def("matching_pending_payments_every_2_minutes_schedule")
    resources = build_definitions().resources or {}
    wanted = {name: resources[name] for name in schedule.required_resource_keys}
    with dg.build_schedule_context(
        instance=looks.history, scheduled_execution_time=looks.service.now, resources=wanted
    ) as context:
        assert isinstance(schedule(context), dg.RunRequest)


def test_a_look_can_be_switched_off(looks: Looks) -> None:
    looks.with_settings(matching_look_first="off")

    assert looks.starts(PENDING)


def test_nobody_waits_for_a_look_that_hangs_and_the_next_tick_starts_no_second_one() -> None:
    may_end, closed = threading.Event(), threading.Event()
    looker = Looker(longest_s=0.05)

    def hang() -> Nothing:
        may_end.wait()
        return Nothing("too late")

    first = looker.look(hang, closed.set)
    second = looker.look(lambda: Nothing("not asked"), lambda: None)

    assert isinstance(first, Start)
    assert "longer than" in first.why
    assert isinstance(second, Start)
    assert "has not ended" in second.why
    may_end.set()
    assert closed.wait(10)
    with suppress(TimeoutError):
        looker._under_way.result(10)  # type: ignore[union-attr]
    assert looker.look(lambda: Nothing("nothing"), lambda: None) == Nothing("nothing")


def test_connections_that_do_not_close_make_this_tick_start_its_run_and_no_later_one() -> None:
    def refuse() -> None:
        raise OSError("not closed")

    looker = Looker(longest_s=5)
    assert looker.look(lambda: Nothing("nothing"), refuse) == Start("the look failed: OSError", oddity="OSError")
    assert looker.look(lambda: Nothing("nothing"), lambda: None) == Nothing("nothing")


# --- Beside the runs of the schedule


def test_a_run_that_was_created_and_not_launched_is_asked_for_again(looks: Looks) -> None:
    # Else it stayed NOT_STARTED, and every later tick would be skipped for its sake.
    at = looks.service.now
    looks.history.create_run_for_job(
        build_definitions().get_job_def(PENDING),
        status=dg.DagsterRunStatus.NOT_STARTED,
        tags={
            "dagster/schedule_name": "matching_pending_payments_every_2_minutes_schedule",
            "dagster/run_key": at.isoformat(),
        },
    )

    assert looks.starts(PENDING).run_key == at.isoformat()


# --- The dead man's switch


def test_a_look_that_found_nothing_is_a_heartbeat_and_one_that_starts_a_run_is_none(
    looks: Looks, receiver: Receiver
) -> None:
    looks.with_settings(heartbeat_url=SecretStr(receiver.heartbeat_url))

    looks.skipped(PENDING)
    assert receiver.beats == 1

    looks.service.payment(looks.service.paid_there(plan_id=looks.service.monthly))
    looks.starts(PENDING)
    assert receiver.beats == 1


# --- By Dagster's own path


def test_dagsters_daemon_gets_the_words_the_run_and_never_an_error(looks: Looks) -> None:
    # As the code server answers the daemon: it builds the resources, evaluates the tick, and checks what it returned.
    service = looks.service
    repository = build_definitions(
        load=lambda: looks.settings,
        now=service.host_now,
        steady_s=service.steady_s,
        database_now=service.database_now,
        connect=service.connect_provider,
    ).get_repository_def()

    def told(job: str) -> ScheduleExecutionData:
        name, at = f"{job.removesuffix('_job')}_every_2_minutes_schedule", service.now.timestamp()
        found = get_external_schedule_execution(repository, looks.history.get_ref(), name, at, "UTC", None)
        assert isinstance(found, ScheduleExecutionData), found
        return found

    nothing = {job: told(job) for job in JOBS}
    service.payment(service.paid_there(plan_id=service.monthly), created_at=service.now - timedelta(minutes=20))
    differs = {job: told(job) for job in JOBS}
    service.sandbox.misbehave("list", "error_before", times=None)
    service.execute("DELETE FROM payments")
    odd = {job: told(job) for job in JOBS}

    assert {job: found.skip_message for job, found in nothing.items()} == {
        PENDING: "0 paid there, 0 of them not PENDING here, 0 PENDING here",
        SUCCESSFUL: "0 paid there, 0 settled here",
    }
    assert not any(found.run_requests for found in nothing.values())
    for found in (*differs.values(), *odd.values()):
        [request] = found.run_requests or []
        assert request.run_key == service.now.isoformat()
        assert request.partition_key == "2026-03-12-11:00"


def test_a_lost_charge_that_is_paid_at_last_starts_a_run(service: Service, looks: Looks) -> None:
    service.records_are_whole = False
    subscription = service.subscriber(script=["pending"])
    assert service.run("autopayment_job").ok
    [payment] = service.provider.payments()
    service.execute("DELETE FROM billing_orchestration.renewal_attempts")
    service.execute("DELETE FROM billing_orchestration.watermarks WHERE job = 'autopayment_job'")
    service.advance(days=1, hours=1)
    assert service.run("autopayment_job").ok
    [entry] = service.rows("quarantine")
    assert (entry.kind, entry.subscription_id) == ("unknown_attempt", subscription)
    assert service.tick(SUCCESSFUL).ok
    service.provider.pay(payment.id)
    service.advance(minutes=2)

    found = looks.tick(SUCCESSFUL)

    assert isinstance(found, dg.RunRequest)
    assert service.tick(SUCCESSFUL).ok
    assert [row.resolution for row in service.rows("quarantine")] == ["settled"]


@pytest.mark.parametrize("decided", [False, True], ids=["nobody has decided", "a person ignored it"])
def test_an_unreadable_payment_that_can_be_read_again_starts_a_run_unless_a_person_ignored_it(
    service: Service, looks: Looks, decided: bool
) -> None:
    odd = service.provider.payment(service.paid_there(plan_id=service.monthly))
    odd.override.update(captured_at="soon")
    odd.touch(odd.changed_at)
    service.advance(minutes=2)
    assert service.tick(SUCCESSFUL).ok
    [entry] = service.rows("quarantine")
    assert entry.kind == "unreadable"
    if decided:
        service.execute(
            "UPDATE billing_orchestration.quarantine SET resolved_at = now(), resolution = 'ignored',"
            " resolution_reason = 'refunded by hand', resolved_by = 'somebody'"
        )
    odd.override.clear()
    odd.touch(odd.changed_at)
    service.advance(minutes=2)

    found = looks.tick(SUCCESSFUL)

    assert isinstance(found, dg.SkipReason if decided else dg.RunRequest), found
