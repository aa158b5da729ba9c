"""What became of the seeds that were played, and what some of them must have played."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from billing_orchestration_tests.torture.simulation.outages import OUTAGE_LENGTHS
from billing_orchestration_tests.torture.simulation.story import DAYS
from billing_orchestration_tests.torture.simulation.wire import CHARGE_FAULTS, READ_FAULTS

# Seeds that showed a fault once. A seed's story changes whenever the simulation draws anew, so each fault has a test of
# its own beside the code as well.
REGRESSIONS = {
    7: "a card declined for one subscription was tried for another one in the same run",
    1011: "a renewal's row that the service's webhook wrote without a grant, during an outage (the judge was wrong)",
    3005: "an open charge that a run seemed not to have asked about (never seen again; by all that is left the judge's"
    " fault: the answer to a charge sent again may be the first one, pending)",
    3014: "a charge that a run within a run left pending: no tick came for its success (the simulation was wrong)",
    7012: "a success in an hour of which a run's end only was told: ticks that were not run had found nothing (the"
    " simulation was wrong)",
    8027: "a card that was declined for good, and then the subscription's end was moved: its next period was not to be"
    " charged by it (the judge was wrong)",
    8044: "our clock was set three hours ahead between its comparison and a claim: the key seemed three hours younger"
    " than it was, and was sent again after more than a day",
    8006: "a run heard of a pending charge's decline and left the next try to a second launch of the same day",
    1013: "such a row beside a purchase that had moved the subscription's end: the paid renewal was never granted",
    8004: "a charge that was pending when the database was set back: the matching run after it vouched for what it"
    " cannot see, and the period was charged again; held since, such a one need not be charged (judge and code wrong)",
}
# What some of so many seeds must have played, by a part of its name.
ENOUGH_SEEDS = 30
MUST_BE_PLAYED = (
    *(f"outage of {whose}, {length}" for whose in ("provider", "ours", "service") for length in OUTAGE_LENGTHS),
    "purchase by card", "purchase by cash", "purchase by hold", "purchase by saved card", "amount_differs", "metadata",
    "canceled_here", "refund in part", "refund in full", "subscription ACTIVE -> PAUSED",
    "subscription ACTIVE -> CANCELED",
    "webhook: granted", "webhook: known", "webhook: row", "webhook: again later", "meanwhile, at: commit",
    "meanwhile, at: statement", "operator: dry run", "operator: launch", "operator: backfill", "operator: twice",
    "launch around a key's 23 or 24 h", "killed", "connection cut", "the answer to a COMMIT was lost",
    *(f"POST: {fault}" for fault, _ in CHARGE_FAULTS), *(f"GET: {fault}" for fault, _ in READ_FAULTS),
    "whole autopayment_job", "of a partition", "attempts STOPPED", "attempts DECLINED", "attempts PENDING",
    "attempts VOID", "attempts REJECTED", "attempts REVIEW", "attempts SUCCEEDED", "settled renewed", "settled created",
    "settled extended", "settled refunded", "a card is stuck: silence before", "a card is stuck: error before",
    "webhook: dies half-way", "webhook: dies half-way, late", "wrong clock: ours, ahead",
    "wrong clock: ours, behind", "wrong clock: PostgreSQL's", "another shop sells", "plan: a price",
    "plan: is not renewed", "plan: another period", "subscription: plan switched",
    "a backup was restored", "a lost charge cannot be read", "a standby without the last commits took over",
    "a card is replaced", "a card's purchase is refunded",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What became of one seed."""

    seed: int
    days: int
    runs: int
    faults: tuple[str, ...]
    story: tuple[str, ...]
    seconds: float
    numbers: dict[str, int] = field(default_factory=dict)

    @property
    def replay(self) -> str:
        """The command that plays it again."""
        days = f" --days {self.days}" if self.days != DAYS else ""
        return f"python -m billing_orchestration_tests.torture.simulation --seed {self.seed}{days} --story"


def told(result: Result) -> str:
    """One seed, as a person reads it."""
    lines = [
        f"seed {result.seed}: {result.days} days, {result.runs} runs, {result.seconds:.1f} s"
        + (f", {len(result.faults)} FAULTS" if result.faults else "")
    ]
    if result.faults:
        lines.extend(f"  {fault}" for fault in result.faults[:10])
        lines.append(f"  play it again: {result.replay}")
    return "\n".join(lines)


def summary(results: Sequence[Result], days: int, seconds: float) -> tuple[str, bool]:
    """All seeds together, and whether the promise held and was put to the test."""
    totals: Counter[str] = Counter()
    for result in results:
        totals.update(result.numbers)
    failed = sorted(result.seed for result in results if result.faults)
    unplayed = [name for name in MUST_BE_PLAYED if not any(name in played for played in totals)]
    # A simulation that does not play something any more would be green about it for ever.
    incomplete = bool(unplayed) and len(results) >= ENOUGH_SEEDS and days >= DAYS
    played = sum(result.days for result in results)
    lines = [f"NEVER PLAYED: {', '.join(unplayed)}"] if incomplete else []
    lines += [f"  {name}: {number}" for name, number in sorted(totals.items())]
    lines.append(
        f"{len(results)} seeds, {played} simulated days, {sum(result.runs for result in results)} runs"
        f" in {seconds:.0f} s ({played / seconds * 3600:.0f} days an hour); "
        + (f"BROKEN by seeds {failed}" if failed else "the promise held")
    )
    return "\n".join(lines), not failed and not incomplete
