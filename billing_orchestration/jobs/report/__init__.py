"""report_job: how are we doing? Daily at 07:00, on the asset billing/report, and by mail or chat to REPORT_URLS.

It reads the billing database, one statement a section, and the fees that reconciliation has shown. It moves no money
and shows no customer.
"""

from collections.abc import Iterator, Mapping
from datetime import date
from decimal import Decimal
from typing import Any

import dagster as dg

from billing_orchestration.alerting import send_report
from billing_orchestration.database.report import LOOKS_BACK
from billing_orchestration.domain.run_scope import RunScope
from billing_orchestration.jobs.partitions import BILLING_TIMEZONE, DAILY, day_key
from billing_orchestration.jobs.report.composing import as_html, as_markdown, count, headline
from billing_orchestration.jobs.run_report import asset_of, told_plainly
from billing_orchestration.jobs.schedules import singleton_tags, tick_schedule
from billing_orchestration.resources import BillingDatabase, Clock, RunSettings

JOB = "report_job"
MAX_RUNTIME_S = 1800
_RECONCILED = dg.AssetKey(["billing", "reconciliation"])
_FEES = "fees, "


@dg.op(description="Count, draw, show; and send it to REPORT_URLS, unless it is a dry run.", out=dg.Out(dg.Nothing))
def write_report(
    context: dg.OpExecutionContext,
    run: RunSettings,
    billing_database: dg.ResourceParam[BillingDatabase],
    clock: dg.ResourceParam[Clock],
) -> Iterator[dg.AssetMaterialization | dg.Output[None]]:
    """The report of a day: its charges, and what stands open now."""
    from billing_orchestration.jobs.report.plots import plots  # the plotting library is for this job alone

    with told_plainly():
        settings, calendar = billing_database.settings, billing_database.calendar
        scope = run.scope(context, clock, whole_days=True)
        day = calendar.day_of(scope.as_of)
        with billing_database.read() as connection:
            counted = count(connection, scope.as_of, settings.billing_timezone.key, _fees(context, scope))
    images = plots(counted)
    shown = dg.MetadataValue.md(as_markdown(counted, images))
    metadata: dict[str, dg.MetadataValue[Any]] = {"result": dg.MetadataValue.text(headline(counted))}
    if scope.dry_run:
        metadata["report"] = shown
    else:  # once: the plots are some 100 KB of the run history
        yield dg.AssetMaterialization(asset_of(JOB), partition=str(day), metadata={**metadata, "report": shown})
        metadata["next: read it"] = dg.MetadataValue.asset(asset_of(JOB))
    if settings.report_urls is not None and not scope.dry_run:
        title, words, page = f"billing report, {day}", as_markdown(counted, {}), as_html(counted, images)
        sent = send_report(settings.report_urls.get_secret_value(), title, words, page)
        metadata["sent to REPORT_URLS"] = dg.MetadataValue.text("yes" if sent else "no: not every receiver took it")
        if not sent:
            context.log.warning("REPORT_URLS: not every receiver took the report; it is on the asset billing/report")
    yield dg.Output(None, metadata=metadata)


def _fees(context: dg.OpExecutionContext, scope: RunScope) -> Mapping[tuple[date, str], Decimal]:
    """What the provider kept, by day and currency, as the last reconciliation of each day has shown it."""
    first = (scope.as_of - LOOKS_BACK).date().toordinal()
    days = [date.fromordinal(first + number) for number in range(LOOKS_BACK.days + 2)]
    found = context.instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=_RECONCILED, asset_partitions=[str(day) for day in days]), limit=10 * len(days)
    ).records
    fees: dict[tuple[date, str], Decimal] = {}
    for record in found:  # latest first
        shown = record.asset_materialization
        if shown is None or shown.partition is None:
            continue
        for name, value in shown.metadata.items():
            if name.startswith(_FEES):
                key = date.fromisoformat(shown.partition), name.removeprefix(_FEES)
                fees.setdefault(key, Decimal(str(value.value)))
    return fees


@dg.job(
    name=JOB,
    description="Reports how billing is doing: due, charged, declined, recovered, revenue, what waits. Moves no money.",
    partitions_def=DAILY,
    executor_def=dg.in_process_executor,
    tags=singleton_tags(JOB, MAX_RUNTIME_S),
)
def report_job() -> None:
    """Write the report."""
    write_report()


report_daily_schedule = tick_schedule(
    report_job,
    name="report_daily_schedule",
    cron="0 7 * * *",
    timezone=BILLING_TIMEZONE,
    partition_key=day_key,
    description="Daily at 07:00 in the billing time zone, after reconciliation.",
)
