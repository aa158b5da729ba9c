"""A small subscription service for tests: its tables, its customers, its clock, and its jobs.

`Service` writes rows as the service does (naive UTC, upper-case labels), talks to the sandbox over HTTP, runs whole
jobs in process through Dagster, and compares both sides' books at the end. Time stands still unless a test moves it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import dagster as dg
import sqlalchemy as sa

from billing_orchestration.database.matching import move_watermark, read_watermark
from billing_orchestration.definitions import build_definitions
from billing_orchestration.domain.provider_payment import ProviderPayment
from billing_orchestration.jobs.matching_slice import WEBHOOK_GRACE_S
from billing_orchestration.jobs.run_report import read_result
from billing_orchestration.provider.client import PaymentProvider, Timeouts
from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration.settings import Settings, SettingsError
from billing_orchestration.threads import OF_THE_SYSTEM, Threads
from billing_orchestration_tests.books import NOON, Books


@dataclass(frozen=True)
class Run:
    """One run of a job as an operator sees it."""

    ok: bool
    run_id: str
    failure: str
    metadata: dict[str, dict[str, Any]]
    materialized: dict[str, dict[str, Any]]
    log: list[str] = field(default_factory=list)

    def number(self, op: str, name: str) -> Any:
        """A number that an op has attached."""
        return self.metadata[op][name]

    @property
    def report(self) -> dict[str, Any]:
        """The metadata of the applying op, whether it ended green or red, with the counts of its sentence."""
        found = next(
            value
            for key, value in self.metadata.items()
            if key.startswith(("apply_", "charge_", "conclude_", "resolve_")) or key == "failure"
        )
        return {**found, **(read_result(str(found["result"])) if "result" in found else {})}

    @property
    def decisions(self) -> list[dict[str, Any]]:
        """The rows of the decisions table of the applying op."""
        for name, value in self.report.items():
            if name.startswith("decisions"):
                return list(value)
        return []

    def reasons(self, subject: str) -> list[str]:
        """What the report says about one subject, as "action: reason"."""
        return [f"{row['action']}: {row['reason']}" for row in self.decisions if row["subject"] == subject]


def no_settings() -> Settings:
    """An environment in which nothing is set."""
    raise SettingsError({"BILLING_DATABASE_URL": "is not set"})


def evaluate(schedule: str, instance: dg.DagsterInstance, at: datetime) -> Any:
    """What a schedule makes of a tick. Without settings a matching job's tick cannot look first, and starts its run."""
    definitions = build_definitions(load=no_settings)
    definition = definitions.resolve_schedule_def(schedule)
    resources = {name: (definitions.resources or {})[name] for name in definition.required_resource_keys}
    with dg.build_schedule_context(instance=instance, scheduled_execution_time=at, resources=resources) as context:
        return definition(context)


NOBODY_LISTENS = "http://127.0.0.1:9/v3"


class Deaf(PaymentProvider):
    """The real client, whose charges are sent to an address where nobody listens; reads reach the provider."""

    def create_payment(self, *charge: Any, **options: Any) -> ProviderPayment:
        """Never leaves this machine."""
        with closing(PaymentProvider(shop_id="1", secret_key="1", api_url=NOBODY_LISTENS)) as nowhere:
            return nowhere.create_payment(*charge, **options)


