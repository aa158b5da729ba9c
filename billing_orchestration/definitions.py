"""The code location: jobs, schedules, sensors, assets and resources. The only place that wires."""

import gc
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from typing import Any

import dagster as dg
import sqlalchemy as sa

from billing_orchestration.database.health import server_clock
from billing_orchestration.database_address import keep_addresses_out_of_logs
from billing_orchestration.domain.shards import Sharding
from billing_orchestration.jobs import (
    autopayment,
    expire_payments,
    expire_subscriptions,
    matching_pending_payments,
    matching_successful_payments,
    money_checks,
    prune_run_history,
    reconciliation,
    report,
    resolve_quarantine,
    upcoming,
)
from billing_orchestration.jobs.approval import PLANS
from billing_orchestration.jobs.autopayment.executors import executor_for
from billing_orchestration.jobs.missed_days import missed_days_sensor
from billing_orchestration.jobs.money_checks import GROUP
from billing_orchestration.jobs.partitions import DAILY, RECONCILED
from billing_orchestration.jobs.run_alerts import failed_run_sensor
from billing_orchestration.jobs.run_report import asset_of
from billing_orchestration.resources import (
    Connect,
    RunSettings,
    alerts_resource,
    billing_database_resource,
    clock_resource,
    connect_provider,
    hand_over_resource,
    payment_provider_resource,
    uptime_s,
    utc_now,
)
from billing_orchestration.settings import Settings, load_settings, renewal_sharding
from billing_orchestration.threads import OF_THE_SYSTEM, Threads

_OTHER_JOBS = (
    expire_payments.expire_payments_job,
    expire_subscriptions.expire_subscriptions_job,
    matching_pending_payments.matching_pending_payments_job,
    matching_successful_payments.matching_successful_payments_job,
    prune_run_history.run_history_job,
    reconciliation.reconciliation_job,
    report.report_job,
    upcoming.upcoming_job,
)
# Launched by a person, who looks at the run: no schedule, and no alert about a red one.
BY_HAND = (resolve_quarantine.resolve_quarantine_job,)
SCHEDULES = (
    autopayment.autopayment_daily_schedule,
    expire_payments.expire_payments_daily_schedule,
    expire_subscriptions.expire_subscriptions_daily_schedule,
    matching_pending_payments.matching_pending_payments_every_2_minutes_schedule,
    matching_successful_payments.matching_successful_payments_every_2_minutes_schedule,
    prune_run_history.run_history_daily_schedule,
    reconciliation.reconciliation_daily_schedule,
    report.report_daily_schedule,
    upcoming.upcoming_daily_schedule,
)
_DAILY_SCHEDULES = tuple(schedule for schedule in SCHEDULES if "daily" in schedule.name)
# They decide about no money.
_NO_PLAN = (prune_run_history.JOB, report.JOB, upcoming.JOB)
# The jobs that `plan` can preview.
PLANNED = tuple(schedule.job_name for schedule in SCHEDULES if schedule.job_name not in _NO_PLAN)
_PLOTTED_BY_DAY = (autopayment.autopayment_job.name, expire_payments.JOB, expire_subscriptions.JOB)
_PLOTTED_BY_TICK = (matching_pending_payments.JOB, matching_successful_payments.JOB)


# The code server and its runs open the run history, too.
keep_addresses_out_of_logs()
# Dagster copies a sensor that launches jobs, and warns of a parameter of its own that nobody here gives.
warnings.filterwarnings("ignore", "Parameter `owners` of initializer `SensorDefinition", dg.BetaWarning)


