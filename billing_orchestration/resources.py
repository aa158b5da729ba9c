"""What every run is given: its scope, the database, the provider, the clock. No rules live here.

A resource does its work when it is first used, not when the run starts: loading the definitions needs no settings, and
a run that needs no provider never connects to it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import datetime, timedelta, timezone
from functools import cached_property
from typing import TypeVar
from zoneinfo import ZoneInfo

import dagster as dg
import sqlalchemy as sa
from pydantic import Field

from billing_orchestration.alerting import Alerts
from billing_orchestration.database.conventions import session_of_shop
from billing_orchestration.database.engine import begin, create_engine, read
from billing_orchestration.database.fitness import check_reading, check_writing
from billing_orchestration.database.health import check_providers, check_schema, server_clock
from billing_orchestration.domain.billing_calendar import BillingCalendar
from billing_orchestration.domain.clocks import offset_of
from billing_orchestration.domain.receipts import ReceiptRules
from billing_orchestration.domain.renewals import PLAIN_DESCRIPTION, RenewalRules
from billing_orchestration.domain.run_scope import RunRefused, RunScope, as_of_partition, check_max_changes, parse_as_of
from billing_orchestration.provider.client import PaymentProvider, Timeouts
from billing_orchestration.settings import Settings
from billing_orchestration.threads import OF_THE_SYSTEM, Threads

_Left = TypeVar("_Left")

PARTITION_TAG = "dagster/partition"
# Dagster's partition grid shows the runs that carry it, and no others.
PARTITION_SET_TAG = "dagster/partition_set"
# On every dry run; on a backfill it asks for one.
DRY_RUN_TAG = "billing/dry_run"
SCHEDULE_TAG = "dagster/schedule_name"


def utc_now() -> datetime:
    """The real time, aware UTC."""
    return datetime.now(timezone.utc)


def uptime_s() -> float:
    """Seconds of a clock that nobody sets. Where the system has such a one, it goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Clock:
    """The time of a run, and how PostgreSQL's is asked for. All of it is a parameter in tests and simulations.

    This machine's clock is read once, when the run begins; one that nobody sets carries its time on. So whoever sets
    a clock in mid-run changes nothing of that run: what was compared with PostgreSQL's and the provider's is what the
    run decides by, to its end.
    """

    def __init__(
        self,
        now: Callable[[], datetime] = utc_now,
        database_now: Callable[[sa.Connection], datetime] = server_clock,
        steady_s: Callable[[], float] = uptime_s,
    ) -> None:
        self._began, self._began_s = now(), steady_s()
        self._steady_s = steady_s
        self.database_now = database_now

    def now(self) -> datetime:
        """Aware UTC."""
        return self._began + timedelta(seconds=self._steady_s() - self._began_s)


# How an op names the one before it: Dagster keeps the order, `hand_over` carries what they work on.
AFTER = {"before": dg.In(dg.Nothing)}


LAUNCHED_ALONE = (
    "this op was launched without the ops before it, or in another process. Launch the whole job: it is safe to repeat."
    " Nothing was read or written"
)


class HandOver:
    """What one op of a run leaves for the next, in the memory of the run's process.

    Nothing of a run's data is written to a disk (docs/decisions/0002), and a tick costs a third fewer events than with
    values that Dagster hands over itself (0006).
    """

    def __init__(self) -> None:
        self._left: dict[type, object] = {}

    def leave(self, what: object) -> None:
        """Leave something for a later op, by its type."""
        self._left[type(what)] = what

    def take(self, kind: type[_Left]) -> _Left:
        """Take what an earlier op has left. Raises RunRefused if that op did not run, or ran in another process."""
        found = self._left.get(kind)
        if not isinstance(found, kind):
            raise RunRefused(LAUNCHED_ALONE)
        return found


class RunSettings(dg.ConfigurableResource[None]):
    """The run config that all five jobs share. Every field is optional."""

    as_of: str | None = Field(
        default=None,
        description=(
            "The instant the run stands for: ISO 8601 with an offset, such as 2026-03-05T03:00:00Z, not in the future."
            " Left out: the end of the partition, or now."
        ),
    )
    dry_run: bool = Field(
        default=False,
        description="Show every decision. Write nothing, neither to the database nor to the provider.",
    )
    max_changes: int | None = Field(
        default=None,
        description=(
            "Stop before applying anything if the run would make more changes than this. Left out: no limit, except"
            " that expire_subscriptions_job stops above 20 % of all ACTIVE subscriptions (and above 100)."
        ),
    )
    approved_plan: str | None = Field(
        default=None,
        description=(
            "The hash of a plan that a dry run has shown: apply that plan and nothing else. Changes that are new since"
            " then are refused. Set as_of to the dry run's."
        ),
    )

    def scope(self, context: dg.OpExecutionContext, clock: Clock, *, whole_days: bool) -> RunScope:
        """Resolve what the run stands for, and mark its partition. Raises RunRefused before anything is read.

        `whole_days`: the job's partition is a billing day, so its `as_of` is the last instant of that day.
        """
        now = clock.now()
        check_max_changes(self.max_changes)
        scheduled = SCHEDULE_TAG in context.run.tags
        if self.as_of:
            as_of, source = parse_as_of(self.as_of.strip(), now, is_tick=scheduled), "config"
        elif context.has_partition_key:
            window = _partition_window(context)
            as_of, source = as_of_partition(window.start, window.end, now, last_instant=whole_days), "partition"
        else:
            as_of, source = now, "now"
        dry_run = self.dry_run or context.run.tags.get(DRY_RUN_TAG, "false").lower() == "true"
        _mark_partition(context, as_of, now, dry_run=dry_run)
        return RunScope(
            as_of=as_of,
            source=source,
            heals=scheduled or source == "now",
            dry_run=dry_run,
            max_changes=self.max_changes,
            run_id=context.run_id,
            approved_plan=self.approved_plan.strip() if self.approved_plan and self.approved_plan.strip() else None,
        )


