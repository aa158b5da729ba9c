"""Alerts, sent to a real HTTP receiver: once per problem, again after a success, and never at a job's cost."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import dagster as dg
import pytest
from pydantic import SecretStr

from billing_orchestration.alerting import Alerts
from billing_orchestration.database.money_checks import paid_is_granted
from billing_orchestration.definitions import build_definitions
from billing_orchestration.jobs.money_checks import tick
from billing_orchestration.jobs.run_alerts import retry_undelivered
from billing_orchestration.resources import BillingDatabase
from billing_orchestration_tests.fixtures.receiver import Receiver
from billing_orchestration_tests.jobs.service import Run, Service

MATCHING = "matching_successful_payments_job"
NOBODY = "http://127.0.0.1:9/v3"


@pytest.fixture
def told(service: Service, receiver: Receiver) -> Receiver:
    """The service's people listen."""
    service.settings = service.settings.model_copy(update={"alert_urls": SecretStr(receiver.url)})
    return receiver


def sensor(service: Service, run: Run) -> str | None:
    """What the failure sensor does with a run, through Dagster's own evaluation."""
    definitions = build_definitions(load=lambda: service.settings, now=lambda: service.now)
    repository = definitions.get_repository_def()
    dagster_run = service.instance.get_run_by_id(run.run_id)
    assert dagster_run is not None
    [failure] = [
        entry.dagster_event for entry in service.instance.all_logs(run.run_id, of_type=dg.DagsterEventType.RUN_FAILURE)
    ]
    assert failure is not None
    context = dg.build_run_status_sensor_context(
        sensor_name="failed_run_alert_sensor",
        dagster_event=failure,
        dagster_instance=service.instance,
        dagster_run=dagster_run,
        resources={"alerts": Alerts(lambda: service.settings)},
        repository_def=repository,
    ).for_run_failure()
    answer = repository.get_sensor_def("failed_run_alert_sensor")(context)
    return answer.skip_message if isinstance(answer, dg.SkipReason) else None


def fail(service: Service) -> Run:
    """A run that cannot reach the provider."""
    right = service.settings
    service.settings = right.model_copy(update={"yookassa_api_url": NOBODY})
    try:
        run = service.run(MATCHING)
    finally:
        service.settings = right
    assert not run.ok
    return run


def test_a_failed_run_alerts_with_what_happened_the_money_what_to_do_and_a_link(
    service: Service, told: Receiver
) -> None:
    run = fail(service)

    assert sensor(service, run) is None

    [message] = told.messages
    assert message["title"] == f"{MATCHING} failed"
    assert run.failure[:60] in message["message"]
    assert "The money: customers may have paid without access yet. Nothing is lost" in message["message"]
    assert "What to do: if no tick has been green for ten minutes" in message["message"]
    assert f"http://localhost:3000/runs/{run.run_id}" in message["message"]


def test_one_problem_alerts_once_however_many_runs_it_fails(service: Service, told: Receiver) -> None:
    for _ in range(4):
        sensor(service, fail(service))

    assert len(told.messages) == 1


def test_a_problem_alerts_again_after_the_job_has_succeeded(service: Service, told: Receiver) -> None:
    sensor(service, fail(service))
    assert service.run(MATCHING).ok
    sensor(service, fail(service))
    sensor(service, fail(service))

    assert len(told.messages) == 2


def test_a_problem_that_comes_and_goes_does_not_alert_with_every_tick(service: Service, told: Receiver) -> None:
    for _ in range(5):
        sensor(service, fail(service))
        assert service.run(MATCHING).ok

    assert len(told.messages) == 2


def test_another_problem_of_the_same_job_alerts_of_its_own(service: Service, told: Receiver) -> None:
    sensor(service, fail(service))
    service.provider.secret_key = "changed_meanwhile"
    run = service.run(MATCHING)
    sensor(service, run)

    assert len(told.messages) == 2
    assert run.failure[:40] in told.messages[1]["message"]


def test_a_problem_is_known_by_its_code_however_its_sentence_is_worded(service: Service, told: Receiver) -> None:
    service.sandbox.misbehave("list", "error_before", times=None)
    runs = [fail(service), service.run(MATCHING)]  # nobody answers; the provider answers with an error
    for run in runs:
        sensor(service, run)

    assert runs[0].failure != runs[1].failure
    assert len(told.messages) == 1


