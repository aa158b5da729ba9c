"""autopayment_job in shards: the same charges as in one piece, the run's limits for all of them, and one red line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa

from billing_orchestration.definitions import build_definitions
from billing_orchestration.jobs.autopayment.executors import UnsupportedExecutor
from billing_orchestration.jobs.autopayment.shards import limits_of_a_shard
from billing_orchestration.jobs.autopayment.steps import ChargingConfig
from billing_orchestration.jobs.money_checks import CHECKS
from billing_orchestration.jobs.run_report import read_result
from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration.settings import load_settings
from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.jobs.service import Service
from billing_orchestration_tests.waiting import wait_until

UTC = timezone.utc
JOB = "autopayment_job"
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("shards", [1, 3, 8])
def test_every_due_subscription_is_charged_once_by_its_shard(service: Service, shards: int) -> None:
    subscriptions = [service.subscriber() for _ in range(5)]
    later = service.subscriber(ended_at=NOON + timedelta(days=2))

    run = service.run(JOB, shards=shards)

    assert run.ok, run.failure
    assert service.charged() == dict.fromkeys(subscriptions, 1)
    assert service.attempts(later) == []
    assert run.number("divide_due_subscriptions", "due") == 5
    assert run.report["charged"] == 5
    assert run.report["charged, RUB"] == 5 * 299
    assert run.materialized[JOB.removesuffix("_job")]["charged"] == 5
    assert {row["shard"] for row in run.report["shards"]} == {
        f"renew_shard[shard_{number}_of_{shards}]" for number in range(1, shards + 1)
    }
    for number in range(1, shards + 1):
        mine = [id_ for id_ in subscriptions if id_ % shards == number - 1]
        told = run.metadata[f"renew_shard[shard_{number}_of_{shards}]"]
        assert read_result(told["result"])["applied"] == len(mine)
    service.check_books()


def test_a_divided_run_after_a_whole_one_and_the_other_way_round_change_nothing(service: Service) -> None:
    for _ in range(4):
        service.subscriber()
    assert service.run(JOB, shards=3).ok
    before = service.snapshot()

    assert service.run(JOB).ok
    assert service.run(JOB, shards=2).ok

    assert service.snapshot() == before


def test_a_divided_dry_run_shows_each_shard_and_writes_nothing(service: Service) -> None:
    first, second = service.subscriber(), service.subscriber()
    before = service.snapshot()

    run = service.run(JOB, shards=2, dry_run=True)

    assert run.ok, run.failure
    shown = [
        row["subject"]
        for op, metadata in run.metadata.items()
        if op.startswith("renew_shard[")
        for row in metadata["decisions (1)"]
    ]
    assert sorted(shown) == sorted(f"subscription {id_}" for id_ in (first, second))
    assert run.report["result"].startswith("dry run: would change 2")
    assert service.snapshot() == before
    assert service.charges() == []


def test_max_changes_holds_for_the_whole_run_and_stops_it_before_the_first_shard(service: Service) -> None:
    for _ in range(4):
        service.subscriber()
    before = service.snapshot()

    run = service.run(JOB, shards=4, max_changes=3)

    assert not run.ok
    assert "stopped before anything was applied" in run.failure
    assert "4" in run.failure
    assert service.snapshot() == before
    assert service.sandbox.count("create") == 0
    assert service.run(JOB, shards=4, max_changes=4).ok
    assert len(service.charges()) == 4


def test_what_is_overdue_by_too_much_is_so_in_every_shard(service: Service) -> None:
    old = [service.subscriber(ended_at=NOON - timedelta(days=9)) for _ in range(2)]
    due = [service.subscriber() for _ in range(2)]

    run = service.run(JOB, shards=2, ops={"divide_due_subscriptions": {"max_overdue_days": 5}})

    assert run.ok, run.failure
    assert service.charged() == dict.fromkeys(due, 1)
    assert run.number("divide_due_subscriptions", "not charged: overdue by more than 5 days") == len(old)


@pytest.mark.parametrize("decline", ["insufficient_funds", "card_expired"])
def test_a_card_of_two_shards_that_is_declined_in_one_is_not_tried_by_the_next(service: Service, decline: str) -> None:
    service.tolerate_duplicates()
    first = service.subscriber(script=f"canceled:{decline}", method="one-card")
    second = service.subscription(ended_at=service.now)
    service.payment("one-card", subscription_id=second, status="SUCCEEDED")
    assert first % 2 != second % 2

    run = service.run(JOB, shards=2)

    assert run.ok, run.failure
    assert service.sandbox.count("create") == 1
    assert sorted(len(service.attempts(one)) for one in (first, second)) == [0, 1]


def test_shards_that_run_at_a_time_share_the_runs_concurrency_and_its_cap_on_requests() -> None:
    run = ChargingConfig(max_concurrency=16, max_requests_per_second=10.0, max_sends=2, resend_wait_s=7.0)

    assert limits_of_a_shard(run, 4) == ChargingConfig(
        max_concurrency=4, max_requests_per_second=2.5, max_sends=2, resend_wait_s=7.0
    )
    assert limits_of_a_shard(run, 1) == run


def test_an_approved_plan_is_not_divided(service: Service) -> None:
    service.subscriber()

    run = service.run(JOB, shards=2, approved_plan="0" * 16)

    assert not run.ok
    assert "a plan is approved as a whole" in run.failure
    assert service.sandbox.count() == 0


def test_a_wrong_shop_key_costs_one_request_and_no_shard_begins(service: Service) -> None:
    for _ in range(4):
        service.subscriber()
    service.provider.secret_key = "another"

    run = service.run(JOB, shards=4)

    assert not run.ok
    assert "YOOKASSA_SHOP_ID" in run.failure
    assert service.sandbox.count() == 1
    assert service.rows("renewal_attempts") == []


def test_what_must_be_retried_ends_the_run_red_after_all_shards_and_names_it(service: Service) -> None:
    lost, *others = [service.subscriber() for _ in range(4)]
    service.sandbox.misbehave("create", "error_after", payment_method_id=f"method-{lost}", times=None)

    run = service.run(JOB, shards=2)

    assert not run.ok
    assert run.failure.startswith("1 must be retried, everything else was applied. Nobody is charged twice")
    assert f"subscription {lost} (unknown)" in run.failure
    assert {id_: service.charged()[id_] for id_ in others} == dict.fromkeys(others, 1)
    assert run.materialized[JOB.removesuffix("_job")]["unknown"] == 1
    service.sandbox.behave()
    assert service.run(JOB, shards=3).ok
    assert service.charged() == dict.fromkeys([lost, *others], 1)
    service.check_books()


def test_an_open_attempt_is_concluded_by_its_own_shard(service: Service) -> None:
    subscriptions = [service.subscriber() for _ in range(3)]
    service.sandbox.misbehave("create", "error_after", times=None)
    service.run(JOB, ops={"charge_renewals": {"max_sends": 1}})
    service.sandbox.behave()
    assert [service.attempts(id_)[0].state for id_ in subscriptions] == ["UNKNOWN"] * 3

    run = service.run(JOB, shards=2)

    assert run.ok, run.failure
    assert [service.attempts(id_)[0].state for id_ in subscriptions] == ["SUCCEEDED"] * 3
    for number in (1, 2):
        mine = [id_ for id_ in subscriptions if id_ % 2 == number - 1]
        assert read_result(run.metadata[f"renew_shard[shard_{number}_of_2]"]["result"])["applied"] == len(mine)
    service.check_books()


def pending_since_yesterday(service: Service, count: int) -> list[Any]:
    """Attempts that are pending at the provider since yesterday's run, by subscription."""
    subscriptions = [service.subscriber(script=["pending", "succeeded"]) for _ in range(count)]
    assert service.run(JOB).ok
    service.advance(days=1)
    return [service.attempts(subscription)[0] for subscription in subscriptions]