def _mark_partition(context: dg.OpExecutionContext, as_of: datetime, now: datetime, *, dry_run: bool) -> None:
    """Let the grid show what was covered: a dry run marks nothing, and a launch for today marks today."""
    partitions = context.job_def.partitions_def
    if not isinstance(partitions, dg.DailyPartitionsDefinition | dg.HourlyPartitionsDefinition):
        return
    own_set = f"{context.job_name}_partition_set"
    key = context.run.tags.get(PARTITION_TAG)
    tags: dict[str, str] = {}
    if dry_run:
        tags[DRY_RUN_TAG] = "true"
        if key is not None:
            tags[PARTITION_SET_TAG] = f"{own_set} (dry runs)"
    elif key is not None:
        tags[PARTITION_SET_TAG] = own_set  # a run that repeats a dry run has that one's tags
    elif isinstance(partitions, dg.DailyPartitionsDefinition):
        zone = ZoneInfo(partitions.timezone)
        today = now.astimezone(zone).strftime(partitions.fmt)
        if as_of.astimezone(zone).strftime(partitions.fmt) == today:
            mark_covered(context, today)
    if any(context.run.tags.get(name) != value for name, value in tags.items()):
        context.instance.add_run_tags(context.run_id, tags)


def mark_covered(context: dg.OpExecutionContext, key: str) -> None:
    """Let the grid show the partition that a launch without one has covered."""
    partitions = context.job_def.partitions_def
    if PARTITION_TAG not in context.run.tags and partitions is not None and partitions.has_partition_key(key):
        tags = {PARTITION_TAG: key, PARTITION_SET_TAG: f"{context.job_name}_partition_set"}
        context.instance.add_run_tags(context.run_id, tags)


def _partition_window(context: dg.OpExecutionContext) -> dg.TimeWindow:
    """The stretch of time of the run's partition. Raises RunRefused for a tag that is none of the job's keys."""
    key = context.run.tags.get(PARTITION_TAG)
    partitions = context.job_def.partitions_def
    try:
        window = context.partition_time_window
        # Dagster takes "2026-03-05-10:00" for a day ten hours west of UTC, and 10:30 for the hour after it.
        if isinstance(partitions, dg.TimeWindowPartitionsDefinition) and window.start.strftime(partitions.fmt) != key:
            raise ValueError(f"keys look like {window.start.strftime(partitions.fmt)}")
    except Exception as error:
        raise RunRefused(
            f"the partition {key!r} is not one of this job's keys: {error}. Nothing was read or written"
        ) from error
    return window


def receipt_rules(settings: Settings) -> ReceiptRules | None:
    """What each charge's receipt is made by. None: charges carry none."""
    if settings.receipts == "off" or settings.receipt_vat_code is None or settings.receipt_payment_mode is None:
        return None
    return ReceiptRules(
        vat_code=settings.receipt_vat_code,
        payment_mode=settings.receipt_payment_mode,
        payment_subject=settings.receipt_payment_subject,
        measure=settings.receipt_measure,
        tax_system_code=settings.receipt_tax_system_code,
        fallback_email=settings.receipt_fallback_email,
        item=settings.receipt_item,
    )


def rules_of(settings: Settings, calendar: BillingCalendar, max_overdue_days: int) -> RenewalRules:
    """What decides about renewals, and what their charges say."""
    return RenewalRules(
        calendar,
        settings.subscription_grace_days,
        max_overdue_days,
        settings.yookassa_shop_id,
        receipt_rules(settings),
        settings.charge_description or (PLAIN_DESCRIPTION if settings.billing_language == "en" else _IN_RUSSIAN),
        settings.yookassa_gateway_id,
    )


_IN_RUSSIAN = "Подписка «{plan}»: продление с {period_start}"