def test_the_alert_of_a_run_that_stopped_before_applying_says_to_approve_its_plan(
    service: Service, told: Receiver
) -> None:
    service.paid_there(plan_id=service.plan())
    run = service.run(MATCHING, max_changes=0)
    sensor(service, run)

    assert "What to do: nothing was applied: look at a dry run" in told.messages[0]["message"]


@pytest.mark.parametrize("how", ["refuses", "dead", "malformed"])
def test_a_receiver_that_takes_nothing_fails_nothing_and_is_tried_again(
    service: Service, told: Receiver, how: str
) -> None:
    if how == "refuses":
        told.status = 500
    elif how == "dead":
        service.settings = service.settings.model_copy(update={"alert_urls": SecretStr("json://127.0.0.1:9/x")})
    else:
        service.settings = service.settings.model_copy(update={"alert_urls": SecretStr("nosuchservice://x")})
    run = fail(service)

    assert sensor(service, run) == "the alert could not be delivered; it is sent again later"
    assert service.run(MATCHING).ok
    told.status = 200
    service.settings = service.settings.model_copy(update={"alert_urls": SecretStr(told.url)})
    assert retry_undelivered(service.instance, Alerts(lambda: service.settings)) == 1
    assert retry_undelivered(service.instance, Alerts(lambda: service.settings)) == 0

    assert told.titles == [f"{MATCHING} failed"]


def test_without_alert_urls_nobody_is_told_and_nothing_fails(service: Service) -> None:
    run = fail(service)

    assert sensor(service, run) == "ALERT_URLS is not set: nobody is alerted"


def test_a_database_that_is_gone_still_alerts(service: Service, told: Receiver) -> None:
    service.settings = service.settings.model_copy(
        update={"billing_database_url": "postgresql+psycopg://nobody@127.0.0.1:9/nothing"}
    )

    sensor(service, service.run(MATCHING))

    assert "cannot connect to the database of BILLING_DATABASE_URL" in told.messages[0]["message"]


def test_the_urls_are_in_no_event_and_no_tag(service: Service, told: Receiver) -> None:
    told.status = 500
    run = fail(service)
    sensor(service, run)

    dagster_run = service.instance.get_run_by_id(run.run_id)
    events = [str(entry) for entry in service.instance.all_logs(run.run_id)]
    assert "token-of-the-receiver" not in f"{dagster_run} {events} {service.settings!r}"


# --- the sensor of quarantine and money checks


class Watch:
    """The money sensor, tick after tick, with its cursor."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.cursor: str | None = None

    def look(self) -> dg.SensorResult | dg.SkipReason:
        """One tick."""
        database = BillingDatabase(lambda: self.service.settings)
        try:
            result = tick(
                self.service.instance, self.cursor, database, Alerts(lambda: self.service.settings), self.service.now
            )
        finally:
            database.close()
        if isinstance(result, dg.SensorResult):
            self.cursor = result.cursor
        return result

    def events(self) -> list[Any]:
        """The events of one tick."""
        result = self.look()
        assert isinstance(result, dg.SensorResult)
        return list(result.asset_events)


def odd_payment(service: Service, name: str) -> None:
    """A payment that goes to quarantine."""
    service.paid_there(name, metadata={"user_id": "odd"})
    assert service.run(MATCHING).ok


def test_a_new_entry_of_the_quarantine_alerts_once(service: Service, told: Receiver) -> None:
    watch = Watch(service)
    watch.look()
    assert told.titles == []
    odd_payment(service, "odd")

    watch.look()
    watch.look()

    assert told.titles == ["a new entry in the quarantine"]
    assert "payment odd: metadata" in told.messages[0]["message"]
    assert "billing-orchestration quarantine show 1" in told.messages[0]["message"]


def test_an_entry_that_nobody_could_be_told_of_is_told_later(service: Service, told: Receiver) -> None:
    watch = Watch(service)
    odd_payment(service, "odd")
    told.status = 500
    watch.look()
    told.status = 200
    odd_payment(service, "odder")
    watch.look()

    assert told.titles == ["2 new entries in the quarantine"]


def test_the_quarantine_is_shown_in_the_ui_when_it_changes_and_an_empty_look_writes_nothing(service: Service) -> None:
    watch = Watch(service)
    assert {event.asset_key.to_user_string() for event in watch.events()} == {"billing/quarantine", "billing/money"}
    assert watch.events() == []
    odd_payment(service, "odd")

    [shown] = watch.events()

    assert shown.metadata["open"].value == 1
    table = shown.metadata["entries (1)"]
    assert [record.data["payment"] for record in table.records] == ["odd"]
    assert watch.events() == []


def test_checks_and_numbers_are_written_once_an_hour(service: Service) -> None:
    watch = Watch(service)
    watch.look()
    service.advance(minutes=59)
    assert watch.events() == []
    service.advance(minutes=1)

    assert [type(event).__name__ for event in watch.events()] == ["AssetMaterialization"] + 5 * ["AssetCheckEvaluation"]


def test_an_invariant_that_breaks_alerts_once_and_again_after_it_has_held(service: Service, told: Receiver) -> None:
    watch = Watch(service)
    subscription = service.subscriber()
    assert service.run("autopayment_job").ok
    watch.look()

    def hour() -> None:
        service.advance(hours=1)
        watch.look()

    service.execute("UPDATE payments SET status = 'CANCELED' WHERE subscription_id = :id AND amount > 0 AND id = ("
                    "SELECT max(id) FROM payments)", id=subscription)  # fmt: skip
    hour()
    hour()
    assert told.titles == ["money check failed: paid_is_granted"]
    service.execute("UPDATE payments SET status = 'SUCCEEDED'")
    hour()
    service.execute("UPDATE payments SET status = 'CANCELED'")
    hour()

    assert told.titles == 2 * ["money check failed: paid_is_granted"]


def checks(service: Service) -> dict[str, bool]:
    """Each check's body, run as from the UI."""
    definitions = build_definitions(load=lambda: service.settings, now=lambda: service.now)
    job = definitions.resolve_implicit_global_asset_job_def()
    result = job.execute_in_process(instance=service.instance, raise_on_error=True)
    return {evaluation.check_name: evaluation.passed for evaluation in result.get_asset_check_evaluations()}


