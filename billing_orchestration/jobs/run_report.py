"""What a run reports: metadata for the UI, numbers over time, and failures in plain words."""

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any

import dagster as dg
import psycopg
from sqlalchemy.exc import SQLAlchemyError

from billing_orchestration.database.engine import translate
from billing_orchestration.database.errors import BillingDatabaseError
from billing_orchestration.domain.decisions import Decision, Tally
from billing_orchestration.domain.personal import without_identities
from billing_orchestration.domain.printable import printable
from billing_orchestration.domain.provider_payment import ProviderPayment
from billing_orchestration.domain.run_scope import RunRefused, RunScope
from billing_orchestration.jobs.approval import link_of_plan
from billing_orchestration.jobs.run_failures import FailureCode, failed
from billing_orchestration.jobs.termination import deliver, is_being_canceled
from billing_orchestration.provider.errors import IncompleteSlice, OutcomeUnknown, ProviderError, RequestRejected
from billing_orchestration.settings import SettingsError

# What an applying op yields: numbers to plot, and its end.
Told = Iterator[dg.AssetMaterialization | dg.Output[None]]

# Longer tables are slow to read and to load; the counts cover all rows.
ROWS_SHOWN = 100
_FAILURES_TOLD = 5
# How `decisions_in` finds a run's decisions among its metadata.
_DECISIONS = "decisions"
_COUNT, _SUM = "count: ", "sum: "
# The record of a row holds its code, too, for programs: a column less leaves room for words.
_COLUMNS = ("action", "subject", "amount", "reason")
# A run's page makes all columns as narrow as it takes, in the middle of words. It keeps the lines of a text, so lines
# of this many characters leave every column its width; an id of 36 characters stays whole.
_REASON_WIDTH = 44
# The first line of a red run says what to do, even when that is nothing.
_PROVIDER_IN_TROUBLE = "What to do: nothing yet, the next run covers this one; if that is red too, ask the provider."
# Marks runs that changed something, as a filter for the list of runs.
CHANGED_TAG = "billing/changed"


@dataclass
class RunReport:
    """What an applying op has done.

    `applied` counts changes that were committed, `opened` new quarantine entries. `again` names what must be retried
    (the run then ends red), `again_unnamed` counts what it leaves out. `left` are the successes that settling has left
    to the service's webhook for its minute: somebody has to look at them again. `stopped_by` says what ended the
    applying early (`stop_code` is for programs), `terminated_by` is the signal that wants the run to end. `numbers` are
    plotted over time. `decisions` is a Tally where they may be too many to be held.
    """

    decisions: list[Decision] | Tally = field(default_factory=list)
    applied: int = 0
    skipped: int = 0
    quarantined: int = 0
    opened: int = 0
    again: list[str] = field(default_factory=list)
    again_unnamed: int = 0
    left: list[ProviderPayment] = field(default_factory=list)
    stopped_by: str | None = None
    stop_code: str | None = None
    terminated_by: int | None = None
    numbers: dict[str, int | float] = field(default_factory=dict)

    @property
    def to_retry(self) -> int:
        """How many must be retried."""
        return len(self.again) + self.again_unnamed


def describe_decisions(decisions: Sequence[Decision] | Tally) -> dict[str, dg.MetadataValue[Any]]:
    """Metadata: the first rows with their reasons, sums by currency, and how many of each action."""
    tally = decisions if isinstance(decisions, Tally) else Tally(ROWS_SHOWN, decisions)
    metadata: dict[str, dg.MetadataValue[Any]] = {}
    if tally:
        cut = f"first {ROWS_SHOWN} of " if len(tally) > ROWS_SHOWN else ""
        metadata[f"{_DECISIONS} ({cut}{len(tally)})"] = dg.MetadataValue.table(
            records=[
                dg.TableRecord(
                    {
                        "action": decision.action,
                        "subject": printable(decision.subject),
                        "amount": str(decision.money) if decision.money else "",
                        "reason": _in_lines(printable(decision.reason)),
                        "code": printable(decision.code),
                    }
                )
                for decision in tally.first
            ],
            schema=dg.TableSchema(columns=[dg.TableColumn(name) for name in _COLUMNS]),
        )
    for action, currency, total in tally.sums():
        metadata[f"{_SUM}{action}, {currency}"] = dg.MetadataValue.float(float(total))
    for action, count in sorted(tally.counts.items()):
        metadata[f"{_COUNT}{action}"] = dg.MetadataValue.int(count)
    return metadata


def _in_lines(words: str) -> str:
    return textwrap.fill(words, _REASON_WIDTH, break_long_words=False, break_on_hyphens=False)


def _in_one_line(words: Any) -> str:
    return str(words).replace("\n", " ")


def decisions_in(metadata: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], int]:
    """What `describe_decisions` has attached: the rows of the table, and how many decisions there were in all."""
    rows: list[Mapping[str, Any]] = []
    total = 0
    for name, value in metadata.items():
        if name.startswith(_DECISIONS) and isinstance(value, dg.TableMetadataValue):
            rows = [{**record.data, "reason": _in_one_line(record.data["reason"])} for record in value.records]
        elif name.startswith(_COUNT):
            total += int(value.value)
    return rows, total