def build_definitions(
    *,
    load: Callable[[], Settings] = load_settings,
    now: Callable[[], datetime] = utc_now,
    database_now: Callable[[sa.Connection], datetime] = server_clock,
    steady_s: Callable[[], float] = uptime_s,
    connect: Connect | None = None,
    threads: Threads = OF_THE_SYSTEM,
    executor: dg.ExecutorDefinition | None = None,
    renewal_shards: int | None = None,
    renewal_shards_at_once: int | None = None,
) -> dg.Definitions:
    """The definitions for given settings, clocks, provider and threads: the environment's, the real ones, by default.

    `renewal_shards` divides the runs of autopayment_job, of which `renewal_shards_at_once` run side by side; left out:
    as RENEWAL_SHARDS and RENEWAL_SHARDS_AT_ONCE say; 0: in one piece, whatever they say. `executor` runs the shards
    (dagster_k8s.k8s_job_executor, say); left out: this machine's processes. All else runs in the run's own process.
    Other settings are read when a run first needs them, so the code location loads without any. Raises ValueError for
    shards or an executor that cannot be.
    """
    sharding = _sharding(renewal_shards, renewal_shards_at_once, executor)
    jobs = (autopayment.build_job(sharding, executor_for(sharding, executor)), *_OTHER_JOBS)
    return dg.Definitions(
        jobs=[*jobs, *BY_HAND],
        schedules=SCHEDULES,
        assets=[*money_checks.money_assets, *_plotted_assets()],
        asset_checks=money_checks.money_asset_checks,
        sensors=[failed_run_sensor(jobs), money_checks.money_checks_sensor, missed_days_sensor(_DAILY_SCHEDULES, jobs)],
        # Of the money checks that are launched from the UI.
        executor=dg.in_process_executor,
        resources=_resources(
            load,
            clock_resource(now, database_now, steady_s),
            connect or partial(connect_provider, threads=threads),
            threads,
        ),
    )


def _sharding(shards: int | None, at_once: int | None, executor: dg.ExecutorDefinition | None) -> Sharding | None:
    """As the arguments say, else as the environment does. A shard too many at once is only a limit shared too often."""
    if shards is None:
        shards, at_once = renewal_sharding()
    if not shards:
        return None
    if at_once is None:
        at_once = shards if executor is not None and executor.name != dg.in_process_executor.name else 1
    return Sharding(shards, min(at_once, shards))


def _plotted_assets() -> Iterator[dg.AssetSpec]:
    """What Dagster plots (one point a day, or one for each tick that changed something), and the plans of dry runs."""
    yield dg.AssetSpec(
        PLANS,
        description="Plans that dry runs have shown, each with a link that approves it: see Events, latest first.",
        group_name=GROUP,
    )
    for job in _PLOTTED_BY_DAY:
        yield dg.AssetSpec(
            asset_of(job),
            description=f"Numbers of {job}, by day, all runs of a day added up. See Metadata, Plots.",
            partitions_def=DAILY,
            group_name=GROUP,
        )
    yield dg.AssetSpec(
        dg.AssetKey(["billing", reconciliation.ASSET]),
        description="Both sides' books, by day: paid, fees, refunds, differences. See Metadata, Plots.",
        partitions_def=RECONCILED,
        group_name=GROUP,
    )
    yield dg.AssetSpec(
        asset_of(upcoming.JOB),
        description="Who will be charged in the next three days, how much and with which card, and who will not and"
        " why. Daily, to warn them. See Metadata.",
        partitions_def=DAILY,
        group_name=GROUP,
    )
    yield dg.AssetSpec(
        asset_of(report.JOB),
        description="How are we doing? Renewals due, charges, declines and what came back, revenue, what waits: daily,"
        " with plots. See Metadata.",
        partitions_def=DAILY,
        group_name=GROUP,
    )
    for job in _PLOTTED_BY_TICK:
        yield dg.AssetSpec(
            asset_of(job),
            description=f"Corrections by {job}, one point per tick that made any. See Metadata, Plots.",
            group_name=GROUP,
        )


def _resources(
    load: Callable[[], Settings],
    clock: dg.ResourceDefinition,
    connect: Connect,
    threads: Threads,
) -> dict[str, Any]:
    return {
        "run": RunSettings(),
        "billing_database": billing_database_resource(load),
        "payment_provider": payment_provider_resource(load, connect),
        "clock": clock,
        "threads": dg.ResourceDefinition.hardcoded_resource(threads, "What makes the run's threads."),
        "hand_over": hand_over_resource,
        "alerts": alerts_resource(load),
    }


defs = build_definitions()

# What is imported by now lives as long as the process. Without this, each full collection of a short run walks through
# all of it (130,000 objects, nearly all of them Dagster's) and finds nothing, the last time as the process ends.
gc.freeze()