def test_what_became_of_pending_charges_is_written_down_before_the_first_shard_begins(service: Service) -> None:
    paid, declined, pending = pending_since_yesterday(service, 3)
    service.provider.pay(paid.external_payment_id)
    service.provider.cancel(declined.external_payment_id, "card_expired", party="payment_network")

    run = service.run(JOB, shards=2)

    assert run.ok, run.failure
    states = [service.read_attempt(attempt.id).state for attempt in (paid, declined, pending)]
    assert states == ["SUCCEEDED", "STOPPED", "PENDING"]
    told = {row["shard"]: row["changed"] for row in run.report["shards"]}
    assert told == {"divide_due_subscriptions": 2, "renew_shard[shard_1_of_2]": 0, "renew_shard[shard_2_of_2]": 0}
    assert run.report["applied"] == 2
    assert {entry.run_id for entry in service.rows("audit_trail", "action = 'stopped'")} == {run.run_id}
    service.check_books()


@pytest.mark.parametrize("of_shard", [0, 1])
def test_a_card_that_a_pending_charge_of_any_shard_has_stopped_is_charged_by_none(
    service: Service, of_shard: int
) -> None:
    subscriptions = [service.subscription(plan_id=service.monthly) for _ in range(2)]
    heard = next(id_ for id_ in subscriptions if id_ % 2 == of_shard)
    other = next(id_ for id_ in subscriptions if id_ != heard)
    service.provider.add_method("card", ["pending", "succeeded"])
    service.paid_row("card", heard, created_at=service.now - timedelta(days=30))
    assert service.run(JOB).ok
    [attempt] = service.attempts(heard)
    service.advance(days=1)
    service.provider.cancel(attempt.external_payment_id, "card_expired", party="payment_network")
    ago = service.now - timedelta(days=30)
    service.provider.add_payment(id="bought", amount="299.00", created_at=ago, saved=True, method_id="card")
    service.paid_row("bought", other, created_at=ago)
    service.provider.add_method("card", ["succeeded"])

    run = service.run(JOB, shards=2)

    assert run.ok, run.failure
    assert not service.charged()
    assert service.read_attempt(attempt.id).state == "STOPPED"
    assert service.attempts(other) == []


