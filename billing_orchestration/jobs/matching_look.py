"""A tick of a matching job that finds nothing starts no run: its schedule looks first, and writes nothing.

A look compares what a run would compare: the provider's successes of the last hour and the database's rows, by the same
statements and the same diff. Where nothing differs the tick is skipped, and says what was compared. Everything else
starts the run as ever: a difference, a list longer than a page, an answer that is odd or late, clocks that differ, and
an hour that no run has covered for `COVERED_EVERY`. So a look can only ever save a run, never decide about money.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import dagster as dg
import sqlalchemy as sa

from billing_orchestration.alerting import beat
from billing_orchestration.database.audit import before_a_person, known_problems
from billing_orchestration.database.errors import BillingDatabaseError
from billing_orchestration.database.matching import fetch_settled, read_watermark
from billing_orchestration.domain.matching import MatchingDiff
from billing_orchestration.domain.provider_payment import ProviderPayment
from billing_orchestration.domain.run_scope import RunScope, Window, covering_window, why_cover
from billing_orchestration.jobs.clocks import look_at_clocks
from billing_orchestration.jobs.matching_slice import WEBHOOK_GRACE_S
from billing_orchestration.jobs.partitions import hour_key
from billing_orchestration.jobs.schedules import Tick
from billing_orchestration.jobs.settling import receipt_problems, unusable_problems
from billing_orchestration.provider.client import Slice
from billing_orchestration.provider.errors import ProviderError
from billing_orchestration.resources import BillingDatabase, Clock, ProviderConnection
from billing_orchestration.settings import Settings, SettingsError

# Ordinary looks take a fifth of a second. The daemon evaluates one schedule after another, so it is not kept waiting.
LONGEST_LOOK_S = 10.0
_SLOW = "slow"
# Of the code server: a deployment's run history keeps no log lines of ticks.
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compared:
    """Both slices of a look: what differs, and what was compared, in words."""

    diff: MatchingDiff
    words: str


# Reads the database's slice of a window and compares it with the provider's, as of the provider's own time.
Compare = Callable[[sa.Connection, Sequence[ProviderPayment], Window, datetime, Settings], Compared]


@dataclass(frozen=True)
class Nothing:
    """Nothing differs; `words` tell what was compared."""

    words: str


@dataclass(frozen=True)
class Start:
    """A run has to start. `oddity`: the look could not answer for it, by a word to know it by; an operator is told."""

    why: str
    oddity: str | None = None


def look(
    job: str, compare: Compare, database: BillingDatabase, provider: ProviderConnection, clock: Clock, tick: datetime
) -> Nothing | Start:
    """Compare both sides of the hour before a tick. It writes nothing, neither here nor there.

    Raises the errors of the settings, the database and the provider.
    """
    settings = database.settings
    if settings.matching_look_first == "off":
        return Start("MATCHING_LOOK_FIRST is off")
    now = clock.now()
    with database.read() as connection:
        _read_only(connection)
        watermark = read_watermark(connection, job)
    if (why := why_cover(watermark, tick, now)) is not None:
        return Start(why)
    # A tick comes from another machine, whose clock may be a little ahead.
    end = min(tick, now)
    scope = RunScope(end, "tick", heals=True, dry_run=True, max_changes=None, run_id="")
    window = covering_window(scope, watermark, now)
    paid = provider.client.lists.succeeded_on_one_page(window.start, window.end)
    if paid is None:
        return Start("the provider's list of the hour is longer than a page")
    clocks = look_at_clocks(database, clock, provider)
    if not clocks.agree:
        return Start(str(clocks), oddity="clocks")
    with database.read() as connection:
        _read_only(connection)
        compared = compare(connection, paid.payments, window, clocks.at_provider(clock.now()), settings)
        waiting = before_a_person(connection, [payment.id for payment in compared.diff.to_settle])
        if differing := len(compared.diff.to_settle) - len(waiting):
            return Start(f"to settle: {differing}; {compared.words}")
        if fresh := _new_problems(connection, paid):
            return Start(f"for a person: {fresh}; {compared.words}")
    return Nothing(_told(compared, len(waiting)))


def _read_only(connection: sa.Connection) -> None:
    """For the transaction that begins: the database itself refuses a write, and ends what takes too long."""
    connection.exec_driver_sql("SET TRANSACTION READ ONLY")
    connection.exec_driver_sql(f"SET LOCAL statement_timeout = '{LONGEST_LOOK_S:.0f}s'")


def _new_problems(connection: sa.Connection, paid: Slice) -> int:
    """How many problems of the provider's slice a run would put before a person."""
    settled = fetch_settled(connection, [payment.id for payment in paid.payments if payment.lacks_receipt])
    problems = [*unusable_problems(paid.unusable), *receipt_problems(paid.payments, settled)]
    keys = {problem.key for problem in problems}
    return len(keys - known_problems(connection, sorted(keys))) if keys else 0


