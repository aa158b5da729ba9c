"""A run in shards: the due in parts that are renewed one by one in flat memory, or side by side in several processes.

Chosen by the deployment (RENEWAL_SHARDS), for schedule, backfills and launches alike. The first op settles what
concerns all of them (what became of pending charges, what our records have lost), counts and divides; each shard is one
step that reads, asks, decides and charges its own part (slices are handed over in memory, which does not cross
processes); the last op adds up. What keeps two processes from charging one period twice is the protocol of `charging`,
the same as between any two runs: shards add nothing to it and take nothing from it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import dagster as dg

from billing_orchestration.database.audit import Stamp
from billing_orchestration.database.renewal_view import check_view
from billing_orchestration.database.renewals import DueCounts, count_due
from billing_orchestration.domain.decisions import Decision
from billing_orchestration.domain.printable import printable
from billing_orchestration.domain.renewals import NotCharged
from billing_orchestration.domain.run_scope import RunRefused, RunScope, over_limit
from billing_orchestration.domain.shards import Division, Sharding, divide, shard_of_key, share
from billing_orchestration.jobs.autopayment.lost_charges import describe_search, search, settle_lost_or_stop
from billing_orchestration.jobs.autopayment.steps import (
    JOB,
    RETRY_HINT,
    ChargingConfig,
    DueConfig,
    apply_plan,
    ask_about_open,
    ask_for_lost,
    bounds_of_due,
    conclude_pending,
    decide,
    plan_of,
    read_renewals,
    shown,
)
from billing_orchestration.jobs.clocks import describe_clocks
from billing_orchestration.jobs.run_failures import FailureCode, failed
from billing_orchestration.jobs.run_report import (
    RunReport,
    Told,
    conclude,
    describe_decisions,
    describe_report,
    describe_scope,
    end_if_interrupted,
    plotted,
    stop_before_applying,
    told_plainly,
)
from billing_orchestration.resources import LAUNCHED_ALONE, BillingDatabase, Clock, ProviderConnection, RunSettings
from billing_orchestration.threads import Threads

# On the run's record in the run history, which every process of a run can read: nothing else needs to be shared.
DIVISION_TAG = "billing/division"
# What a shard reports to the last op, in its own metadata, for the same reason.
_REPORT = "read by conclude_shards"
# Names of what must be retried, per shard; the rest is counted.
_NAMED = 5


def divide_into(sharding: Sharding) -> dg.OpDefinition:
    """The first op of a divided run: it counts what is due, and yields the shards.

    It raises, before any shard begins, what would stop each of them.
    """

    @dg.op(
        name="divide_due_subscriptions",
        description=f"Count the subscriptions that are due, and divide them into {sharding.shards} shards.",
        out={"shards": dg.DynamicOut(dg.Nothing)},
    )
    def divide_due_subscriptions(
        context: dg.OpExecutionContext,
        config: DueConfig,
        run: RunSettings,
        billing_database: dg.ResourceParam[BillingDatabase],
        payment_provider: dg.ResourceParam[ProviderConnection],
        clock: dg.ResourceParam[Clock],
        threads: dg.ResourceParam[Threads],
    ) -> Iterator[dg.DynamicOutput[None]]:
        with told_plainly():
            # All settings are checked before the scope, and both before anything is read.
            _ = billing_database.settings
            scope = run.scope(context, clock, whole_days=True)
            yield from _divide(
                context, scope, config.max_overdue_days, sharding, billing_database, payment_provider, clock, threads
            )

    return divide_due_subscriptions


def _divide(
    context: dg.OpExecutionContext,
    scope: RunScope,
    max_overdue_days: int,
    sharding: Sharding,
    database: BillingDatabase,
    provider: ProviderConnection,
    clock: Clock,
    threads: Threads,
) -> Iterator[dg.DynamicOutput[None]]:
    shards, at_once = sharding.shards, sharding.at_once
    if scope.approved_plan is not None:
        raise RunRefused(
            "a plan is approved as a whole, and RENEWAL_SHARDS divides this deployment's runs. Nothing was read or"
            " written"
        )
    with database.read() as connection:
        if database.settings.billing_renewal_view:
            check_view(connection, database.settings.billing_renewal_view)
        counts = count_due(connection, **bounds_of_due(database.calendar, scope, clock, max_overdue_days))
    # A wrong shop key is found by one request, not by one of each shard.
    provider.client.check()
    if scope.max_changes is not None:
        _stop_if_over(scope, scope.max_changes, max_overdue_days, shards, database, provider, clock, threads)
    found = _settle_first(context, scope, counts, max_overdue_days, database, provider, clock, threads)
    division = Division(scope.as_of, scope.source, at_once, max_overdue_days)
    context.instance.add_run_tags(context.run_id, {DIVISION_TAG: division.to_text()})
    context.log.info(f"{counts.due} due subscriptions in {shards} shards, {at_once} at once")
    metadata = {
        **describe_scope(scope),
        "due": dg.MetadataValue.int(counts.due),
        "open attempts": dg.MetadataValue.int(counts.open_attempts),
        f"not charged: overdue by more than {max_overdue_days} days": dg.MetadataValue.int(counts.too_old),
        "not charged: the plan is not recurring": dg.MetadataValue.int(counts.not_recurring),
        "ACTIVE without an end": dg.MetadataValue.int(counts.without_end),
        "shards": dg.MetadataValue.int(shards),
        "shards at once": dg.MetadataValue.int(at_once),
        **found,
    }
    for shard in divide(shards):
        yield dg.DynamicOutput(
            None, mapping_key=shard.key, output_name="shards", metadata=metadata if shard.number == 1 else None
        )


def _settle_first(
    context: dg.OpExecutionContext,
    scope: RunScope,
    counts: DueCounts,
    max_overdue_days: int,
    database: BillingDatabase,
    provider: ProviderConnection,
    clock: Clock,
    threads: Threads,
) -> Mapping[str, dg.MetadataValue[Any]]:
    """What became of pending charges, then what our records have lost, is written down before the shards read.

    A card that a pending charge of one shard has stopped is not charged by another, and a lost success is not put
    beside a charge that was declined long ago. A dry run leaves it to be shown by the shards.
    """
    if scope.dry_run:
        return {}

    def stamp() -> Stamp:
        return Stamp(JOB, scope.run_id, clock.now())

    concluded: list[Decision] = []
    report = RunReport(decisions=concluded)
    conclude_pending(report, database, provider, clock, threads, stamp)
    may_charge = bool(counts.due or counts.open_attempts)
    found = search(database, provider, clock, max_overdue_days, may_charge=may_charge)
    told = settle_lost_or_stop(found, database, provider, clock, stamp)
    for decision in told:
        context.log.info(f"{decision.action}, {decision.subject}: {decision.reason}")
    # What could not be written is its shard's to try again, and to tell.
    report.again.clear()
    to_add_up = {_REPORT: _to_add_up(report)} if concluded else {}
    return {**describe_decisions(concluded), **describe_search(found), **to_add_up}


def _stop_if_over(
    scope: RunScope,
    max_changes: int,
    max_overdue_days: int,
    shards: int,
    database: BillingDatabase,
    provider: ProviderConnection,
    clock: Clock,
    threads: Threads,
) -> None:
    """A limit on changes holds for the whole run: decide all shards once, one after another, before any begins."""
    changes = 0
    first: list[Decision] = []
    for shard in divide(shards):
        renewals = read_renewals(database, clock, scope, max_overdue_days, shard)
        asked = ask_about_open(renewals, database, provider, clock, threads)
        decisions = [decision for decision in decide(asked, clock) if not isinstance(decision, NotCharged)]
        changes += len(decisions)
        first.extend(shown(decision) for decision in decisions[: 100 - len(first)])
    stop_before_applying(over_limit(changes, max_changes), first)


@dg.op(
    description="Renew one shard of the due: read it, ask about its open attempts, decide each, charge.",
    ins={"shard": dg.In(dg.Nothing)},
    out=dg.Out(dg.Nothing),
)
def renew_shard(
    context: dg.OpExecutionContext,
    config: ChargingConfig,
    run: RunSettings,
    billing_database: dg.ResourceParam[BillingDatabase],
    payment_provider: dg.ResourceParam[ProviderConnection],
    clock: dg.ResourceParam[Clock],
    threads: dg.ResourceParam[Threads],
) -> None:
    """All steps of one shard. What must be retried is reported to the last op, which ends the run red."""
    report = RunReport()
    with told_plainly():
        shard = shard_of_key(context.get_mapping_key())
        scope, division = _agreed(context, run, clock)
        renewals = read_renewals(billing_database, clock, scope, division.max_overdue_days, shard)
        asked = ask_about_open(renewals, billing_database, payment_provider, clock, threads)
        if scope.dry_run:
            # What is lost was settled before any shard began, if it may be.
            asked = ask_for_lost(asked, billing_database, payment_provider, clock)
        plan = plan_of(asked, decide(asked, clock))
        del renewals, asked
        apply_plan(
            context,
            limits_of_a_shard(config, division.at_once),
            plan,
            report,
            billing_database,
            payment_provider,
            clock,
            threads,
        )
    if end_if_interrupted(context, report):
        words = f"terminated: what was under way is concluded, {report.to_retry} must be retried"
        raise failed(FailureCode.TERMINATED, words, describe_report(scope, report, JOB))
    context.add_output_metadata(
        {
            **describe_report(scope, report, JOB),
            **describe_clocks(context, plan.clocks),
            _REPORT: _to_add_up(report),
        }
    )


def _to_add_up(report: RunReport) -> dg.MetadataValue[Any]:
    """What a step has done, for the last op."""
    told = {
        "applied": report.applied,
        "skipped": report.skipped,
        "quarantined": report.quarantined,
        "opened": report.opened,
        "again": [printable(line) for line in report.again[:_NAMED]],
        "again_unnamed": max(0, len(report.again) - _NAMED),
        "stopped_by": report.stopped_by and printable(report.stopped_by),
        "stop_code": report.stop_code,
        "numbers": report.numbers,
    }
    return dg.MetadataValue.text(json.dumps(told))


def _agreed(context: dg.OpExecutionContext, run: RunSettings, clock: Clock) -> tuple[RunScope, Division]:
    """What all shards of the run agree on, whatever the time is when this one begins."""
    record = context.instance.get_run_by_id(context.run_id)
    told = record.tags.get(DIVISION_TAG) if record else None
    if told is None:
        raise RunRefused(LAUNCHED_ALONE)
    division = Division.from_text(told)
    scope = run.scope(context, clock, whole_days=True)
    return replace(scope, as_of=division.as_of_at(clock.now()), source=division.source), division


def limits_of_a_shard(config: ChargingConfig, at_once: int) -> ChargingConfig:
    """The limits of the run, divided among the shards that run at once."""
    rate = config.max_requests_per_second
    return ChargingConfig(
        max_concurrency=share(config.max_concurrency, at_once),
        max_requests_per_second=None if rate is None else rate / at_once,
        max_sends=config.max_sends,
        resend_wait_s=config.resend_wait_s,
    )


@dg.op(
    description="Add up what the shards did; red if something must be retried. The decisions are in the output of"
    " each renew_shard.",
    ins={"shards": dg.In(dg.Nothing)},
    out=dg.Out(dg.Nothing),
)
def conclude_shards(
    context: dg.OpExecutionContext,
    run: RunSettings,
    billing_database: dg.ResourceParam[BillingDatabase],
    clock: dg.ResourceParam[Clock],
) -> Told:
    """The run's result, from what each step has left in the run history."""
    with told_plainly():
        scope, _ = _agreed(context, run, clock)
    report = RunReport()
    rows = []
    for name, told in sorted(_reports(context).items()):
        report.applied += told["applied"]
        report.skipped += told["skipped"]
        report.quarantined += told["quarantined"]
        report.opened += told["opened"]
        report.again.extend(told["again"])
        report.again_unnamed += told["again_unnamed"]
        if report.stopped_by is None:
            report.stopped_by, report.stop_code = told["stopped_by"], told["stop_code"]
        for number, value in told["numbers"].items():
            report.numbers[number] = report.numbers.get(number, 0) + value
        rows.append(
            dg.TableRecord(
                {
                    "shard": name,
                    "changed": told["applied"],
                    "skipped": told["skipped"],
                    "quarantined": told["quarantined"],
                    "to retry": len(told["again"]) + told["again_unnamed"],
                }
            )
        )
    if not scope.dry_run:
        yield plotted(context, JOB, report.numbers, day=str(billing_database.calendar.day_of(scope.as_of)))
    shards = {"shards": dg.MetadataValue.table(rows)} if rows else {}
    conclude(context, scope, report, retry_hint=RETRY_HINT, job=JOB, more=shards)
    yield dg.Output(None)


def _reports(context: dg.OpExecutionContext) -> dict[str, dict[str, Any]]:
    """What the first op and the shards of this run have reported, by the step's name."""
    found: dict[str, dict[str, Any]] = {}
    for entry in context.instance.all_logs(context.run_id, of_type=dg.DagsterEventType.STEP_OUTPUT):
        event = entry.dagster_event
        metadata = event.step_output_data.metadata if event is not None else {}
        if event is not None and _REPORT in metadata:
            found[str(event.step_key)] = json.loads(str(metadata[_REPORT].value))
    return found
