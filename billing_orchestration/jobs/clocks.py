"""The three clocks as a run sees them: looked at, shown, and what a run that cannot trust them leaves undone."""

from contextlib import suppress

import dagster as dg

from billing_orchestration.database.errors import BillingDatabaseError
from billing_orchestration.domain.clocks import Clocks
from billing_orchestration.jobs.run_failures import FailureCode, failed
from billing_orchestration.jobs.run_report import RunReport
from billing_orchestration.provider.errors import ProviderError
from billing_orchestration.resources import BillingDatabase, Clock, ProviderConnection


def look_at_clocks(database: BillingDatabase, clock: Clock, provider: ProviderConnection | None = None) -> Clocks:
    """PostgreSQL's clock, asked now, and the provider's, by the answers that it has given this run.

    Where its last answer is odd, it is asked again.
    """
    if provider is None:
        return Clocks(database.clock_offset(clock))
    if provider.client.is_clock_suspicious:
        with suppress(ProviderError):  # then by what it has answered so far
            provider.client.make_sure_of_clock()
    return Clocks(database.clock_offset(clock), provider.client.clock_offset)


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
    """The clocks, if the last answer shows that one was set since they were compared. Never raises.

    For between two charges. One odd answer is no wrong clock: the provider is asked again.
    """
    if not provider.client.is_clock_suspicious:
        return None
    try:
        clocks = look_at_clocks(database, clock, provider)
    except BillingDatabaseError:
        return None  # whoever uses it next will meet the same, and say so
    return None if clocks.may_be_trusted else clocks
