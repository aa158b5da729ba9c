"""upcoming_job: who will be charged in the next three days, on the asset billing/upcoming. Daily at 10:00.

By the function behind `billing-orchestration upcoming`, so by the rules of the renewal run. It changes nothing, and
shows subscriptions, not their users: the run history is kept for a year.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from decimal import Decimal
from typing import Any

import dagster as dg
from pydantic import Field

from billing_orchestration.desk.upcoming import Upcoming, find_upcoming
from billing_orchestration.domain.printable import printable
from billing_orchestration.jobs.partitions import BILLING_TIMEZONE, DAILY, day_key
from billing_orchestration.jobs.run_report import ROWS_SHOWN, asset_of, in_one_sentence, told_plainly
from billing_orchestration.jobs.schedules import singleton_tags, tick_schedule
from billing_orchestration.resources import BillingDatabase, Clock, ProviderConnection, RunSettings

JOB = "upcoming_job"
MAX_RUNTIME_S = 3600
_COLUMNS = ("subscription", "on", "charged", "amount", "currency", "card", "code", "reason")


class UpcomingConfig(dg.Config):
    """How far it looks ahead."""

    days: int = Field(default=3, ge=0, le=31, description="What is due up to the end of the day this many days ahead.")


@dg.op(description="Decide each renewal of the next days as its run will; charge nobody.", out=dg.Out(dg.Nothing))
def show_upcoming(
    context: dg.OpExecutionContext,
    config: UpcomingConfig,
    run: RunSettings,
    billing_database: dg.ResourceParam[BillingDatabase],
    payment_provider: dg.ResourceParam[ProviderConnection],
    clock: dg.ResourceParam[Clock],
) -> Iterator[dg.AssetMaterialization | dg.Output[None]]:
    """What stands before the customers now, whatever day the run is for."""
    with told_plainly():
        settings = billing_database.settings
        scope = run.scope(context, clock, whole_days=True)
        lines = find_upcoming(billing_database.engine, payment_provider.client, settings, clock.now(), config.days)
    sums: dict[str, Decimal] = {}
    for line in lines:
        if line.charged == "yes":
            sums[line.currency] = sums.get(line.currency, Decimal(0)) + Decimal(line.amount)
    charged = sum(line.charged == "yes" for line in lines)
    listed = _listed(lines, config.days)
    if not scope.dry_run:
        day = str(billing_database.calendar.day_of(scope.as_of))
        plotted = {"to be charged": charged, "not to be charged": len(lines) - charged}
        plotted_sums = {f"to be charged, {currency}": float(amount) for currency, amount in sorted(sums.items())}
        yield dg.AssetMaterialization(asset_of(JOB), partition=day, metadata={**plotted, **plotted_sums, **listed})
    money = ", ".join(f"{amount} {currency}" for currency, amount in sorted(sums.items()))
    told = [f"to be charged {charged} ({money})"] if charged else []
    told += [f"not to be charged {len(lines) - charged}"] if len(lines) > charged else []
    metadata: dict[str, dg.MetadataValue[Any]] = {
        "result": dg.MetadataValue.text(in_one_sentence(told, dry_run=scope.dry_run))
    }
    if not scope.dry_run:
        metadata["next: numbers over time"] = dg.MetadataValue.asset(asset_of(JOB))
    yield dg.Output(None, metadata={**metadata, **listed})


def _listed(lines: Sequence[Upcoming], days: int) -> dict[str, dg.MetadataValue[Any]]:
    """Metadata: the first renewals, and the command that lists all of them. Nothing where nobody is due."""
    if not lines:
        return {}
    cut = f"first {ROWS_SHOWN} of " if len(lines) > ROWS_SHOWN else ""
    rows = [{name: printable(str(asdict(line)[name])) for name in _COLUMNS} for line in lines[:ROWS_SHOWN]]
    return {
        f"renewals ({cut}{len(lines)})": dg.MetadataValue.table(
            [dg.TableRecord(row) for row in rows], dg.TableSchema([dg.TableColumn(name) for name in _COLUMNS])
        ),
        "all of them": dg.MetadataValue.text(f"billing-orchestration upcoming --days {days} --format csv"),
    }


@dg.job(
    name=JOB,
    description="Shows who will be charged in the next days, how much and with which card, and who will not and why.",
    partitions_def=DAILY,
    executor_def=dg.in_process_executor,
    tags=singleton_tags(JOB, MAX_RUNTIME_S),
)
def upcoming_job() -> None:
    """Show them."""
    show_upcoming()


upcoming_daily_schedule = tick_schedule(
    upcoming_job,
    name="upcoming_daily_schedule",
    cron="0 10 * * *",
    timezone=BILLING_TIMEZONE,
    partition_key=day_key,
    description="Daily at 10:00 in the billing time zone: an hour at which customers may be written to.",
)