class Service(Books):
    """The installation under test."""

    def __init__(self, engine: sa.Engine, url: str, sandbox: Sandbox, now: datetime = NOON, **settings: Any) -> None:
        super().__init__(engine, now)
        self.sandbox = sandbox
        self.provider = sandbox.provider
        self.settings = Settings(
            _env_file=None,  # type: ignore[call-arg]
            billing_database_url=url,
            yookassa_shop_id=sandbox.shop_id,
            yookassa_secret_key=sandbox.secret_key,
            yookassa_api_url=sandbox.url,
            **settings,
        )
        # Their clock stands still: what waits for the end of an unanswered charge would wait for ever.
        # In use: a run has looked a moment ago, so that none has to search for charges that our records have lost.
        self.records_are_whole = True
        self.timeouts = Timeouts(connect_s=2.0, charge_read_s=2.0, read_s=2.0, charge_done_s=0.0)
        self._instance: dg.DagsterInstance | None = None
        # A clock that runs (`utc_now`) instead of `now`, which stands still unless a test moves it.
        self.clock: Callable[[], datetime] | None = None
        # How far the other clocks are ahead of ours.
        # How far each is ahead of `now`, which is when it really is.
        self.host_ahead = self.database_ahead = self.provider_ahead = timedelta(0)
        self.is_deaf_to_charges = False
        self.set_time(now)

    # --- time

    def set_time(self, now: datetime) -> None:
        """All clocks: ours, and those that may differ from it."""
        self.now = now
        self.sandbox.clock.set(now + self.provider_ahead)
        if self.records_are_whole:
            with self.engine.begin() as connection:
                seen = read_watermark(connection, "autopayment_job", lock=True)
                if seen is None or seen < now:
                    move_watermark(connection, self.stamp("the run before", "autopayment_job"), seen, now)

    def advance(self, **delta: float) -> None:
        """All clocks go on."""
        self.set_time(self.now + timedelta(**delta))

    def skew(self, *, database: timedelta = timedelta(0), provider: timedelta = timedelta(0)) -> None:
        """From now on PostgreSQL's clock and the provider's are that far ahead of ours."""
        self.database_ahead, self.provider_ahead = database, provider
        self.set_time(self.now)

    def wrong_by(self, ahead: timedelta) -> None:
        """Our own clock is that far ahead of the others, which are right."""
        self.database_ahead = self.provider_ahead = -ahead
        self.now += ahead

    # --- customers

    def subscriber(
        self,
        plan_id: int | None = None,
        *,
        script: Any = "succeeded",
        method: str | None = None,
        **subscription: Any,
    ) -> int:
        """A customer with a subscription that ends today, paid once with a card that the provider has saved."""
        subscription_id = self.subscription(plan_id=self.monthly if plan_id is None else plan_id, **subscription)
        method = method or f"method-{subscription_id}"
        self.provider.add_method(method, script)
        self.paid_row(method, subscription_id, created_at=self.now - timedelta(days=30))
        return subscription_id

    def paid_row(self, external_id: str, subscription_id: int, **fields: Any) -> int:
        """The service's row of a payment that succeeded: from it comes the saved method."""
        return self.payment(external_id, subscription_id=subscription_id, status="SUCCEEDED", **fields)

    def paid_there(
        self, payment_id: str | None = None, *, user: str = "anna", plan_id: int | None = None, **fields: Any
    ) -> str:
        """A payment that succeeded at the provider, with the metadata that the service writes."""
        metadata = {"user_id": user, "payment_provider_id": str(self.provider_id)}
        if plan_id is not None:
            metadata["plan_id"] = str(plan_id)
        fields.setdefault("metadata", metadata)
        fields.setdefault("created_at", self.now - timedelta(minutes=20))
        fields.setdefault("amount", "299.00")
        return str(self.provider.add_payment(id=payment_id or f"paid-{next(self._numbers)}", **fields).id)

    # --- running

    def impatient(self) -> Settings:
        """The settings of a run that gives a locked row up at once: `run(job, load=service.impatient)`."""
        url = self.settings.billing_database_url
        options = "options=-c%20lock_timeout%3D150ms"
        return self.settings.model_copy(update={"billing_database_url": f"{url}{'&' if '?' in url else '?'}{options}"})

    @property
    def instance(self) -> dg.DagsterInstance:
        """The run history of this service's runs."""
        if self._instance is None:
            self._instance = dg.DagsterInstance.ephemeral()
        return self._instance

    def run(
        self,
        job: str,
        *,
        as_of: datetime | str | None = None,
        dry_run: bool | None = None,
        max_changes: int | None = None,
        approved_plan: str | None = None,
        ops: dict[str, Any] | None = None,
        shards: int | None = None,
        tags: dict[str, str] | None = None,
        partition: str | None = None,
        load: Callable[[], Settings] | None = None,
        threads: Threads = OF_THE_SYSTEM,
        instance: dg.DagsterInstance | None = None,
    ) -> Run:
        """Run a whole job through Dagster, in this process."""
        config: dict[str, Any] = {}
        if as_of is not None:
            config["as_of"] = as_of if isinstance(as_of, str) else as_of.isoformat()
        if dry_run is not None:
            config["dry_run"] = dry_run
        if max_changes is not None:
            config["max_changes"] = max_changes
        if approved_plan is not None:
            config["approved_plan"] = approved_plan
        run_config: dict[str, Any] = {"resources": {"run": {"config": config}}} if config else {}
        op_config = {name: {"config": value} for name, value in (ops or {}).items()}
        if job == "autopayment_job":
            op = "charge_renewals" if shards is None else "renew_shard"
            charging = op_config.setdefault(op, {"config": {}})["config"]
            charging.setdefault("resend_wait_s", 0.0)
        if op_config:
            run_config["ops"] = op_config
        definitions = build_definitions(
            load=load or (lambda: self.settings),
            now=self.host_now,
            database_now=self.database_now,
            steady_s=self.steady_s,
            connect=self.connect_provider,
            threads=threads,
            renewal_shards=shards,
        )
        if instance is None:
            instance = self.instance
        all_tags = {**(tags or {}), **({"dagster/partition": partition} if partition else {})}
        result = definitions.get_job_def(job).execute_in_process(
            instance=instance, run_config=run_config, raise_on_error=False, tags=all_tags
        )
        return _read(result, instance)

    def plan_renewals_only(self, **given: Any) -> Run:
        """A run of autopayment_job none of whose charges leaves the machine: the attempts stay PLANNED."""
        self.is_deaf_to_charges = True
        try:
            return self.run("autopayment_job", **given)
        finally:
            self.is_deaf_to_charges = False

    def begin(self, job: str, **given: Any) -> Callable[[], Run]:
        """Run a job in a thread; call what it gives back to wait for the run.

        The thread has a run history of its own and closes it: SQLite connections are their thread's.
        """

        def run() -> Run:
            with dg.DagsterInstance.ephemeral() as instance:
                return self.run(job, instance=instance, **given)

        threads = ThreadPoolExecutor(1)
        running = threads.submit(run)
        threads.shutdown(wait=False)
        return running.result

    def tick(self, job: str, **given: Any) -> Run:
        """Run a job as a tick of its schedule does: `as_of` is the tick's own time (now, unless given)."""
        given.setdefault("as_of", self.now)
        if job.startswith("matching_"):
            diff = f"diff_{job.removeprefix('matching_').removesuffix('_job')}"
            given.setdefault("ops", {diff: {"webhook_grace_s": WEBHOOK_GRACE_S}})
        return self.run(job, tags={"dagster/schedule_name": f"{job}_schedule"}, **given)

    def connect_provider(self, settings: Settings, now: Callable[[], datetime] | None = None) -> PaymentProvider:
        """The client, with short waits."""
        return (Deaf if self.is_deaf_to_charges else PaymentProvider)(
            shop_id=settings.yookassa_shop_id,
            secret_key=settings.yookassa_secret_key.get_secret_value(),
            api_url=settings.yookassa_api_url,
            timeouts=self.timeouts,
            read_attempts=3,
            read_backoff_s=0.01,
            now=now or self.host_now,
        )

    def _true_now(self) -> datetime:
        return self.clock() if self.clock is not None else self.now

    def host_now(self) -> datetime:
        """This machine's clock."""
        return self._true_now() + self.host_ahead

    def steady_s(self) -> float:
        """The clock that nobody sets: time passes with `now`."""
        return self._true_now().timestamp()

    def database_now(self, _: sa.Connection) -> datetime:
        """PostgreSQL's clock."""
        return self._true_now() + self.database_ahead

    # --- the books

    def attempts(self, subscription_id: int) -> list[Any]:
        """The renewal attempts of a subscription, oldest first."""
        return self.rows("renewal_attempts", "subscription_id = :id", id=subscription_id)

    def charges(self) -> list[Any]:
        """What our own calls took from customers, by the provider's ledger."""
        return self.provider.charges()

    def charged(self) -> Counter[int]:
        """How often each subscription was charged, by the provider's ledger."""
        return Counter(int(charge.metadata["subscription_id"]) for charge in self.charges())

    def quarantined(self, external_id: str) -> list[str]:
        """The kinds of problem for which a provider payment waits for a person."""
        found = self.rows("quarantine", "external_payment_id = :id AND resolved_at IS NULL", id=external_id)
        return [row.kind for row in found]

    def settled(self, external_id: str) -> list[str]:
        """How often, and as what, a provider payment was settled."""
        found = self.rows("settlements", "external_payment_id = :id", id=external_id)
        return [row.kind for row in found]

    def audit(self, run: Run) -> list[Any]:
        """The audit trail of a run, in the order it was written."""
        return self.rows("audit_trail", "run_id = :run_id", run_id=run.run_id)

    def watermark(self, job: str) -> datetime | None:
        """Until when a job has covered time."""
        found = self.rows("watermarks", "job = :job", job=job)
        return found[0].covered_until if found else None

    def check_books(self) -> None:
        """Both sides agree: one grant for each success of ours in the ledger, none without, no period charged twice."""
        charged = Counter(entry.payment_id for entry in self.charges())
        granted = Counter(row.external_payment_id for row in self.rows("settlements"))
        assert all(count == 1 for count in charged.values()), charged
        missing = set(charged) - set(granted)
        assert not missing, f"charged and not settled: {missing}"
        periods = Counter(
            (row.subscription_id, row.period_start) for row in self.rows("renewal_attempts", "state = 'SUCCEEDED'")
        )
        assert all(count == 1 for count in periods.values()), periods
        successes = {entry.payment_id for entry in self.provider.ledger() if entry.kind == "charge"}
        unpaid = {payment_id for payment_id in granted if payment_id not in successes}
        assert not unpaid, f"granted without a success: {unpaid}"


