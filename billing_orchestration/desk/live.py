"""`doctor --live`: does the deployment work at this moment? Told from outside, for cron, Nagios and probes.

Every alarm of the deployment lives in its daemon, so somebody has to ask from elsewhere whether that one is alive. It
needs the run history, and the billing database for the watermarks; it changes nothing in either.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone

import dagster as dg
import sqlalchemy as sa
from dagster._core.scheduler.instigation import InstigatorState, ScheduleInstigatorData, TickStatus

from billing_orchestration.database.engine import create_engine, read
from billing_orchestration.database.errors import BillingDatabaseError
from billing_orchestration.database.matching import read_watermark
from billing_orchestration.desk.doctor import Finding, Level, fault, ok, warning
from billing_orchestration.desk.switching import ORDER, states_of
from billing_orchestration.settings import SettingsError, load_database_url

# What Nagios takes for CRITICAL.
NOT_LIVE = 2
_DAEMON_LIMIT = timedelta(minutes=2)
# The parts of the daemon without which no tick comes, no run starts, and none that hangs is ended.
_DAEMONS = ("SCHEDULER", "SENSOR", "QUEUED_RUN_COORDINATOR", "MONITORING")
# A tick every two minutes, and one a day (a day has up to 25 hours).
_TICK_LIMIT = timedelta(minutes=10)
_DAILY_TICK_LIMIT = timedelta(hours=26)
# As the money check `matching_keeps_up` has it.
_COVERED_LIMIT = timedelta(hours=1)
# A run that charges writes a line every 10 s; no op works longer than this without one.
_PROGRESS_LIMIT = timedelta(minutes=15)
_UNDER_WAY = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]


def look(now: datetime, *, daemon_only: bool = False) -> list[Finding]:
    """All that can be said from here, the run history first. It never raises for what is only down.

    `daemon_only`: what a restart of the daemon would mend, as its liveness probe asks.
    """
    history = list(_history(now, daemon_only=daemon_only))
    return history if daemon_only else [*history, *_billing_database(now)]


def is_live(findings: Sequence[Finding]) -> bool:
    """Whether nothing of it is a fault."""
    return all(finding.level is not Level.FAULT for finding in findings)


def as_line(findings: Sequence[Finding]) -> str:
    """One line: the faults, else all that was looked at."""
    live = is_live(findings)
    told = [found.text for found in findings if live or found.level is Level.FAULT]
    return f"{'OK' if live else 'CRITICAL'}: {'; '.join(told)}"


def as_json(findings: Sequence[Finding]) -> str:
    """The same for programs."""
    return json.dumps({"live": is_live(findings), "findings": [found.fields for found in findings]})


def _history(now: datetime, *, daemon_only: bool) -> Iterator[Finding]:
    if not os.environ.get("DAGSTER_HOME"):
        yield fault("run_history.unknown", "DAGSTER_HOME is not set: run this with the deployment's environment")
        return
    try:
        with dg.DagsterInstance.get() as instance:
            yield look_at_daemon(instance, now)
            if not daemon_only:
                yield from look_at_schedules(instance, now)
                yield from look_at_runs(instance, now)
    except Exception as error:  # noqa: BLE001  # the driver's own words may repeat the address
        yield fault("run_history.unreachable", f"the run history cannot be read ({type(error).__name__})")


def _billing_database(now: datetime) -> Iterator[Finding]:
    try:
        engine = create_engine(load_database_url(), application_name="billing-orchestration doctor")
    except SettingsError:
        yield warning("watermarks.not_looked_at", "no billing database here: watermarks not looked at")
        return
    try:
        with read(engine) as connection:
            yield from look_at_watermarks(connection, now)
    except BillingDatabaseError as error:
        yield fault("watermarks.unreachable", str(error))
    finally:
        engine.dispose()


def look_at_schedules(instance: dg.DagsterInstance, now: datetime) -> Iterator[Finding]:
    """The last tick of each schedule."""
    for job in ORDER:
        states = [state for state in states_of(instance, [job]) if state.is_running]
        yield from (_tick(instance, job, state, now) for state in states)
        if not states:
            yield warning(f"{job}.off", f"{job}: schedule off")


def look_at_daemon(instance: dg.DagsterInstance, now: datetime) -> Finding:
    """Whether each of its parts was heard within two minutes."""
    beats = instance.get_daemon_heartbeats()
    needed = [name for name in _DAEMONS if name in instance.get_required_daemon_types()]
    ages = {name: now - _at(beats[name].timestamp) if name in beats else None for name in needed}
    if all(age is None for age in ages.values()):
        return fault("daemon.never", "no daemon has ever run here")
    late = {name: age for name, age in ages.items() if age is None or age > _DAEMON_LIMIT}
    if late:
        name, age = max(late.items(), key=lambda item: item[1] or timedelta.max)
        return fault("daemon.dead", f"the daemon is dead: {name} was last heard {_since(age)}")
    return ok("daemon", f"daemon heard {_since(max(age for age in ages.values() if age is not None))}")


def _tick(instance: dg.DagsterInstance, job: str, state: InstigatorState, now: datetime) -> Finding:
    data = state.instigator_data
    started = data.start_timestamp if isinstance(data, ScheduleInstigatorData) else None
    ticks = instance.get_ticks(state.instigator_origin_id, state.selector_id, limit=1)
    limit = _DAILY_TICK_LIMIT if "daily" in state.instigator_name else _TICK_LIMIT
    last = _at(ticks[0].timestamp) if ticks else None
    if ticks and ticks[0].status is TickStatus.FAILURE:
        return fault(f"{job}.tick_failed", f"{job}: the last tick failed {_since(now - _at(ticks[0].timestamp))}")
    # Neither a tick nor a start within its time. One that was switched on by a default has no start.
    since = max(instant for instant in (last, _at(started or 0.0)) if instant is not None)
    if now - since > limit:
        return fault(f"{job}.no_tick", f"{job}: last tick {_since(None if last is None else now - last)}")
    return ok(job, f"{job}: {'no tick yet' if last is None else f'tick {_since(now - last)}'}")


def look_at_runs(instance: dg.DagsterInstance, now: datetime) -> Iterator[Finding]:
    """Whether each run under way has said something lately."""
    records = instance.get_run_records(dg.RunsFilter(statuses=_UNDER_WAY))
    stuck = 0
    for record in records:
        run = record.dagster_run
        events = instance.get_records_for_run(run.run_id, limit=1, ascending=False).records
        age = now - _at(events[0].timestamp if events else record.update_timestamp.timestamp())
        if age > _PROGRESS_LIMIT:
            stuck += 1
            yield fault("runs.stuck", f"{run.job_name}: run {run.run_id[:8]} is stuck, last event {_since(age)}")
    if not stuck:
        yield ok("runs", f"{len(records)} runs under way")


def look_at_watermarks(connection: sa.Connection, now: datetime) -> Iterator[Finding]:
    """How far both matching jobs have covered time."""
    for job in [job for job in ORDER if job.startswith("matching_")]:
        covered = read_watermark(connection, job)
        if covered is None:
            yield warning(f"{job}.not_covered", f"{job}: nothing covered yet")
        elif now - covered > _COVERED_LIMIT:
            yield fault(f"{job}.behind", f"{job}: behind, covered until {_since(now - covered)}")
        else:
            yield ok(f"{job}.covered", f"{job}: covered until {_since(now - covered)}")


def _at(timestamp: float) -> datetime:
    return datetime.fromtimestamp(timestamp, timezone.utc)


def _since(age: timedelta | None) -> str:
    """As in "last tick 3 h ago"."""
    if age is None:
        return "never"
    seconds = max(0, int(age.total_seconds()))
    if seconds < 120:
        return f"{seconds} s ago"
    return f"{seconds // 60} min ago" if seconds < 7200 else f"{seconds // 3600} h ago"