class BillingDatabase:
    """The service's database with our schema in it: checked and connected on first use, pooled, closed with the run."""

    def __init__(self, load_settings: Callable[[], Settings]) -> None:
        self._load_settings = load_settings
        self._can_write = False

    @cached_property
    def settings(self) -> Settings:
        """All settings, checked as a whole. Raises SettingsError, one line."""
        return self._load_settings()

    @cached_property
    def calendar(self) -> BillingCalendar:
        """Billing days and periods in the billing time zone."""
        return BillingCalendar(self.settings.billing_timezone)

    @cached_property
    def engine(self) -> sa.Engine:
        """The engine, after a look at the schema. Raises a BillingDatabaseError that names the way out."""
        engine = create_engine(
            self.settings.billing_database_url, session=session_of_shop(self.settings.yookassa_provider_ids)
        )
        try:
            with read(engine) as connection:
                check_schema(connection)
                check_reading(connection)
                check_providers(connection)
        except BaseException:
            engine.dispose()
            raise
        return engine

    def begin(self) -> AbstractContextManager[sa.Connection]:
        """A connection with one transaction: committed at the end, rolled back by an error."""
        self.check_writing()
        return begin(self.engine)

    def check_writing(self) -> None:
        """Look once, before the first change, whether all that these jobs write can be written. Raises Unfit."""
        if not self._can_write:
            with self.read() as connection:
                check_writing(connection)
            self._can_write = True

    def read(self) -> AbstractContextManager[sa.Connection]:
        """A connection to read with: its transaction is rolled back at the end."""
        return read(self.engine)

    def clock_offset(self, clock: Clock) -> timedelta:
        """How far PostgreSQL's clock is ahead of this machine's."""
        with self.read() as connection:
            began_s = time.monotonic()
            told = clock.database_now(connection)
            return offset_of(told, clock.now(), timedelta(seconds=time.monotonic() - began_s))

    def close(self) -> None:
        """Close the pooled connections."""
        engine = self.__dict__.pop("engine", None)
        if engine is not None:
            engine.dispose()


# A client for the shop of some settings, by the clock of a run.
Connect = Callable[[Settings, Callable[[], datetime]], PaymentProvider]


class ProviderConnection:
    """The payment provider. Connected on first use, pooled, closed with the run."""

    def __init__(self, load_settings: Callable[[], Settings], connect: Connect, now: Callable[[], datetime]) -> None:
        self._load_settings = load_settings
        self._connect = connect
        self._now = now

    @cached_property
    def client(self) -> PaymentProvider:
        """The provider's client. Raises SettingsError, one line."""
        return self._connect(self._load_settings(), self._now)

    def close(self) -> None:
        """Close the pooled connections."""
        client = self.__dict__.pop("client", None)
        if client is not None:
            client.close()


def connect_provider(
    settings: Settings, now: Callable[[], datetime] = utc_now, threads: Threads = OF_THE_SYSTEM
) -> PaymentProvider:
    """The client for the shop of these settings. `now`: what the provider's clock is compared with."""
    return PaymentProvider(
        shop_id=settings.yookassa_shop_id,
        secret_key=settings.yookassa_secret_key.get_secret_value(),
        api_url=settings.yookassa_api_url,
        timeouts=Timeouts(charge_done_s=settings.yookassa_charge_done_s),
        threads=threads,
        now=now,
    )


@dg.resource(description="What the ops of a run hand over to each other, in memory.")
def hand_over_resource() -> HandOver:
    """The resource `hand_over`: one per run."""
    return HandOver()


def alerts_resource(load_settings: Callable[[], Settings]) -> dg.ResourceDefinition:
    """The resource `alerts`."""

    @dg.resource(description="The people who are alerted when something is wrong (ALERT_URLS).")
    def alerts() -> Alerts:
        return Alerts(load_settings)

    return alerts


def billing_database_resource(load_settings: Callable[[], Settings]) -> dg.ResourceDefinition:
    """The resource `billing_database`."""

    @dg.resource(description="The billing service's PostgreSQL database (BILLING_DATABASE_URL).")
    def billing_database() -> Iterator[BillingDatabase]:
        database = BillingDatabase(load_settings)
        try:
            yield database
        finally:
            database.close()

    return billing_database


def clock_resource(
    now: Callable[[], datetime],
    database_now: Callable[[sa.Connection], datetime],
    steady_s: Callable[[], float],
) -> dg.ResourceDefinition:
    """The resource `clock`: one per run."""

    @dg.resource(description="The time of the run.")
    def clock() -> Clock:
        return Clock(now, database_now, steady_s)

    return clock


def payment_provider_resource(load_settings: Callable[[], Settings], connect: Connect) -> dg.ResourceDefinition:
    """The resource `payment_provider`."""

    @dg.resource(
        required_resource_keys={"clock"},
        description="The payment provider over HTTP (YOOKASSA_API_URL, YOOKASSA_SHOP_ID).",
    )
    def payment_provider(context: dg.InitResourceContext) -> Iterator[ProviderConnection]:
        provider = ProviderConnection(load_settings, connect, context.resources.clock.now)
        try:
            yield provider
        finally:
            provider.close()

    return payment_provider
