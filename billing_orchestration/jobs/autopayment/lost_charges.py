"""Before the first charge of a run: charges at the provider that a restored or empty database does not know.

An attempt's key protects it for 24 h. A database that was set back further would plan the same attempt again, and the
provider would take it for a new charge. What the provider's list holds is settled before anybody is charged, and what
cannot be settled, or is not paid yet, holds its subscription.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import dagster as dg

from billing_orchestration.database.attempts import answers_of_attempts, in_hand
from billing_orchestration.database.audit import Problem, Stamp, evidence_of
from billing_orchestration.database.errors import DatabaseBusy
from billing_orchestration.database.matching import fetch_settled, move_watermark, read_watermark
from billing_orchestration.domain.decisions import Decision
from billing_orchestration.domain.lost_attempts import (
    LostCharges,
    charge_of,
    find_lost,
    parts_of,
    stretches_to_search,
)
from billing_orchestration.domain.problem_kinds import UNKNOWN_ATTEMPT
from billing_orchestration.domain.provider_payment import ProviderPayment, UnusablePayment, claimed_subscription
from billing_orchestration.jobs.clocks import look_at_clocks
from billing_orchestration.jobs.run_report import RunReport
from billing_orchestration.jobs.settling import open_all, report_settled, settle_all, unusable_problems
from billing_orchestration.resources import BillingDatabase, Clock, ProviderConnection

# Its watermark: until then our records were whole, and no charge was lost.
_CHARGING = "autopayment_job"
# The job that settles every success of ours within minutes, and sees nothing else.
_MATCHING = "matching_successful_payments_job"
# How far back a database without any records is searched, at least: the default of max_overdue_days.
_REACH_DAYS = 30


@dataclass(frozen=True)
class Search:
    """What is lost. `since`: from when it was searched for, None if there was no need.
    `whole_until`: our records are whole until then, once that is settled; None: nobody has looked."""

    lost: LostCharges = field(default_factory=LostCharges)
    since: datetime | None = None
    whole_until: datetime | None = None


def search(
    database: BillingDatabase, provider: ProviderConnection, clock: Clock, max_overdue_days: int, *, may_charge: bool
) -> Search:
    """Ask the provider's list for charges that our records may have lost. It reads only.

    A run that cannot charge anybody (not `may_charge`) does not ask. Raises IncompleteSlice when the list breaks off:
    nobody is charged then.
    """
    now, calendar = clock.now(), database.calendar
    fetch_day, fetch_unfinished = provider.client.fetch_day, provider.client.fetch_unfinished
    reach = timedelta(days=max(max_overdue_days, _REACH_DAYS))
    with database.read() as connection:
        stretches = stretches_to_search(
            now,
            whole_until=read_watermark(connection, _CHARGING),
            matched_until=read_watermark(connection, _MATCHING),
            earliest=calendar.start_of(calendar.day_of(now) - reach),
        )
    # Where nobody has looked, nothing is proved anew: of launches one after another, one looks in the end.
    if stretches is None or not may_charge:
        return Search()
    found: dict[str, ProviderPayment] = {}
    odd: list[UnusablePayment] = []
    for fetch, stretch in ((fetch_unfinished, stretches.unfinished), (fetch_day, stretches.whole)):
        for start, end in parts_of(stretch) if stretch is not None else ():
            part = fetch(start, end)
            found.update({payment.id: payment for payment in part.payments if payment.claims.renewal_attempt_id})
            odd.extend(part.unusable)
    told = [charge_of(item) for item in odd if item.payment_id not in found]
    unreadable = [charge for charge, _ in told if charge is not None]
    with database.read() as connection:
        named = [payment.claims.renewal_attempt_id for payment in found.values()]
        named += [charge.attempt_id for charge in unreadable]
        known = in_hand(connection, [id_ for id_ in named if id_ is not None])
        settled = fetch_settled(connection, list(found))
        concluded = answers_of_attempts(connection, [charge.item.payment_id for charge in unreadable])
    is_whole = all(can_be_told for _, can_be_told in told)
    lost = find_lost(found.values(), known, settled, unreadable, concluded, is_whole=is_whole)
    return Search(lost, stretches.since, now)


def describe_search(found: Search) -> dict[str, dg.MetadataValue]:
    """What the run's page shows of it, where it was needed."""
    if found.since is None:
        return {}
    lost = found.lost
    return {
        "searched for lost charges since": dg.MetadataValue.text(found.since.isoformat()),
        "lost charges": dg.MetadataValue.int(len(lost.successes) + len(lost.unfinished) + len(lost.unreadable)),
    }


def settle_lost(
    found: Search,
    report: RunReport,
    database: BillingDatabase,
    provider: ProviderConnection,
    clock: Clock,
    make_stamp: Callable[[], Stamp],
) -> None:
    """Settle what was paid, put what is not finished or not readable before a person, and note until when our records
    are whole.

    What cannot be settled now is lost still: the next run searches for it again. So it does after a wrong clock, and
    after a record that may be anybody's charge, for its metadata cannot be read.
    """
    lost, to_retry = found.lost, len(report.again)
    if lost.successes:
        results = settle_all(
            database, lost.successes, make_stamp=make_stamp, is_live=provider.client.is_live, dry_run=False
        )
        report_settled(report, results, database=database, stamp=make_stamp(), dry_run=False)
    for_a_person = [*map(_unfinished, lost.unfinished), *unusable_problems([odd.item for odd in lost.unreadable])]
    report.quarantined += len(for_a_person)
    report.opened += open_all(database, make_stamp(), for_a_person)
    is_sure = len(report.again) == to_retry and look_at_clocks(database, clock, provider).may_be_trusted
    if found.whole_until is not None and lost.is_whole and is_sure:
        with database.begin() as connection:
            seen = read_watermark(connection, _CHARGING, lock=True)
            if seen is None or seen < found.whole_until:
                move_watermark(connection, make_stamp(), seen, found.whole_until)


def settle_lost_or_stop(
    found: Search,
    database: BillingDatabase,
    provider: ProviderConnection,
    clock: Clock,
    make_stamp: Callable[[], Stamp],
) -> list[Decision]:
    """The same for a run whose shards do not know what is lost: what cannot be settled now stops it."""
    told: list[Decision] = []
    report = RunReport(decisions=told)
    settle_lost(found, report, database, provider, clock, make_stamp)
    if report.again:
        raise DatabaseBusy(
            f"{len(report.again)} charges that our records have lost could not be settled, nobody was charged: "
            f"{'; '.join(report.again[:3])}. Launch the job again"
        )
    return told


def _unfinished(payment: ProviderPayment) -> Problem:
    return Problem(
        f"payment {payment.id}",
        UNKNOWN_ATTEMPT,
        f"it is {payment.status} at the provider and names a renewal attempt that this database does not know: if it is"
        " paid, it is settled by itself",
        external_payment_id=payment.id,
        subscription_id=claimed_subscription(payment.metadata),
        attempt_id=payment.claims.renewal_attempt_id,
        evidence={
            **evidence_of({"metadata": payment.metadata, "amount": str(payment.money)}),
            "unfinished": payment.status,
        },
    )
