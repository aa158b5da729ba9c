"""autopayment_job: renews due subscriptions with the saved payment method. The only job that moves money.

Daily at 03:00. It first asks what became of earlier attempts whose outcome is open, then charges what is due, each
attempt by the protocol of `charging`. It is safe to repeat: a period is charged at most once, and a card is tried at
most once a day. A deployment's runs are whole (four ops), or divided into shards (RENEWAL_SHARDS).
"""

import dagster as dg

from billing_orchestration.domain.renewals import NotCharged
from billing_orchestration.domain.run_scope import over_limit
from billing_orchestration.domain.shards import Sharding
from billing_orchestration.jobs.approval import bind
from billing_orchestration.jobs.autopayment.lost_charges import describe_search
from billing_orchestration.jobs.autopayment.shards import conclude_shards, divide_into, renew_shard
from billing_orchestration.jobs.autopayment.steps import (
    JOB,
    RETRY_HINT,
    AskedRenewals,
    ChargingConfig,
    DueConfig,
    RenewalPlan,
    Renewals,
    apply_plan,
    ask_about_open,
    ask_for_lost,
    decide,
    line_of,
    plan_of,
    read_renewals,
    shown,
)
from billing_orchestration.jobs.clocks import describe_clocks
from billing_orchestration.jobs.partitions import BILLING_TIMEZONE, DAILY, day_key
from billing_orchestration.jobs.run_report import (
    RunReport,
    Told,
    conclude,
    describe_decisions,
    describe_scope,
    plotted,
    stop_before_applying,
    told_plainly,
)
from billing_orchestration.jobs.schedules import singleton_tags, tick_schedule
from billing_orchestration.resources import AFTER, BillingDatabase, Clock, HandOver, ProviderConnection, RunSettings
from billing_orchestration.threads import Threads

# A long list at a slow provider takes hours. A run that takes longer than this hangs, and tomorrow's must not wait.
MAX_RUNTIME_S = 12 * 3600


@dg.op(
    description="Read the subscriptions that are due, with saved method, price and attempts, and all open attempts.",
    out=dg.Out(dg.Nothing),
)
def fetch_due_subscriptions(
    context: dg.OpExecutionContext,
    config: DueConfig,
    run: RunSettings,
    billing_database: dg.ResourceParam[BillingDatabase],
    clock: dg.ResourceParam[Clock],
    hand_over: dg.ResourceParam[HandOver],
) -> None:
    """The database's slice."""
    with told_plainly():
        # All settings are checked before the scope, and both before anything is read.
        _ = billing_database.settings
        scope = run.scope(context, clock, whole_days=True)
        renewals = read_renewals(billing_database, clock, scope, config.max_overdue_days)
        found = renewals.slice
    hand_over.leave(renewals)
    context.add_output_metadata(
        {
            **describe_scope(scope),
            "due": dg.MetadataValue.int(len(found.due)),
            "open attempts": dg.MetadataValue.int(len(found.open_attempts)),
            f"not charged: overdue by more than {config.max_overdue_days} days": dg.MetadataValue.int(found.too_old),
            "not charged: the plan is not recurring": dg.MetadataValue.int(found.not_recurring),
            "ACTIVE without an end": dg.MetadataValue.int(found.without_end),
        }
    )


@dg.op(
    description="Ask the provider about attempts that are pending; search its list for those too old to send again, and"
    " for charges that our records have lost.",
    ins=AFTER,
)
def fetch_open_renewals(
    context: dg.OpExecutionContext,
    billing_database: dg.ResourceParam[BillingDatabase],
    payment_provider: dg.ResourceParam[ProviderConnection],
    clock: dg.ResourceParam[Clock],
    threads: dg.ResourceParam[Threads],
    hand_over: dg.ResourceParam[HandOver],
) -> None:
    """The provider's slice. Only reads; a wrong shop key fails the run after one request."""
    with told_plainly():
        asked = ask_about_open(hand_over.take(Renewals), billing_database, payment_provider, clock, threads)
        asked = ask_for_lost(asked, billing_database, payment_provider, clock)
    context.add_output_metadata(
        {
            "asked about": dg.MetadataValue.int(asked.asked_about),
            "searched for": dg.MetadataValue.int(asked.searched_for),
            "methods asked about": dg.MetadataValue.int(len(asked.answers)),
            "answered": dg.MetadataValue.int(len(asked.view.answers)),
            "no answer": dg.MetadataValue.int(len(asked.view.silent)),
            **describe_clocks(context, asked.clocks),
            **describe_search(asked.search),
        }
    )
    hand_over.leave(asked)


