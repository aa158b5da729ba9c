"""Why a run ended red, as data: a code for programs and one plain line for a person, written once and read back here.

The code of an error is the name of its class, so the trees in `database.errors` and `provider.errors` list most of
them; `FailureCode` has the others. A fault of this program has the name of its exception.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import dagster as dg

from billing_orchestration.domain.printable import printable
from billing_orchestration.jobs.next_steps import launch_again
from billing_orchestration.settings import runbook_link

# Where a failure carries its code, among the metadata of its event.
_CODE = "failure code"


class FailureCode:
    """Codes of failures that are no error of the database or the provider."""

    MUST_BE_RETRIED = "MustBeRetried"  # all else was applied
    STOPPED_EARLY = "StoppedEarly"  # what was not begun stays as it is
    CLOCKS_APART = "ClocksApart"  # by more than five minutes: what depends on the time was left undone
    PROVIDER_FAILS = "ProviderFails"  # for everyone: charging stopped early
    SHOP_REFUSED = "ShopRefused"  # the first charges were refused alike: charging stopped early
    NOT_GRANTED = "NotGranted"  # a few paid charges in a row: charging stopped early
    TERMINATED = "Terminated"  # by a person or the machine: what was not begun stays as it is
    TOO_MANY_CHANGES = "TooManyChanges"  # max_changes or the guard: nothing was applied
    DAY_DIFFERS = "DayDiffers"  # all was applied, and differences are left
    SUMS_DO_NOT_CLOSE = "SumsDoNotClose"  # a fault of the comparison itself: nothing was applied
    NOT_RESOLVED = "NotResolved"  # a person's decision that cannot be carried out: nothing was written
    PLAN_CHANGED = "PlanChanged"  # not what was approved: nothing was applied
    NO_WORDS = "NoWords"  # the run's process ended without a word


@dataclass(frozen=True, slots=True)
class RunFailure:
    """What a red run has left in the run history."""

    code: str
    words: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


def failed(code: str, words: str, metadata: Mapping[str, Any] | None = None) -> dg.Failure:
    """The failure to raise, with a link to the next step.

    Dagster must not retry it: every job is safe to launch again, and says when that helps.
    """
    told = dict(metadata or {})
    # What was done stands first, then where to go.
    done = {name: told.pop(name) for name in ("result",) if name in told}
    runbook = {"runbook": dg.MetadataValue.url(f"{runbook_link()}#{_heading(code)}")}
    return dg.Failure(
        printable(words),
        metadata={**done, **_next_step(code), **told, **runbook, _CODE: dg.MetadataValue.text(code)},
        allow_retries=False,
    )


def _heading(code: str) -> str:
    """Where the runbook speaks of it: of the clocks, of deciding, or of the job."""
    headings = {FailureCode.CLOCKS_APART: "clocksapart", FailureCode.NOT_RESOLVED: "quarantine"}
    return headings.get(code, dg.OpExecutionContext.get().job_name)


def _next_step(code: str) -> dict[str, dg.MetadataValue[Any]]:
    """Metadata: the launchpad of the run that failed, set up for what comes next."""
    context = dg.OpExecutionContext.get()
    if code in (FailureCode.TOO_MANY_CHANGES, FailureCode.PLAN_CHANGED):
        link = launch_again(context, dry_run=True, max_changes=None, approved_plan=None)
        return {"next: look at a dry run": dg.MetadataValue.url(link)}
    return {"next: launch it again": dg.MetadataValue.url(launch_again(context))}


def failure_of(instance: dg.DagsterInstance, run_id: str) -> RunFailure:
    """Why a run failed: its failed op's own words, else what Dagster says of the run."""
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_FAILURE):
        if entry.dagster_event is None:
            continue
        data = entry.dagster_event.step_failure_data
        error = data.error and (data.error.cause or data.error)
        told = data.user_failure_data
        if told is not None and told.description:
            code = told.metadata.get(_CODE)
            return RunFailure(str(code.value) if code else "Failure", told.description.strip(), told.metadata)
        if error is not None:
            return RunFailure(str(error.cls_name), _first_line(error.message))
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.RUN_FAILURE):
        if entry.dagster_event is not None and entry.dagster_event.message:
            return RunFailure(FailureCode.NO_WORDS, _first_line(entry.dagster_event.message))
    return RunFailure(FailureCode.NO_WORDS, "the run failed without a message: its process may have been killed")


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0]
