"""matching_pending_payments_job: PENDING here, paid at the provider: the customer gets what was paid for.

Every two minutes a tick looks whether there is something to do (`matching_look`). A run reads the provider's successes
of the last hour (created or captured), then the PENDING rows with those ids, whatever their age, and settles them. It
is safe to repeat. After an outage of up to seven days, the next tick catches up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import dagster as dg
import sqlalchemy as sa

from billing_orchestration.database.matching import fetch_pending
from billing_orchestration.domain.matching import by_provider_id, diff_pending
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
from billing_orchestration.jobs.run_report import ROWS_SHOWN, Told, told_plainly
from billing_orchestration.jobs.schedules import singleton_tags
from billing_orchestration.resources import AFTER, BillingDatabase, Clock, HandOver, ProviderConnection, RunSettings
from billing_orchestration.settings import Settings

JOB = "matching_pending_payments_job"
# A tick takes seconds, one that catches up seven days minutes. A run that takes longer than this hangs.
MAX_RUNTIME_S = 1800


@dataclass(frozen=True)
class PendingMatch:
    """Both slices of one run."""

    paid: PaidSlice
    rows: tuple[PaymentRow, ...]
    nameless: tuple[PaymentRow, ...]


@dg.op(description="Read the provider's succeeded payments of the window, created or captured in it, to the last page.")
def fetch_paid_for_pending(
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
    description="Read the PENDING payments of the window, and those of any age that the provider says are paid.",
    ins=AFTER,
)
def fetch_pending_payments(
    context: dg.OpExecutionContext,
    billing_database: dg.ResourceParam[BillingDatabase],
    hand_over: dg.ResourceParam[HandOver],
) -> None:
    """The database's slice."""
    with told_plainly():
        paid = hand_over.take(PaidSlice)
    ids = [payment.id for payment in paid.slice.payments]
    with told_plainly(), billing_database.read() as connection:
        pending = fetch_pending(connection, paid.window.start, paid.window.end, ids, ROWS_SHOWN)
    context.add_output_metadata(
        {
            "PENDING in the window": dg.MetadataValue.int(pending.in_window),
            "without a provider id": dg.MetadataValue.int(pending.without_provider_id),
            "PENDING and paid at the provider": dg.MetadataValue.int(len(pending.paid_there)),
        }
    )
    hand_over.leave(PendingMatch(paid, pending.paid_there, pending.nameless))


@dg.op(description="Compare: PENDING here and succeeded there is to be settled.", ins=AFTER)
def diff_pending_payments(
    context: dg.OpExecutionContext,
    config: MatchingDiffConfig,
    clock: dg.ResourceParam[Clock],
    hand_over: dg.ResourceParam[HandOver],
) -> None:
    """The diff of two complete slices."""
    with told_plainly():
        match = hand_over.take(PendingMatch)
    rows = by_provider_id(match.rows)
    diff = diff_pending(
        match.paid.slice.payments,
        rows,
        match.nameless,
        now=match.paid.clocks.at_provider(clock.now()),
        webhook_grace=config.webhook_grace,
    )
    hand_over.leave(plan_matching(context, match.paid, diff, rows))


@dg.op(
    description="Settle each: re-read under lock, then payment SUCCEEDED and its subscription extended or created.",
    ins=AFTER,
    out=dg.Out(dg.Nothing),
)
def apply_pending_matches(
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
    description="Settles payments that are PENDING here and succeeded at the provider.",
    partitions_def=HOURLY,
    executor_def=dg.in_process_executor,
    tags=singleton_tags(JOB, MAX_RUNTIME_S),
)
def matching_pending_payments_job() -> None:
    """Provider slice, database slice, diff, apply."""
    apply_pending_matches(diff_pending_payments(fetch_pending_payments(fetch_paid_for_pending())))


def compare_pending(
    connection: sa.Connection, paid: Sequence[ProviderPayment], window: Window, now: datetime, _settings: Settings
) -> Compared:
    """Both slices of a tick that looks first, and their diff."""
    pending = fetch_pending(connection, window.start, window.end, [payment.id for payment in paid])
    diff = diff_pending(paid, by_provider_id(pending.paid_there), now=now, webhook_grace=WEBHOOK_GRACE)
    here = pending.in_window
    return Compared(diff, f"{len(paid)} paid there, {diff.agreed} of them not PENDING here, {here} PENDING here")


matching_pending_payments_every_2_minutes_schedule = matching_schedule(
    matching_pending_payments_job,
    name="matching_pending_payments_every_2_minutes_schedule",
    diff_op="diff_pending_payments",
    compare=compare_pending,
)