@dg.op(description="Decide each: charge, send again, conclude, or leave with the reason.", ins=AFTER)
def diff_renewals(
    context: dg.OpExecutionContext, clock: dg.ResourceParam[Clock], hand_over: dg.ResourceParam[HandOver]
) -> None:
    """One decision for each open attempt and each due subscription."""
    with told_plainly():
        asked = hand_over.take(AskedRenewals)
    scope = asked.renewals.scope
    decisions = decide(asked, clock)
    all_shown = [shown(decision) for decision in decisions]
    changes = {line_of(decision): decision for decision in decisions if not isinstance(decision, NotCharged)}
    stop_before_applying(over_limit(len(changes), scope.max_changes), all_shown)
    context.add_output_metadata(describe_decisions(all_shown))
    approved, refused = bind(
        context, scope, list(changes.items()), {line: shown(decision) for line, decision in changes.items()}
    )
    left = [decision for decision in decisions if isinstance(decision, NotCharged)]
    hand_over.leave(plan_of(asked, (*approved, *left), refused))


@dg.op(
    description="Conclude what the provider reported, then charge: write ahead, send, settle, attempt by attempt.",
    ins=AFTER,
    out=dg.Out(dg.Nothing),
)
def charge_renewals(
    context: dg.OpExecutionContext,
    config: ChargingConfig,
    billing_database: dg.ResourceParam[BillingDatabase],
    payment_provider: dg.ResourceParam[ProviderConnection],
    clock: dg.ResourceParam[Clock],
    threads: dg.ResourceParam[Threads],
    hand_over: dg.ResourceParam[HandOver],
) -> Told:
    """Apply the plan; the run ends red if something must be retried. A dry run shows the plan and sends nothing."""
    report = RunReport()
    with told_plainly():
        plan = hand_over.take(RenewalPlan)
        apply_plan(context, config, plan, report, billing_database, payment_provider, clock, threads)
        if not plan.scope.dry_run:
            day = str(billing_database.calendar.day_of(plan.scope.as_of))
            yield plotted(context, JOB, report.numbers, day=day)
    conclude(context, plan.scope, report, retry_hint=RETRY_HINT, job=JOB)
    yield dg.Output(None)


def build_job(sharding: Sharding | None, executor: dg.ExecutorDefinition) -> dg.JobDefinition:
    """The job as a deployment runs it: whole, in four ops (no `sharding`), or in shards. Never both in one graph."""

    @dg.graph(name=JOB)
    def whole() -> None:
        charge_renewals(diff_renewals(fetch_open_renewals(fetch_due_subscriptions())))

    @dg.graph(name=JOB)
    def divided() -> None:
        if sharding is not None:
            conclude_shards(divide_into(sharding)().map(renew_shard).collect())

    return (whole if sharding is None else divided).to_job(
        name=JOB,
        description="Renews due subscriptions by charging the saved payment method. The only job that moves money.",
        partitions_def=DAILY,
        tags=singleton_tags(JOB, MAX_RUNTIME_S),
        executor_def=executor,
    )


autopayment_job = build_job(None, dg.in_process_executor)


autopayment_daily_schedule = tick_schedule(
    autopayment_job,
    name="autopayment_daily_schedule",
    cron="0 3 * * *",
    timezone=BILLING_TIMEZONE,
    partition_key=day_key,
    description="Daily at 03:00 in the billing time zone.",
)