def _as_of(scope: RunScope) -> dg.MetadataValue[Any]:
    return dg.MetadataValue.text(f"{scope.as_of.isoformat()} (from {scope.source})")


def describe_scope(scope: RunScope) -> dict[str, dg.MetadataValue[Any]]:
    """Metadata: what the run stands for."""
    return {
        "as_of": _as_of(scope),
        "dry_run": dg.MetadataValue.bool(scope.dry_run),
    }


# The words of a run's sentence, and what they count (`read_result`).
_WORDS = {
    "changed": "applied",
    "would change": "applied",
    "skipped": "skipped",
    "quarantined": "quarantined",
    "new": "newly quarantined",
    "to retry": "to retry",
}


def _result(scope: RunScope, report: RunReport) -> str:
    """The run in one sentence, without what is zero."""
    new = f" (new {report.opened})" if report.opened else ""
    counts = (
        ("would change" if scope.dry_run else "changed", report.applied, ""),
        ("skipped", report.skipped, ""),
        ("quarantined", report.quarantined, new),
        ("to retry", report.to_retry, ""),
    )
    told = [f"{word} {count}{detail}" for word, count, detail in counts if count or detail]
    return in_one_sentence(told, dry_run=scope.dry_run)


def in_one_sentence(told: Sequence[str], *, dry_run: bool) -> str:
    """What a run has done, or would do."""
    return f"{'dry run: ' if dry_run else ''}{', '.join(told) or 'nothing to do'}"


def read_result(sentence: str) -> dict[str, int]:
    """The counts of a run's sentence: applied, skipped, quarantined, newly quarantined, to retry."""
    found = re.findall(rf"\b({'|'.join(_WORDS)}) (\d+)", sentence)
    return dict.fromkeys(_WORDS.values(), 0) | {_WORDS[word]: int(count) for word, count in found}


def _more_numbers(report: RunReport, told: Mapping[str, Any]) -> dict[str, dg.MetadataValue[Any]]:
    """The numbers that neither the counts of decisions nor their sums have told."""
    return {
        name: _number(value)
        for name, value in report.numbers.items()
        if value and f"{_COUNT}{name}" not in told and f"{_SUM}{name}" not in told
    }


def describe_report(
    scope: RunScope, report: RunReport, job: str, approval: str | None = None
) -> dict[str, dg.MetadataValue[Any]]:
    """Metadata: what was done. A run's page shows the first lines without a click.

    Each number once, and none that is zero: the sentence counts what became of things, the rest what was decided.
    `approval`: the link that approves the plan of a dry run.
    """
    decisions = describe_decisions(report.decisions)
    return {
        "result": dg.MetadataValue.text(_result(scope, report)),
        **_next_steps(scope, report, job, approval),
        **decisions,
        **_more_numbers(report, decisions),
        "as_of": _as_of(scope),
    }


def conclude(
    context: dg.OpExecutionContext,
    scope: RunScope,
    report: RunReport,
    *,
    retry_hint: str,
    job: str,
    more: Mapping[str, dg.MetadataValue[Any]] | None = None,
    red: tuple[str, str] | None = None,
) -> None:
    """Attach an applying op's report (and `more` metadata); end the run red if it stopped or something must be retried.

    `red`: a code and words, for a run that is red although nothing must be retried.

    A run that changed something gets the tag billing/changed with the number of changes. Raises dg.Failure; its first
    line says what to do and what is known about the money (`retry_hint`). A run that a person terminates ends as
    Canceled, whatever it raises here.
    """
    more = {name: value for name, value in (more or {}).items() if value.value}
    approval = link_of_plan(context, scope) if scope.dry_run and report.applied else None
    metadata = {**describe_report(scope, report, job, approval), **more}
    if report.decisions or report.again:  # an empty run says so in its metadata; a log line is one more event row
        context.log.info(f"{job}: {_result(scope, report)}")
    if report.applied and not scope.dry_run:
        context.instance.add_run_tags(context.run_id, {CHANGED_TAG: str(report.applied)})
    is_canceled = end_if_interrupted(context, report)
    if report.again or report.stopped_by:
        raise failed(*_why_red(scope, report, retry_hint), metadata)
    if is_canceled:
        raise failed(FailureCode.TERMINATED, "terminated when all was done: nothing must be retried", metadata)
    if red is not None:
        raise failed(*red, metadata)
    context.add_output_metadata(metadata)


def _why_red(scope: RunScope, report: RunReport, retry_hint: str) -> tuple[str, str]:
    """The code and the words. What stopped everything comes first: it is what the person at night has to fix."""
    words = []
    if report.stopped_by:
        code = report.stop_code or FailureCode.STOPPED_EARLY
        there = "" if code == FailureCode.CLOCKS_APART else " It stopped there."
        words.append(f"{report.stopped_by.rstrip('.')}.{there}")
    else:
        code = FailureCode.MUST_BE_RETRIED
    if report.again:
        shown = "; ".join(report.again[:_FAILURES_TOLD])
        untold = report.to_retry - min(len(report.again), _FAILURES_TOLD)
        and_more = f"; and {untold} more" if untold else ""
        rest = "what was not begun stays as it is." if report.stopped_by else "everything else was applied."
        others = "and this was a dry run: nothing was written." if scope.dry_run else f"{rest} {retry_hint}"
        words.append(f"{report.to_retry} must be retried, {others} In detail: {shown}{and_more}")
    return code, " ".join(words)