def test_a_dry_run_concludes_nothing_before_its_shards_and_shows_it(service: Service) -> None:
    [attempt] = pending_since_yesterday(service, 1)
    service.provider.cancel(attempt.external_payment_id, "card_expired", party="payment_network")

    run = service.run(JOB, shards=2, dry_run=True)

    assert run.ok, run.failure
    assert service.read_attempt(attempt.id).state == "PENDING"
    assert run.report["applied"] == 1


def test_an_answer_that_cannot_be_written_down_stops_no_other_and_is_left_to_its_shard(service: Service) -> None:
    silent, refused, declined = pending_since_yesterday(service, 3)
    for attempt in (refused, declined):
        service.provider.cancel(attempt.external_payment_id, "card_expired", party="payment_network")
    service.sandbox.misbehave("get", "error_before", payment_id=silent.external_payment_id, times=None)
    service.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE check_violation; END $$"
    )
    service.execute(f"""
        CREATE TRIGGER refuse BEFORE UPDATE ON billing_orchestration.renewal_attempts
        FOR EACH ROW WHEN (old.id = '{refused.id}') EXECUTE FUNCTION refuse()
    """)

    run = service.run(JOB, shards=2)

    assert not run.ok
    assert run.failure.startswith("2 must be retried")
    states = [service.read_attempt(attempt.id).state for attempt in (silent, refused, declined)]
    assert states == ["PENDING", "PENDING", "STOPPED"]


def test_all_shards_are_about_the_instant_at_which_the_run_began(service: Service) -> None:
    service.set_time(NOON.replace(hour=23, minute=59))
    today = [service.subscriber(ended_at=NOON) for _ in range(2)]
    tomorrow = [service.subscriber(ended_at=NOON + timedelta(days=1)) for _ in range(2)]
    service.sandbox.misbehave("create", "none", delay_s=600, times=1)
    ended = service.begin(JOB, shards=2)
    wait_until(lambda: service.sandbox.count("create"))
    service.advance(minutes=5)  # the first shard is at work, the second begins after midnight
    service.sandbox.behave()

    run = ended()

    assert run.ok, run.failure
    assert service.charged() == dict.fromkeys(today, 1)
    assert [service.attempts(id_) for id_ in tomorrow] == [[], []]


