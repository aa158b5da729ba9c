"""What an operator finds on coming in: the deployment, an hour after its daemon stopped, with work waiting.

The billing time zone is one in which it is between three and four in the morning, so that the daily tick of 03:00 is
among those that were missed. The provider answers its lists slowly until a test lets it (`Sandbox.behave`), so that
the first matching runs are still at work when the next tick comes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import dagster as dg
import sqlalchemy as sa

from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.browser.deployment import ROOT, Deployment, deployed, wait_for
from billing_orchestration_tests.fixtures.receiver import Receiver
from billing_orchestration_tests.jobs.service import Service

UTC = timezone.utc
OUTAGE = timedelta(minutes=65)
# The grids begin a few days ago: wide enough for the tests, narrow enough to select by mouse.
GRID_DAYS = 4
# Pages of 100, read twice (created, captured), each after this delay (below the client's patience): four minutes, in
# which a tick comes, and enough for whatever is to be seen while a run is at work.
SLOW_PAYMENTS = 1200
SLOW_PAGE_S = 10.0
MATCHING = ("matching_pending_payments_job", "matching_successful_payments_job")
SCHEDULES = 9


@dataclass
class Desk:
    """The deployment with its customers. `came`: the scene was set; `began`: the daemon's start after the outage."""

    deployment: Deployment
    service: Service
    zone: ZoneInfo
    came: datetime
    began: datetime
    receiver: Receiver
    subscriptions: dict[str, int] = field(default_factory=dict)

    @property
    def today(self) -> date:
        """The billing day."""
        return self.came.astimezone(self.zone).date()

    def day(self, days_ago: int) -> str:
        """The key of a day's partition."""
        return (self.today - timedelta(days=days_ago)).isoformat()

    def hour(self, hours_ago: int) -> datetime:
        """The beginning of an hour, counted back from the one in which the scene was set."""
        return self.came.replace(minute=0, second=0, microsecond=0) - timedelta(hours=hours_ago)

    def customer(self, name: str, *, days_ago: float = 0, script: object = "succeeded") -> int:
        """A customer with a saved card, whose subscription ended so long ago (0: it ends today)."""
        now = datetime.now(UTC)
        ended_at = now - timedelta(days=days_ago)
        self.subscriptions[name] = self.service.subscriber(
            self.plan, ended_at=ended_at, user=name, method=f"card-of-{name}", script=script
        )
        return self.subscriptions[name]

    @property
    def plan(self) -> int:
        """The plan that everybody is on."""
        return int(self.service.rows("plans")[0].id)

    def charges_of(self, name: str) -> int:
        """How often the provider took money from a customer, by its own books."""
        card = f"card-of-{name}"
        return sum(entry.payment_method_id == card for entry in self.service.charges())

    def materialized(self, asset: str) -> bool:
        """Whether an asset of ours has a point."""
        key = dg.AssetKey(["billing", asset])
        return self.deployment.instance.get_latest_materialization_event(key) is not None

    def schedule_status(self, name: str) -> str:
        """RUNNING or STOPPED, as the UI has left it."""
        states = [state for state in self.deployment.instance.all_instigator_state() if state.instigator_name == name]
        return "STOPPED" if states[0].status.value == "STOPPED" else "RUNNING"

    def finished(self, job: str, **tags: str) -> list[dg.RunRecord]:
        """The runs of a job that came to an end, latest first."""
        return [record for record in self.deployment.runs(job, **tags) if record.dagster_run.is_finished]


@contextmanager
def open_desk(
    folder: Path, engine: sa.Engine, billing_url: str, run_history_url: str, sandbox: Sandbox, receiver: Receiver
) -> Iterator[Desk]:
    """Set the scene and start everything."""
    now = datetime.now(UTC)
    zone = _zone_where_it_is_three(now)
    service = Service(engine, billing_url, sandbox, now=now)
    sandbox.clock.run()
    settings = {
        "BILLING_DATABASE_URL": billing_url,
        "YOOKASSA_SHOP_ID": sandbox.shop_id,
        "YOOKASSA_SECRET_KEY": sandbox.secret_key,
        "YOOKASSA_API_URL": sandbox.url,
        "BILLING_TIMEZONE": zone.key,
        "BILLING_FIRST_DAY": (now.astimezone(zone).date() - timedelta(days=GRID_DAYS)).isoformat(),
        "DAGSTER_POSTGRES_URL": run_history_url,
        "ALERT_URLS": receiver.url,
    }
    with deployed(folder, settings) as deployment:
        deployment.env["DAGSTER_UI_URL"] = deployment.address
        desk = Desk(deployment, service, zone, now, now, receiver)
        deployment.start_code_server()
        deployment.command("start", "--without-doctor", "-w", str(ROOT / "workspace.grpc.yaml"))
        deployment.start_webserver()
        _outage(deployment)
        # Not before: a sensor that begins a look and is cut off would alert about what it found twice.
        _work_that_waits(desk)
        sandbox.misbehave("list", "none", delay_s=SLOW_PAGE_S, times=None)
        desk.began = datetime.now(UTC)
        deployment.start_daemon()
        yield desk


