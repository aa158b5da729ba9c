"""`stop` and `start`: the deployment's schedules, switched off or on in its own run history, and looked at again.

`stop` needs the run history alone: it works while the code server, the webserver and the daemon are down. It also
takes back runs that wait in the queue; what is under way goes on, and is named. `start` asks the code server which
schedules there are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.scheduler.instigation import InstigatorState, InstigatorStatus
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import WorkspaceFileTarget

from billing_orchestration.database.engine import create_engine, read
from billing_orchestration.database.errors import BillingDatabaseError, DatabaseUnavailable
from billing_orchestration.database_address import keep_addresses_out_of_logs
from billing_orchestration.settings import load_what_is_right

if TYPE_CHECKING:
    from dagster._core.remote_representation.external import RemoteSchedule

# The order of the runbook: first what only repairs, last what moves money.
ORDER = (
    "matching_pending_payments_job",
    "matching_successful_payments_job",
    "expire_payments_job",
    "expire_subscriptions_job",
    "reconciliation_job",
    "run_history_job",
    "report_job",
    "upcoming_job",
    "autopayment_job",
)
_BEFORE_ITS_START = (dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED)
_UNDER_WAY = (dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED)


class NotSwitched(Exception):
    """A schedule is not as it was asked for; one line that says what is known and what to do."""


@contextmanager
def open_history() -> Iterator[dg.DagsterInstance]:
    """The deployment's run history. Raises NotSwitched, one line, when it cannot be opened."""
    if not os.environ.get("DAGSTER_HOME"):
        raise NotSwitched("DAGSTER_HOME is not set: run this where the deployment runs, with its environment")
    _check_reachable()
    try:
        instance = dg.DagsterInstance.get()
    except Exception as error:
        # The driver's own words may repeat the address.
        raise NotSwitched(
            f"the run history cannot be opened ({type(error).__name__}): nothing was switched;"
            " check DAGSTER_POSTGRES_URL with `billing-orchestration doctor`"
        ) from error
    with instance:
        yield instance


def _check_reachable() -> None:
    """Dagster tries again and again, and logs the driver's own words, which may repeat the address."""
    keep_addresses_out_of_logs()
    settings, faults = load_what_is_right()
    if fault := faults.get("DAGSTER_POSTGRES_URL"):
        raise NotSwitched(f"{fault}. Nothing was switched")
    if settings.dagster_postgres_url is None:
        return
    engine = create_engine(settings.dagster_postgres_url)
    try:
        with read(engine):
            pass
    except BillingDatabaseError as error:
        if isinstance(error, DatabaseUnavailable):  # of anything else Dagster may make something
            told = str(error).replace("BILLING_DATABASE_URL", "DAGSTER_POSTGRES_URL")
            raise NotSwitched(f"{told}. Nothing was switched") from error
    finally:
        engine.dispose()


def own_workspace() -> Path:
    """The workspace file that this deployment uses: over gRPC where the code server's address is set."""
    return Path("workspace.grpc.yaml" if os.environ.get("DAGSTER_CODE_SERVER_HOST") else "workspace.yaml")


def stop(instance: dg.DagsterInstance, jobs: Sequence[str]) -> Iterator[str]:
    """Switch the schedules of these jobs off, of all jobs without any; one line for each thing done.

    Raises NotSwitched if one is still on afterwards.
    """
    wanted = _known(jobs)
    for state in states_of(instance, wanted):
        if state.is_running:
            instance.update_instigator_state(state.with_status(InstigatorStatus.STOPPED))
    for job in wanted:
        still_on = [state.name for state in states_of(instance, [job]) if state.is_running]
        if still_on:
            raise NotSwitched(f"{', '.join(still_on)} is still on: switch it off in the UI (Automation)")
        yield f"{job}: schedule off"
        for run in instance.get_runs(dg.RunsFilter(job_name=job, statuses=list(_BEFORE_ITS_START))):
            instance.report_run_canceled(run, message="Taken out of the queue by `billing-orchestration stop`.")
            yield f"{job}: run {run.run_id} taken out of the queue"
        for run in instance.get_runs(dg.RunsFilter(job_name=job, statuses=list(_UNDER_WAY))):
            yield f"{job}: run {run.run_id} is under way and goes on; terminate it in the UI to end it now"


def start(instance: dg.DagsterInstance, workspace: Path, jobs: Sequence[str]) -> Iterator[str]:
    """Switch the schedules of these jobs on, of all jobs without any, in the runbook's order; one line for each.

    Raises NotSwitched if the code location cannot be asked, or one is off afterwards.
    """
    wanted = _known(jobs)
    schedules = _schedules(instance, workspace)
    for job in wanted:
        for schedule in schedules:
            if schedule.job_name == job:
                instance.start_schedule(schedule)
        if not any(state.is_running for state in states_of(instance, [job])):
            raise NotSwitched(f"{job}: its schedule is not on; look at its code location in the UI (Deployment)")
        yield f"{job}: schedule on"


def _known(jobs: Sequence[str]) -> list[str]:
    strange = sorted(set(jobs) - set(ORDER))
    if strange:
        raise NotSwitched(f"no job is called {', '.join(strange)}: there are {', '.join(ORDER)}")
    return [job for job in ORDER if not jobs or job in jobs]


def states_of(instance: dg.DagsterInstance, jobs: Sequence[str]) -> list[InstigatorState]:
    """What the run history holds of the schedules of these jobs, in whichever code location."""
    # A schedule is called after its job and its cadence.
    prefixes = tuple(job.removesuffix("job") for job in jobs)
    states = instance.all_instigator_state(instigator_type=InstigatorType.SCHEDULE)
    return [state for state in states if state.name.startswith(prefixes)]


def _schedules(instance: dg.DagsterInstance, workspace: Path) -> list[RemoteSchedule]:
    if not workspace.is_file():
        raise NotSwitched(f"there is no {workspace}: name the workspace file of this deployment with -w")
    with WorkspaceProcessContext(instance, WorkspaceFileTarget(paths=[str(workspace)])) as process:
        locations = process.create_request_context().code_locations
        found = [schedule for location in locations for repository in location.get_repositories().values()
                 for schedule in repository.get_schedules()]  # fmt: skip
    if not found:
        raise NotSwitched(f"no code location of {workspace} answers: start the code server, then repeat the command")
    return found
