"""The money's invariants as asset checks, its numbers over time, and the quarantine where an operator sees it.

A sensor looks every five minutes, in the code server, without a run. New entries of the quarantine alert at once; the
checks and numbers are written hourly. When nothing is new, nothing is written. The UI can run the checks, too.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import dagster as dg
import sqlalchemy as sa

from billing_orchestration.alerting import Alert, Alerts
from billing_orchestration.database.errors import BillingDatabaseError
from billing_orchestration.database.money_checks import (
    Verdict,
    day_reconciled,
    matching_keeps_up,
    no_old_unknown,
    no_second_success,
    numbers,
    paid_is_granted,
)
from billing_orchestration.database.quarantine import Entry, count_and_last, entries_since
from billing_orchestration.domain.attempts import KEY_LIFETIME_HOURS
from billing_orchestration.domain.printable import printable
from billing_orchestration.domain.problem_kinds import kind_of
from billing_orchestration.jobs.next_steps import location_of
from billing_orchestration.jobs.quarantine_page import QUARANTINE, quarantine_page, resolving_link
from billing_orchestration.jobs.run_alerts import retry_undelivered
from billing_orchestration.launchpad import LOCATION, launchpad, run_option
from billing_orchestration.resources import PARTITION_TAG, BillingDatabase, Clock
from billing_orchestration.settings import SettingsError, runbook_link, ui_prefix

MONEY = dg.AssetKey(["billing", "money"])
GROUP = "billing"
EVERY = timedelta(hours=1)
_SENSOR_INTERVAL_S = 300
_ENTRIES_TOLD = 10


@dataclass(frozen=True)
class MoneyCheck:
    """One invariant, by the statement that asks whether it holds; what it means for the money; what to do.

    `jobs` are launched to mend it, with this run config.
    """

    ask: Callable[[sa.Connection, datetime], Verdict]
    description: str
    money: str
    do: str
    jobs: tuple[str, ...] = ()
    config: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """The statement's name."""
        return self.ask.__name__


CHECKS = (
    MoneyCheck(
        paid_is_granted,
        "Every succeeded payment is granted, once: each settlement has its payment row and attempt, each succeeded"
        " attempt its settlement, each SUCCEEDED row a subscription, and no second row grants a payment again (7"
        " days).",
        "a customer may have paid without a grant, or been granted without a payment.",
        "look at each with `billing-orchestration explain payment ID`; somebody may have changed rows by hand.",
        ("matching_successful_payments_job",),
        run_option("dry_run", True),
    ),
    MoneyCheck(
        no_old_unknown,
        f"No charge has an unknown outcome for longer than {KEY_LIFETIME_HOURS} h, the lifetime of its key.",
        "these customers may have been charged and not renewed. They are never charged again before it is known.",
        "launch autopayment_job: it searches the provider's list for them.",
        ("autopayment_job",),
    ),
    MoneyCheck(
        no_second_success,
        "No period of a subscription was paid twice.",
        "a customer has paid twice for one period.",
        "resolve the entry: accept it as one more period, or refund it at the provider and ignore it.",
    ),
    MoneyCheck(
        matching_keeps_up,
        "Both matching jobs have covered the last hour.",
        "customers may have paid without access yet. The next tick that succeeds covers up to seven days.",
        "check that the daemon runs, that both schedules are on, and that their runs are green.",
        ("matching_pending_payments_job", "matching_successful_payments_job"),
    ),
    MoneyCheck(
        day_reconciled,
        "Yesterday and the six days before were reconciled: both sides agree, or each difference is before a person.",
        "somebody may have paid without access, or has access unpaid, and nobody looks at it.",
        "launch reconciliation_job for the days that it names, and read why its runs are red.",
        ("reconciliation_job",),
    ),
)