def _read(result: dg.ExecuteInProcessResult, instance: dg.DagsterInstance) -> Run:
    failure = ""
    metadata: dict[str, dict[str, Any]] = {}
    materialized: dict[str, dict[str, Any]] = {}
    for event in result.all_events:
        if event.event_type_value == "STEP_OUTPUT":
            op = event.step_key or ""
            metadata.setdefault(op, {}).update(_plain(event.step_output_data.metadata))
        elif event.event_type_value == "STEP_FAILURE":
            data = event.step_failure_data
            if data.user_failure_data:
                failure = data.user_failure_data.description
            else:
                failure = data.error.message + (data.error.cause.message if data.error.cause else "")
            if data.user_failure_data:
                metadata["failure"] = _plain(data.user_failure_data.metadata)
        elif event.event_type_value == "ASSET_MATERIALIZATION":
            materialization = event.step_materialization_data.materialization
            materialized[materialization.asset_key.path[-1]] = _plain(materialization.metadata)
    log = [record.message for record in instance.all_logs(result.run_id) if record.dagster_event is None]
    return Run(result.success, result.run_id, failure or "", metadata, materialized, log)


def _plain(metadata: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name, value in metadata.items():
        if isinstance(value, dg.TableMetadataValue):
            # A reason in lines, as the page shows it, is one sentence to a test.
            plain[name] = [
                {
                    column: cell.replace("\n", " ") if column == "reason" else cell
                    for column, cell in record.data.items()
                }
                for record in value.records
            ]
        else:
            plain[name] = value.value
    return plain
