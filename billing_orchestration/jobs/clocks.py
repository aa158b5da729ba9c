"""The three clocks as a run sees them: looked at, shown, and what a run that cannot trust them leaves undone."""

import dagster as dg

from billing_orchestration.database.errors import BillingDatabaseError
from billing_orchestration.domain.clocks import Clocks
from billing_orchestration.jobs.run_failures import FailureCode, failed
from billing_orchestration.jobs.run_report import RunReport
from billing_orchestration.provider.errors import ProviderError
from billing_orchestration.resources import BillingDatabase, Clock, ProviderConnection


def look_at_clocks(database: BillingDatabase, clock: Clock, provider: ProviderConnection | None = None) -> Clocks:
    """PostgreSQL's clock, asked now, and the provider's, by the answers that it has given this run."""
    offset = None if provider is None else provider.client.clock_offset
    return Clocks(database.clock_offset(clock), offset)


def describe_clocks(context: dg.OpExecutionContext, clocks: Clocks) -> dict[str, dg.MetadataValue[str]]:
    """Metadata: how they compare. A difference that must be said is in the run's log, too."""
    if not clocks.agree:
        context.log.warning(str(clocks))
    return {"clocks": dg.MetadataValue.text(str(clocks))}


def note_clocks(report: RunReport, clocks: Clocks, left_undone: str) -> None:
    """Make the run red where its clocks may not be trusted; `left_undone` says what it has not done because of it."""
    if not clocks.may_be_trusted and report.stopped_by is None:
        report.stopped_by, report.stop_code = f"{clocks}. {left_undone}", FailureCode.CLOCKS_APART


def stop_if_clocks_are_apart(clocks: Clocks) -> None:
    """For a run that has nothing to do but what depends on the time. Raises dg.Failure, before anything is applied."""
    if not clocks.may_be_trusted:
        raise failed(FailureCode.CLOCKS_APART, f"stopped before anything was applied: {clocks}. Then launch it again")


def clocks_apart(database: BillingDatabase, clock: Clock, provider: ProviderConnection) -> Clocks | None:
    """The clocks, if the last answer is too far off and asking again does not put it right. Never raises.

    For between two charges: a clock that was set in mid-run is seen with the next answer.
    """
    if not provider.client.is_clock_suspicious:
        return None
    try:
        provider.client.make_sure_of_clock()
        clocks = look_at_clocks(database, clock, provider)
    except (ProviderError, BillingDatabaseError):
        return None  # whoever asks for something else next will meet the same, and say so
    return None if clocks.may_be_trusted else clocks