def _metadata(check: MoneyCheck, verdict: Verdict, location: str = LOCATION) -> Mapping[str, Any]:
    metadata: dict[str, Any] = {"broken": dg.MetadataValue.int(verdict.count)}
    if verdict.broken:  # as plain text and URLs: the page hides Markdown behind a click
        metadata["what breaks it"] = dg.MetadataValue.text(printable("; ".join(verdict.broken)))
        metadata["the money"] = dg.MetadataValue.text(check.money)
        metadata["what to do"] = dg.MetadataValue.text(check.do)
        metadata |= {f"next: {what}": dg.MetadataValue.url(link) for what, link in _next(check, verdict, location)}
        metadata["runbook"] = dg.MetadataValue.url(f"{runbook_link()}#{check.name}")
    return metadata


def _next(check: MoneyCheck, verdict: Verdict, location: str) -> Iterator[tuple[str, str]]:
    """What to launch, each with the link to its launchpad: filled in with the entry or day, where one is named."""
    for what in verdict.broken:
        if entry := re.match(r"quarantine entry (\d+):", what):
            yield f"decide about entry {entry[1]}", resolving_link(int(entry[1]), "accept", location=location)
    days = [found[1] for what in verdict.broken if (found := re.match(r"day (\d{4}-\d\d-\d\d):", what))]
    for job in check.jobs:
        for day in days or [None]:
            tags = None if day is None else {PARTITION_TAG: day}
            link = launchpad(job, check.config, tags=tags, location=location, prefix=ui_prefix())
            yield f"launch {job}" + (f" for {day}" if day else ""), link


def _asset_check(check: MoneyCheck) -> dg.AssetChecksDefinition:
    @dg.asset_check(asset=MONEY, name=check.name, description=check.description)
    def body(
        context: dg.AssetCheckExecutionContext,
        billing_database: dg.ResourceParam[BillingDatabase],
        clock: dg.ResourceParam[Clock],
    ) -> dg.AssetCheckResult:
        with billing_database.read() as connection:
            verdict = check.ask(connection, clock.now())
        metadata = _metadata(check, verdict, location_of(context.op_execution_context))
        return dg.AssetCheckResult(passed=verdict.passed, metadata=metadata)

    return body


money_asset_checks = [_asset_check(check) for check in CHECKS]
money_assets = [
    dg.AssetSpec(
        MONEY,
        description="Is the money right? The tab Checks says so. Metadata, Plots: charges, declines, unknown outcomes,"
        " open attempts and payments, hour by hour.",
        group_name=GROUP,
    ),
    dg.AssetSpec(
        QUARANTINE,
        description="Payments that wait for a person, with a link for each answer. Refreshed within five minutes when"
        " an entry opens or closes, and hourly.",
        group_name=GROUP,
    ),
]


@dataclass(frozen=True)
class Look:
    """What one tick has seen. `verdicts` and `numbers` are None between the hours."""

    open: int
    last: int
    fresh: Sequence[Entry]
    page: dg.AssetMaterialization | None
    verdicts: Mapping[str, Verdict] | None
    numbers: Mapping[str, int | float] | None


def look(connection: sa.Connection, now: datetime, cursor: Mapping[str, Any], location: str = LOCATION) -> Look:
    """Read what a tick needs: one small query, and more only if something is new or an hour has passed."""
    count, last = count_and_last(connection)
    told = int(cursor.get("told", 0))
    changed = [count, last] != cursor.get("shown")
    hourly = cursor.get("at") is None or now - datetime.fromisoformat(cursor["at"]) >= EVERY
    return Look(
        count,
        last,
        entries_since(connection, told, 1000) if last > told else (),
        quarantine_page(connection, now, location) if changed or (hourly and count) else None,
        {check.name: check.ask(connection, now) for check in CHECKS} if hourly else None,
        numbers(connection, now) if hourly else None,
    )