def test_the_checks_hold_on_a_sound_service_and_can_be_run_from_the_ui(service: Service) -> None:
    service.subscriber()
    service.paid_there(plan_id=service.plan())
    assert service.run("autopayment_job").ok
    assert service.run(MATCHING).ok

    assert checks(service) == {
        "paid_is_granted": True,
        "no_old_unknown": True,
        "no_second_success": True,
        "matching_keeps_up": True,
        "day_reconciled": True,
    }


def test_a_success_without_a_settlement_breaks_its_check(service: Service) -> None:
    service.subscriber()
    assert service.run("autopayment_job").ok
    service.execute("DELETE FROM billing_orchestration.settlements")

    assert [name for name, passed in checks(service).items() if not passed] == ["paid_is_granted"]


def test_a_settled_payment_whose_row_number_is_another_payments_breaks_its_check(service: Service) -> None:
    """As after a restore of the service's tables alone: their numbers are given anew."""
    subscription = service.subscriber()
    assert service.run("autopayment_job").ok
    assert checks(service)["paid_is_granted"]
    [settled] = service.rows("settlements")
    service.execute("DELETE FROM payments WHERE id = :id", id=settled.payment_id)
    other = service.paid_row("another", subscription)
    service.execute("UPDATE payments SET id = :old WHERE id = :id", old=settled.payment_id, id=other)

    assert [name for name, passed in checks(service).items() if not passed] == ["paid_is_granted"]


def test_a_second_row_that_grants_a_settled_payment_to_another_subscription_breaks_its_check(service: Service) -> None:
    service.tolerate_duplicates()
    service.paid_there("paid-once", plan_id=service.plan())
    assert service.run(MATCHING).ok
    other = service.subscription(ended_at=service.now)
    service.payment("paid-once", status="REFUNDED", subscription_id=other)
    assert checks(service)["paid_is_granted"]
    service.payment("paid-once", status="SUCCEEDED", subscription_id=other)

    assert [name for name, passed in checks(service).items() if not passed] == ["paid_is_granted"]


def test_a_success_that_was_granted_to_nobody_breaks_its_check(service: Service) -> None:
    hour = timedelta(hours=1)
    for name, age in (("lost", 2 * hour), ("at work", hour / 2), ("long ago", 8 * 24 * hour)):
        service.payment(name, status="SUCCEEDED", created_at=service.now - age)
    assert not checks(service)["paid_is_granted"]
    with service.engine.connect() as connection:
        [told] = paid_is_granted(connection, service.now).broken
    assert "(lost) is SUCCEEDED, and granted to nobody" in told

    service.tolerate_duplicates()
    twin = service.paid_row("lost", service.subscription())
    assert checks(service)["paid_is_granted"]

    service.execute("DELETE FROM payments WHERE id = :id", id=twin)
    service.paid_there("lost", plan_id=service.plan(), created_at=service.now - 2 * hour)
    assert service.run(MATCHING, as_of=service.now - hour).ok
    assert checks(service)["paid_is_granted"]