def _zone_where_it_is_three(now: datetime) -> ZoneInfo:
    """A zone whose clocks show 03:xx. The sign is the other way round in these names."""
    ahead = (3 - now.hour) % 24
    ahead = ahead - 24 if ahead > 14 else ahead
    return ZoneInfo(f"Etc/GMT{-ahead:+d}" if ahead else "Etc/GMT")


def _work_that_waits(desk: Desk) -> None:
    service, now = desk.service, desk.came
    service.plan()
    desk.customer("anna")
    desk.customer("poor", script="canceled:insufficient_funds")
    # Paid in an hour that nobody ever covered, and paid during the outage: older than the last hour, both.
    for hours_ago in (12, 11, 10):
        paid_at = desk.hour(hours_ago) + timedelta(minutes=20)
        service.paid_there(f"lost-{hours_ago}", user=f"lost-{hours_ago}", plan_id=desk.plan, created_at=paid_at)
    service.paid_there(
        "in-the-outage", user="patient", plan_id=desk.plan, created_at=now - timedelta(hours=2, minutes=30)
    )
    # Found odd by a run of the days before: they wait in the quarantine.
    before = now - timedelta(hours=30, minutes=10)
    service.paid_there("odd", metadata={"user_id": "odette"}, created_at=before)
    service.paid_there("strange", metadata={"user_id": "stranger"}, created_at=before)
    service.paid_there("cheap", user="wanda", plan_id=desk.plan, amount="250.00", created_at=before)
    _granted_unpaid(desk)
    assert service.run(MATCHING[1], as_of=now - timedelta(hours=30)).ok
    for job in MATCHING:
        service.execute(
            "INSERT INTO billing_orchestration.watermarks (job, covered_until, run_id, updated_at)"
            " VALUES (:job, :until, 'before the outage', :until)",
            job=job,
            until=now - timedelta(hours=3),
        )
    # Both sides agree on these: they only make the provider's list long.
    paid_at = now - timedelta(minutes=20)
    for number in range(SLOW_PAYMENTS):
        service.paid_there(f"agreed-{number}", user=f"agreed-{number}", plan_id=desk.plan, created_at=paid_at)
    service.execute(
        "INSERT INTO payments (payment_provider_id, status, currency, amount, external_payment_id, created_at,"
        " updated_at) SELECT :provider, 'SUCCEEDED', 'RUB', 299.00, 'agreed-' || number, :at, :at"
        f" FROM generate_series(0, {SLOW_PAYMENTS - 1}) AS number",
        provider=service.provider_id,
        at=paid_at.replace(tzinfo=None),
    )


def _granted_unpaid(desk: Desk) -> None:
    """Our books of the third day before say paid, and the provider took no money: only reconciliation sees that."""
    at = desk.came - timedelta(hours=60)
    nadia = desk.service.subscription("nadia", ended_at=desk.came + timedelta(days=20), plan_id=desk.plan)
    desk.service.payment("never-paid", subscription_id=nadia, status="SUCCEEDED", created_at=at)
    desk.service.paid_there("never-paid", user="nadia", plan_id=desk.plan, status="canceled", created_at=at)


def _outage(deployment: Deployment) -> None:
    """Leave the run history as a daemon leaves it that stopped an hour ago: schedules and sensors on, no tick since."""
    deployment.start_daemon()
    instance = deployment.instance
    wait_for(lambda: _knows_all_schedules(instance), "the daemon to know all schedules")
    deployment.stop("daemon")
    before = (datetime.now(UTC) - OUTAGE).timestamp()
    for state in instance.all_instigator_state():
        data: Any = state.instigator_data
        if hasattr(data, "cron_schedule"):
            data = type(data)(cron_schedule=data.cron_schedule, start_timestamp=before)
        else:
            # Its first tick may have been cut off: without this the next would come after its whole interval.
            data = data._replace(last_tick_start_timestamp=before, last_tick_timestamp=before)
        instance.update_instigator_state(state.with_data(data))
        # Had a tick come in these seconds, the outage would be none.
        instance.purge_ticks(state.instigator_origin_id, state.selector_id, before=time.time() + 1)
    for record in instance.get_run_records():
        instance.delete_run(record.dagster_run.run_id)


def _knows_all_schedules(instance: dg.DagsterInstance) -> bool:
    states = instance.all_instigator_state()
    return sum(hasattr(state.instigator_data, "cron_schedule") for state in states) == SCHEDULES