def quarantine_alert(fresh: Sequence[Entry], waiting: int, alerts: Alerts) -> Alert:
    """One alert for all new entries."""
    lines = [
        f"- {entry.id}, {entry.subject}: {entry.kind}: {entry.reason[:200]} ({kind_of(entry.kind).means})"
        for entry in fresh[:_ENTRIES_TOLD]
    ]
    more = [f"- and {len(fresh) - _ENTRIES_TOLD} more"] if len(fresh) > _ENTRIES_TOLD else []
    one = len(fresh) == 1
    return Alert(
        title="a new entry in the quarantine" if one else f"{len(fresh)} new entries in the quarantine",
        happened="\n".join([*lines, *more]),
        money=f"nothing more happens with it until a person decides ({waiting} open in all).",
        do="decide by the links of the page, or look with billing-orchestration quarantine show "
        f"{fresh[0].id if one else 'ID'}, then resolve. See {alerts.runbook('quarantine')}",
        link=alerts.link("assets/billing/quarantine"),
    )


def check_alert(check: MoneyCheck, verdict: Verdict, alerts: Alerts) -> Alert:
    """The alert of an invariant that no longer holds."""
    return Alert(
        title=f"money check failed: {check.name}",
        happened="\n".join([check.description, *(f"- {what}" for what in verdict.broken)]),
        money=check.money,
        do=f"{check.do} See {alerts.runbook(check.name)}",
        link=alerts.link("assets/billing/money?view=checks"),
    )


def _events(seen: Look, location: str) -> list[dg.AssetMaterialization | dg.AssetObservation | dg.AssetCheckEvaluation]:
    events: list[dg.AssetMaterialization | dg.AssetObservation | dg.AssetCheckEvaluation] = []
    if seen.page is not None:
        events.append(seen.page)
    if seen.numbers is not None:
        events.append(dg.AssetMaterialization(MONEY, metadata=dict(seen.numbers)))
    if seen.verdicts is not None:
        for check in CHECKS:
            verdict = seen.verdicts[check.name]
            events.append(
                dg.AssetCheckEvaluation(MONEY, check.name, verdict.passed, metadata=_metadata(check, verdict, location))
            )
    return events


def tick(
    instance: dg.DagsterInstance,
    cursor_text: str | None,
    database: BillingDatabase,
    alerts: Alerts,
    now: datetime,
    location: str = LOCATION,
) -> dg.SensorResult | dg.SkipReason:
    """Look once: show what is new and alert about it. An alert that could not be delivered is sent by a later tick."""
    retry_undelivered(instance, alerts)
    cursor: dict[str, Any] = json.loads(cursor_text) if cursor_text else {}
    try:
        with database.read() as connection:
            seen = look(connection, now, cursor, location)
    except (BillingDatabaseError, SettingsError) as error:
        # The jobs' red runs alert about it.
        return dg.SkipReason(printable(str(error)))
    cursor["shown"] = [seen.open, seen.last]
    if seen.fresh and alerts.send(quarantine_alert(seen.fresh, seen.open, alerts)):
        cursor["told"] = seen.fresh[-1].id
    if seen.verdicts is not None:
        cursor["at"] = now.isoformat()
        told = set(cursor.get("failing", ()))
        failing = {check.name: check for check in CHECKS if not seen.verdicts[check.name].passed}
        told &= set(failing)
        told |= {
            name
            for name, check in failing.items()
            if name not in told and alerts.send(check_alert(check, seen.verdicts[name], alerts))
        }
        cursor["failing"] = sorted(told)
    events = _events(seen, location)
    text = json.dumps(cursor, sort_keys=True)
    if not events:
        return dg.SensorResult(skip_reason=f"nothing new; {seen.open} open in the quarantine", cursor=text)
    return dg.SensorResult(asset_events=events, cursor=text)


@dg.sensor(
    name="money_checks_sensor",
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=_SENSOR_INTERVAL_S,
    description="Shows new quarantine entries and alerts about them. Hourly: money checks and numbers. Starts no run.",
)
def money_checks_sensor(
    context: dg.SensorEvaluationContext,
    billing_database: dg.ResourceParam[BillingDatabase],
    alerts: dg.ResourceParam[Alerts],
    clock: dg.ResourceParam[Clock],
) -> dg.SensorResult | dg.SkipReason:
    """One tick."""
    origin = context.code_location_origin
    location = LOCATION if origin is None else origin.location_name
    return tick(context.instance, context.cursor, billing_database, alerts, clock.now(), location)