def test_an_outcome_unknown_for_more_than_23_hours_breaks_its_check(service: Service) -> None:
    service.subscriber()
    assert service.run("autopayment_job").ok
    service.execute("UPDATE billing_orchestration.renewal_attempts SET state = 'UNKNOWN', closed_at = NULL")
    service.execute("DELETE FROM billing_orchestration.settlements")
    assert checks(service)["no_old_unknown"]
    service.advance(hours=23, seconds=1)

    assert not checks(service)["no_old_unknown"]


def test_a_second_success_breaks_its_check_until_it_is_resolved(service: Service) -> None:
    service.execute("""
        INSERT INTO billing_orchestration.quarantine (problem_key, kind, reason, evidence, job, run_id, opened_at)
        VALUES ('payment x:second_success', 'second_success', 'paid twice', '{}', 'm', 'r', now())
    """)
    assert not checks(service)["no_second_success"]
    service.execute("UPDATE billing_orchestration.quarantine SET resolved_at = now(), resolution = 'ignored'")

    assert checks(service)["no_second_success"]


def test_matching_that_has_covered_nothing_for_an_hour_breaks_its_check(service: Service) -> None:
    assert service.tick(MATCHING).ok
    assert checks(service)["matching_keeps_up"]
    service.advance(minutes=61)

    assert not checks(service)["matching_keeps_up"]


def test_a_day_that_was_not_reconciled_or_differs_before_nobody_breaks_its_check(service: Service) -> None:
    assert service.tick("reconciliation_job").ok
    assert checks(service)["day_reconciled"]
    # Its row is deleted after it was granted, and nobody knows why.
    service.advance(days=1)
    service.paid_there("gone", plan_id=service.plan(), created_at=service.now - timedelta(days=1))
    assert service.tick("reconciliation_job").ok
    service.execute("DELETE FROM payments WHERE external_payment_id = 'gone'")
    assert not service.tick("reconciliation_job").ok
    assert not checks(service)["day_reconciled"]
    service.execute("UPDATE billing_orchestration.reconciled_days SET unexplained = 0")
    assert checks(service)["day_reconciled"]
    # A day is left out; then nothing is compared any more.
    service.advance(days=2)
    assert service.tick("reconciliation_job").ok
    assert not checks(service)["day_reconciled"]
    assert service.run("reconciliation_job", partition="2026-03-13").ok
    assert checks(service)["day_reconciled"]
    service.advance(days=2)
    assert not checks(service)["day_reconciled"]


def test_the_numbers_tell_what_is_open_and_what_was_charged(service: Service) -> None:
    service.subscriber()
    service.subscriber(script="canceled:insufficient_funds")
    service.payment("open", created_at=service.now - timedelta(hours=5))
    assert service.run("autopayment_job").ok
    odd_payment(service, "odd")

    [numbers] = [
        event
        for event in Watch(service).events()
        if isinstance(event, dg.AssetMaterialization) and event.asset_key.path[-1] == "money"
    ]

    values = {name: value.value for name, value in numbers.metadata.items()}
    assert values["quarantine: open"] == 1
    assert values["oldest unfinished payment, hours"] == 5
    assert values["granted in 24 h: renewed"] == 1
    assert values["granted in 24 h, RUB"] == 299
    assert values["declines in 24 h: soft"] == 1


def test_a_database_that_is_gone_skips_the_look_and_fails_nothing(service: Service) -> None:
    service.settings = service.settings.model_copy(
        update={"billing_database_url": "postgresql+psycopg://nobody@127.0.0.1:9/nothing"}
    )

    result = Watch(service).look()

    assert isinstance(result, dg.SkipReason)
    assert "cannot connect" in (result.skip_message or "")


def test_the_cursor_is_small_and_readable(service: Service) -> None:
    watch = Watch(service)
    watch.look()

    assert json.loads(watch.cursor or "") == {"at": "2026-03-12T12:00:00+00:00", "failing": [], "shown": [0, 0]}