def _told(compared: Compared, waiting: int) -> str:
    more = {
        "left to the webhook": len(compared.diff.left),
        "of other sellers": compared.diff.foreign,
        "before a person": waiting,
    }
    return ", ".join([compared.words, *(f"{count} {what}" for what, count in more.items() if count)])


class Looker:
    """The looks of one schedule in the code server: bounded, one at a time, and an odd one is told once."""

    def __init__(self, longest_s: float = LONGEST_LOOK_S) -> None:
        self._longest_s = longest_s
        self._under_way: Future[Nothing | Start] | None = None
        self._told: str | None = None

    def look(self, do: Callable[[], Nothing | Start], close: Callable[[], None]) -> Nothing | Start:
        """Call `do` in a thread, then `close`; never wait longer than the bound, never raise."""
        if self._under_way is not None and not self._under_way.done():
            return Start("the look of an earlier tick has not ended yet", oddity=_SLOW)
        future: Future[Nothing | Start] = Future()
        self._under_way = future

        def work() -> None:
            try:
                try:
                    found: Nothing | Start = do()
                finally:
                    # Its own: whoever gave up waiting has closed them before, and they connect again when used.
                    close()
            except (SettingsError, BillingDatabaseError, ProviderError) as error:
                found = Start(f"the look failed: {error}", type(error).__name__)
            except Exception as error:  # noqa: BLE001 - whatever it is, a run starts and shows it
                found = Start(f"the look failed: {type(error).__name__}", type(error).__name__)
            future.set_result(found)

        # A daemon's: name resolution may hang for minutes, and must not keep the code server from ending.
        threading.Thread(target=work, name="look", daemon=True).start()
        try:
            return future.result(self._longest_s)
        except NotInTime:
            return Start(f"the look took longer than {self._longest_s:g} s", oddity=_SLOW)

    def news(self, found: Nothing | Start) -> str | None:
        """What an operator has to be told: that a look is odd, once until one is in order again, or odd otherwise."""
        oddity = found.oddity if isinstance(found, Start) else None
        before, self._told = self._told, oddity
        return found.why.rstrip(".") if isinstance(found, Start) and oddity not in (None, before) else None


def matching_schedule(job: dg.JobDefinition, *, name: str, diff_op: str, compare: Compare) -> dg.ScheduleDefinition:
    """The schedule of a matching job: every two minutes, and a run only where the look finds something to do.

    Missed ticks are not made up for: the next one covers what they would have.
    """
    ticks = Tick(job.name, name, hour_key, {diff_op: {"webhook_grace_s": WEBHOOK_GRACE_S}})
    looker = Looker()

    @dg.schedule(
        job_name=job.name,
        name=name,
        cron_schedule="*/2 * * * *",
        execution_timezone="UTC",
        # As with every schedule: `billing-orchestration start` switches it on.
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description="Every two minutes. Starts a run where both sides differ, and at least one an hour. After an"
        " outage, one run covers all of it, up to seven days.",
    )
    def schedule(
        context: dg.ScheduleEvaluationContext,
        billing_database: dg.ResourceParam[BillingDatabase],
        payment_provider: dg.ResourceParam[ProviderConnection],
        clock: dg.ResourceParam[Clock],
    ) -> dg.RunRequest | dg.SkipReason:
        tick = context.scheduled_execution_time
        unfinished = ticks.unfinished(context)
        if (skipped := ticks.skipped(unfinished, tick)) is not None:
            return skipped
        if unfinished:
            # Created and not launched: unless it is asked for again, it stays unfinished, and every later tick waits.
            return ticks.request(tick)

        def close() -> None:
            billing_database.close()
            payment_provider.close()

        found = looker.look(lambda: look(job.name, compare, billing_database, payment_provider, clock, tick), close)
        if (told := looker.news(found)) is not None:
            _log.warning("%s: %s. Each tick starts its run until this is over", name, told)
        if isinstance(found, Start):
            return ticks.request(tick)
        _beat(billing_database)
        return dg.SkipReason(found.words)

    return schedule


def _beat(database: BillingDatabase) -> None:
    """A look that found nothing, within an hour that a run has covered, is as good a sign of life as that run."""
    heartbeat: Any = database.settings.heartbeat_url
    if heartbeat is not None and not beat(heartbeat.get_secret_value()):
        _log.warning("HEARTBEAT_URL did not take the heartbeat of this tick; nothing else is wrong")