def end_if_interrupted(context: dg.OpExecutionContext, report: RunReport) -> bool:
    """End a run that was interrupted while it charged, now that nothing is under way; Dagster may resume it.

    Returns whether a person terminates it: whatever it raises then, it is Canceled.
    """
    is_canceled = bool(report.applied or report.terminated_by) and is_being_canceled(context)
    if report.terminated_by and not is_canceled:
        deliver(report.terminated_by)
    return is_canceled


def _next_steps(scope: RunScope, report: RunReport, job: str, approval: str | None) -> dict[str, dg.MetadataValue[Any]]:
    """Metadata: where to go from here. Nothing for a run that found nothing."""
    steps: dict[str, dg.MetadataValue[Any]] = {}
    if report.applied and approval is not None:
        steps["next: approve this plan"] = dg.MetadataValue.url(approval)
    if report.quarantined:
        steps["next: what waits for a person"] = dg.MetadataValue.asset(dg.AssetKey(["billing", "quarantine"]))
    if report.applied and not scope.dry_run:
        steps["next: numbers over time"] = dg.MetadataValue.asset(asset_of(job))
    return steps


def asset_of(job: str) -> dg.AssetKey:
    """The asset with a job's numbers. It has a name of its own: a job's would lead to two pages."""
    return dg.AssetKey(["billing", job.removesuffix("_job")])


def plotted(
    context: dg.OpExecutionContext,
    job: str,
    numbers: Mapping[str, int | float | Decimal],
    day: str | None = None,
    levels: frozenset[str] = frozenset(),
) -> dg.AssetMaterialization:
    """This run's numbers, for the asset that Dagster plots them under: over time, or over days.

    Dagster plots the last point of a day. So each run adds to what the day's earlier runs have counted: a run at noon
    with nothing left to do must not wipe out the night's numbers. `levels` are not counts but the present state; they
    replace. An op yields this before `conclude`: an event that is only logged is lost when the op fails, and the
    numbers of red days matter most.
    """
    if day is not None:
        before = _counted(context.instance, asset_of(job), day)
        counted: dict[str, int | float] = {}
        for name in dict.fromkeys([*before, *numbers]):
            value = float(numbers.get(name, 0)) + (0 if name in levels else before.get(name, 0))
            counted[name] = int(value) if value == int(value) else round(value, 2)
        numbers = counted
    return dg.AssetMaterialization(
        asset_of(job), partition=day, metadata={name: _number(value) for name, value in numbers.items()}
    )


def _counted(instance: dg.DagsterInstance, key: dg.AssetKey, day: str) -> Mapping[str, float]:
    """What the day's runs have counted so far: its latest point."""
    found = instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=key, asset_partitions=[day]), limit=1
    ).records
    latest = found[0].asset_materialization if found else None
    if latest is None:
        return {}
    return {name: value.value for name, value in latest.metadata.items() if isinstance(value.value, (int, float))}


def _number(value: float | Decimal) -> dg.MetadataValue[Any]:
    return dg.MetadataValue.int(value) if isinstance(value, int) else dg.MetadataValue.float(float(value))


def stop_before_applying(verdict: str | None, decisions: Sequence[Decision] | Tally) -> None:
    """Stop a run whose plan is too large. Raises dg.Failure, which says what it would have done and how to go on."""
    if verdict is not None:
        raise failed(
            FailureCode.TOO_MANY_CHANGES,
            f"stopped before anything was applied: {verdict}",
            describe_decisions(decisions),
        )


@contextmanager
def told_plainly() -> Iterator[None]:
    """Turn an expected error into dg.Failure with one plain line. A fault of this program passes with its trace."""
    try:
        yield
    except dg.Failure:
        raise
    except Exception as error:
        failure = _expected(error)
        if failure is None:
            raise
        raise failure from None


def _expected(error: Exception) -> dg.Failure | None:
    known: Exception = translate(error) if isinstance(error, (SQLAlchemyError, psycopg.Error)) else error
    if not isinstance(known, (SettingsError, RunRefused, BillingDatabaseError, ProviderError)):
        return None
    words = str(known)
    if isinstance(known, BillingDatabaseError) and known.by_function:
        words = without_identities(words)
    if isinstance(known, SettingsError):
        words = f"{known}. Nothing was read or written"
    elif isinstance(known, (IncompleteSlice, OutcomeUnknown)) and not isinstance(known.__cause__, RequestRejected):
        words = f"{known} {_PROVIDER_IN_TROUBLE}"
    return failed(type(known).__name__, words)


def instant(at: datetime) -> str:
    """An instant as an operator reads it."""
    return at.strftime("%Y-%m-%d %H:%M:%S UTC")
