"""matching_successful_payments_job: paid at the provider, not in the books: payment and subscription are created.

Every two minutes a tick looks whether there is something to do (`matching_look`). A run reads the provider's successes
of the last hour (created or captured), then the database *by those ids*, whatever a row's status or age: a window on
the database's side would invent orphans at its edge.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import dagster as dg
import sqlalchemy as sa

from billing_orchestration.database.matching import fetch_rows, fetch_settled
from billing_orchestration.domain.matching import by_provider_id, diff_successful
from billing_orchestration.domain.provider_payment import WEBHOOK_GRACE, ProviderPayment
from billing_orchestration.domain.run_scope import Window
from billing_orchestration.domain.settlement_decisions import PaymentRow
from billing_orchestration.jobs.matching_look import Compared, matching_schedule
from billing_orchestration.jobs.matching_slice import (
    MatchingDiffConfig,
    MatchingPlan,
    PaidSlice,
    PaidSliceConfig,
    apply_matching,
    fetch_paid,
    plan_matching,
)
from billing_orchestration.jobs.partitions import HOURLY
from billing_orchestration.jobs.run_report import Told, told_plainly
from billing_orchestration.jobs.schedules import singleton_tags
from billing_orchestration.resources import AFTER, BillingDatabase, Clock, HandOver, ProviderConnection, RunSettings
from billing_orchestration.settings import Settings

JOB = "matching_successful_payments_job"
# A tick takes seconds, one that catches up seven days minutes. A run that takes longer than this hangs.
MAX_RUNTIME_S = 1800


@dataclass(frozen=True)
class SuccessfulMatch:
    """Both slices of one run."""

    paid: PaidSlice
    rows: tuple[PaymentRow, ...]
    settled: frozenset[str]
    leaves_foreign: bool


@dg.op(description="Read the provider's succeeded payments of the window, created or captured in it, to the last page.")
def fetch_paid_for_successful(
    context: dg.OpExecutionContext,
    config: PaidSliceConfig,
    run: RunSettings,
    billing_database: dg.ResourceParam[BillingDatabase],
    payment_provider: dg.ResourceParam[ProviderConnection],
    clock: dg.ResourceParam[Clock],
    hand_over: dg.ResourceParam[HandOver],
) -> None:
    """The provider's slice, read before the database."""
    with told_plainly():
        paid = fetch_paid(context, JOB, run, billing_database, payment_provider, clock, config)
        hand_over.leave(paid)


@dg.op(
    description="Look the same payments up in the database by the provider's ids, whatever their status or age.",
    ins=AFTER,
)
def fetch_known_payments(
    context: dg.OpExecutionContext,
    billing_database: dg.ResourceParam[BillingDatabase],
    hand_over: dg.ResourceParam[HandOver],
) -> None:
    """The database's slice."""
    with told_plainly():
        paid = hand_over.take(PaidSlice)
    ids = [payment.id for payment in paid.slice.payments]
    with told_plainly(), billing_database.read() as connection:
        rows = tuple(fetch_rows(connection, ids))
        settled = frozenset(fetch_settled(connection, ids))
    context.add_output_metadata(
        {"payment rows": dg.MetadataValue.int(len(rows)), "settled by these jobs": dg.MetadataValue.int(len(settled))}
    )
    hand_over.leave(
        SuccessfulMatch(paid, rows, settled, leaves_foreign=billing_database.settings.foreign_payments == "ignore")
    )


@dg.op(
    description="Compare: succeeded there, and no row here or one that is not SUCCEEDED, is to be settled.", ins=AFTER
)
def diff_successful_payments(
    context: dg.OpExecutionContext,
    config: MatchingDiffConfig,
    clock: dg.ResourceParam[Clock],
    hand_over: dg.ResourceParam[HandOver],
) -> None:
    """The diff of two complete slices."""
    with told_plainly():
        match = hand_over.take(SuccessfulMatch)
    rows = by_provider_id(match.rows)
    diff = diff_successful(
        match.paid.slice.payments,
        rows,
        match.settled,
        now=match.paid.clocks.at_provider(clock.now()),
        webhook_grace=config.webhook_grace,
        leaves_foreign=match.leaves_foreign,
    )
    context.add_output_metadata({"foreign": dg.MetadataValue.int(diff.foreign)})
    hand_over.leave(plan_matching(context, match.paid, diff, rows))


@dg.op(
    description="Settle each: re-read under lock, then create or finish the payment and grant its subscription.",
    ins=AFTER,
    out=dg.Out(dg.Nothing),
)
def apply_successful_matches(
    context: dg.OpExecutionContext,
    billing_database: dg.ResourceParam[BillingDatabase],
    payment_provider: dg.ResourceParam[ProviderConnection],
    clock: dg.ResourceParam[Clock],
    hand_over: dg.ResourceParam[HandOver],
) -> Told:
    """Apply the plan, payment by payment; red at the end if something must be retried."""
    with told_plainly():
        plan = hand_over.take(MatchingPlan)
        yield from apply_matching(context, JOB, plan, billing_database, payment_provider, clock)


@dg.job(
    name=JOB,
    description="Creates what the provider has and the database lacks: succeeded payments and their subscriptions.",
    partitions_def=HOURLY,
    executor_def=dg.in_process_executor,
    tags=singleton_tags(JOB, MAX_RUNTIME_S),
)
def matching_successful_payments_job() -> None:
    """Provider slice, database slice, diff, apply."""
    apply_successful_matches(diff_successful_payments(fetch_known_payments(fetch_paid_for_successful())))


def compare_successful(
    connection: sa.Connection, paid: Sequence[ProviderPayment], _window: Window, now: datetime, settings: Settings
) -> Compared:
    """Both slices of a tick that looks first, and their diff."""
    ids = [payment.id for payment in paid]
    diff = diff_successful(
        paid,
        by_provider_id(fetch_rows(connection, ids)),
        frozenset(fetch_settled(connection, ids)),
        now=now,
        webhook_grace=WEBHOOK_GRACE,
        leaves_foreign=settings.foreign_payments == "ignore",
    )
    return Compared(diff, f"{len(paid)} paid there, {diff.agreed} settled here")


matching_successful_payments_every_2_minutes_schedule = matching_schedule(
    matching_successful_payments_job,
    name="matching_successful_payments_every_2_minutes_schedule",
    diff_op="diff_successful_payments",
    compare=compare_successful,
)