def the_job() -> dg.JobDefinition:
    """The job as a deployment loads it: settings from the environment."""
    return build_definitions().get_job_def(JOB)


def test_a_step_that_is_repeated_alone_says_to_launch_the_whole_job(
    present: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    present.subscriber(ended_at=present.now - timedelta(hours=1))
    for name, value in environment_of(present).items():
        monkeypatch.setenv(name, value)
    present.sandbox.misbehave("create", "error_before", times=None)
    config = {"ops": {"charge_renewals": {"config": {"max_sends": 1}}}}
    with dg.instance_for_test() as instance:
        job = dg.reconstructable(the_job)
        with dg.execute_job(job, instance=instance, run_config=config) as red:
            assert not red.success
        sent = present.sandbox.count()
        options = dg.ReexecutionOptions.from_failure(red.run_id, instance)

        with dg.execute_job(job, instance=instance, run_config=config, reexecution_options=options) as again:
            [failure] = [event for event in again.all_events if event.event_type_value == "STEP_FAILURE"]

    assert failure.step_key == "charge_renewals"
    assert "Launch the whole job: it is safe to repeat" in failure.step_failure_data.error.message
    assert present.sandbox.count() == sent


# --- in processes of their own


@pytest.fixture
def present(engine: sa.Engine, database_url: str, sandbox: Sandbox) -> Service:
    """A service in the real present: processes of their own have the real clock."""
    service = Service(engine, database_url, sandbox, now=datetime.now(UTC).replace(microsecond=0))
    sandbox.clock.run()
    return service


def environment_of(service: Service) -> dict[str, str]:
    """The settings that lead to this service."""
    return {
        "BILLING_DATABASE_URL": service.settings.billing_database_url,
        "YOOKASSA_SHOP_ID": service.sandbox.shop_id,
        "YOOKASSA_SECRET_KEY": service.sandbox.secret_key,
        "YOOKASSA_API_URL": service.sandbox.url,
        # The sandbox is done sooner than a real provider may be.
        "YOOKASSA_CHARGE_DONE_S": "5",
    }


@contextmanager
def executing(service: Service, folder: Path, config: str = "{}") -> Iterator[subprocess.Popen[str]]:
    """`dagster job execute` with two shards at once and this run config, on a home of its own."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    (folder / "run.yaml").write_text(config)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DAGSTER_", "YOOKASSA_"))}
    environment |= {**environment_of(service), "DAGSTER_HOME": str(home), "PYTHONPATH": str(ROOT)}
    environment |= {"RENEWAL_SHARDS": "2", "RENEWAL_SHARDS_AT_ONCE": "2"}
    command = [str(Path(sys.executable).parent / "dagster"), "job", "execute"]
    command += ["-m", "billing_orchestration.definitions", "-j", JOB, "-c", str(folder / "run.yaml")]
    with subprocess.Popen(
        command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def events(folder: Path) -> list[dg.EventLogEntry]:
    """Everything that the runs of this home have recorded."""
    with dg.DagsterInstance.from_config(str(folder / "home")) as instance:
        return [entry for run in instance.get_runs() for entry in instance.all_logs(run.run_id)]


TWO_CHARGES_AT_A_TIME = "ops: {renew_shard: {config: {max_concurrency: 2}}}\n"


def test_two_processes_charge_their_shards_side_by_side_within_the_limit_of_the_run(
    present: Service, tmp_path: Path
) -> None:
    subscriptions = [present.subscriber(ended_at=present.now - timedelta(hours=1)) for _ in range(8)]
    # A shard sends one until the first is answered, then as many as it may.
    held: dict[int, list[Any]] = {0: [], 1: []}
    for id_ in subscriptions[2:]:
        rule = present.sandbox.misbehave("create", "none", delay_s=600, payment_method_id=f"method-{id_}")
        held[id_ % 2].append(rule)

    def both_charge() -> bool:
        return all(any(rule.fired for rule in rules) for rules in held.values())

    with executing(present, tmp_path, TWO_CHARGES_AT_A_TIME) as process:
        # Both shards have a charge under way at the same moment, and each goes on only after that.
        wait_until(lambda: both_charge() or process.poll() is not None, patience_s=120)
        present.sandbox.behave()
        told, _ = process.communicate(timeout=300)

    assert process.returncode == 0, told[-3000:]
    assert present.charged() == dict.fromkeys(subscriptions, 1)
    # The first of them had all the time to send more than its half, had it taken the limit for its own.
    assert present.sandbox.peak_in_flight == 2
    pids = {
        str(entry.step_key): entry.pid_of_step
        for entry in _started(events(tmp_path))
        if str(entry.step_key).startswith("renew_shard[")
    }
    assert set(pids) == {"renew_shard[shard_1_of_2]", "renew_shard[shard_2_of_2]"}
    assert len(set(pids.values())) == 2
    present.check_books()


class _Started:
    """That a step has begun, and in which process."""

    def __init__(self, step_key: str | None, metadata: Mapping[str, Any]) -> None:
        self.step_key = step_key
        self.pid_of_step = metadata["pid"].value


def _started(entries: list[dg.EventLogEntry]) -> list[_Started]:
    found = []
    for entry in entries:
        event = entry.dagster_event
        if event is not None and event.event_type_value == "STEP_WORKER_STARTED":
            found.append(_Started(event.step_key, event.engine_event_data.metadata))
    return found


@pytest.mark.parametrize("victim", ["a shard", "the run"])
def test_a_process_that_is_killed_in_its_charge_leaves_nothing_that_the_next_run_does_not_complete(
    present: Service, tmp_path: Path, victim: str
) -> None:
    subscriptions = [present.subscriber(ended_at=present.now - timedelta(hours=1)) for _ in range(4)]
    # Charged at the provider, the answer never comes.
    hanging = present.sandbox.misbehave("create", "silence_after", times=None)
    with executing(present, tmp_path) as process:
        wait_until(lambda: hanging.fired >= 2 or process.poll() is not None, patience_s=120)
        shards = _pids_of_shards(tmp_path)
        assert len(shards) == 2, process.stdout and process.stdout.read()[-3000:]
        for pid in shards if victim == "a shard" else [process.pid, *shards]:
            os.kill(pid, signal.SIGKILL)
        present.sandbox.behave()
        process.communicate(timeout=300)
    assert process.returncode != 0
    assert all(count == 1 for count in present.charged().values())

    with executing(present, tmp_path) as process:
        told, _ = process.communicate(timeout=300)

    assert process.returncode == 0, told[-3000:]
    assert present.charged() == dict.fromkeys(subscriptions, 1)
    present.check_books()


def _pids_of_shards(folder: Path) -> list[int]:
    return [
        int(started.pid_of_step)
        for started in _started(events(folder))
        if str(started.step_key).startswith("renew_shard[")
    ]


# --- how a deployment says it


def ops_of(definitions: dg.Definitions) -> set[str]:
    """The ops of the deployment's autopayment_job."""
    return {node.name for node in definitions.get_job_def(JOB).nodes_in_topological_order}


WHOLE = {"fetch_due_subscriptions", "fetch_open_renewals", "diff_renewals", "charge_renewals"}
DIVIDED = {"divide_due_subscriptions", "renew_shard", "conclude_shards"}


def test_a_deployments_job_is_whole_or_divided_and_never_both(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops_of(build_definitions()) == WHOLE
    assert ops_of(build_definitions(renewal_shards=3)) == DIVIDED

    monkeypatch.setenv("RENEWAL_SHARDS", "4")
    assert ops_of(build_definitions()) == DIVIDED
    assert build_definitions().get_job_def(JOB).executor_def.name == "in_process"
    monkeypatch.setenv("RENEWAL_SHARDS_AT_ONCE", "2")
    assert build_definitions().get_job_def(JOB).executor_def.name == "multiprocess"
    assert ops_of(build_definitions(renewal_shards=0)) == WHOLE


def test_a_number_of_shards_that_cannot_be_is_named_by_the_run_and_nothing_is_read(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment_of(service).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RENEWAL_SHARDS", "257")

    run = service.run(JOB, load=load_settings)

    assert not run.ok
    assert "RENEWAL_SHARDS is not a whole number from 1 to 256" in run.failure
    assert service.sandbox.count() == 0


@pytest.mark.parametrize("shards", [-2, 257])
def test_a_number_of_shards_in_an_argument_that_makes_no_sense_is_refused(shards: int) -> None:
    with pytest.raises(ValueError, match="a renewal run has 1 to 256 shards"):
        build_definitions(renewal_shards=shards)


def on_machines(name: str) -> dg.ExecutorDefinition:
    """An executor as those of Celery and Kubernetes are: each step in a process of its own, somewhere."""
    return dg.ExecutorDefinition(name=name, requirements=dg.multiple_process_executor_requirements())


def test_an_executor_of_the_deployments_own_runs_the_shards_and_nothing_else() -> None:
    definitions = build_definitions(executor=on_machines("celery"), renewal_shards=4)

    assert definitions.get_job_def(JOB).executor_def.name == "celery"
    assert definitions.get_job_def("expire_payments_job").executor_def.name == "in_process"


@pytest.mark.parametrize("name", ["dask", "docker", "celery-k8s", "mine"])
def test_an_executor_that_nobody_has_seen_work_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedExecutor, match=f"the executor '{name}' is not supported: .*celery and k8s"):
        build_definitions(executor=on_machines(name), renewal_shards=4)


def test_an_executor_with_several_processes_is_refused_for_runs_that_are_whole() -> None:
    with pytest.raises(UnsupportedExecutor, match="set RENEWAL_SHARDS"):
        build_definitions(executor=dg.multiprocess_executor)


def test_one_process_is_refused_for_shards_at_once() -> None:
    with pytest.raises(UnsupportedExecutor, match="one shard after another, but 2 are to run at once"):
        build_definitions(executor=dg.in_process_executor, renewal_shards=4, renewal_shards_at_once=2)


@pytest.mark.parametrize(("executor", "at_once", "shared_by"), [
    (None, None, 1),
    (None, 2, 2),
    (None, 9, 4),
    ("celery", 2, 2),
    ("celery", None, 4),  # nobody has said, so all of them may run at once
])  # fmt: skip
def test_limits_are_shared_by_what_runs_at_once(
    service: Service, executor: str | None, at_once: int | None, shared_by: int
) -> None:
    service.subscriber()
    definitions = build_definitions(
        load=lambda: service.settings,
        now=service.host_now,
        steady_s=service.steady_s,
        database_now=service.database_now,
        connect=service.connect_provider,
        executor=on_machines(executor) if executor else None,
        renewal_shards=4,
        renewal_shards_at_once=at_once,
    )

    result = definitions.get_job_def(JOB).execute_in_process(instance=service.instance)

    [output, *_] = [event for event in result.all_events if event.event_type_value == "STEP_OUTPUT"]
    assert output.step_output_data.metadata["shards at once"].value == shared_by


def test_all_money_checks_are_executed_in_the_runs_process_whatever_executor_runs_the_shards(
    present: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment_of(present).items():
        monkeypatch.setenv(name, value)
    definitions = build_definitions(executor=on_machines("celery"), renewal_shards=4)
    execute_all = definitions.resolve_implicit_global_asset_job_def()
    assert execute_all.executor_def.name == "in_process"

    result = execute_all.execute_in_process(instance=present.instance)

    evaluations = [event for event in result.all_events if event.event_type_value == "ASSET_CHECK_EVALUATION"]
    assert len(evaluations) == len(CHECKS)
