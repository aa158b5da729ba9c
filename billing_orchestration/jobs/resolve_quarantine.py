"""resolve_quarantine_job: a person decides about an entry of the quarantine, in the UI.

It does what `billing-orchestration quarantine resolve` does, by the same function and under the same locks. It has no
schedule. Its launchpad opens filled in from the page of the asset billing/quarantine. `dry_run` comes first: the whole
transaction is made and rolled back, and the run shows what it would do.
"""

from collections.abc import Iterator
from enum import Enum
from typing import Any

import dagster as dg
from pydantic import Field

from billing_orchestration.desk.resolving import NotResolved, Resolution, resolve
from billing_orchestration.domain.printable import printable
from billing_orchestration.domain.problem_kinds import ACCEPTED, ATTACHED, IGNORED
from billing_orchestration.jobs.next_steps import location_of
from billing_orchestration.jobs.quarantine_page import (
    QUARANTINE,
    RESOLVE_JOB,
    RESOLVE_OP,
    quarantine_page,
    resolving_link,
)
from billing_orchestration.jobs.run_failures import FailureCode, failed
from billing_orchestration.jobs.run_report import CHANGED_TAG, told_plainly
from billing_orchestration.jobs.schedules import singleton_tags
from billing_orchestration.resources import DRY_RUN_TAG, BillingDatabase, Clock, ProviderConnection

# One payment is asked about, and one transaction made.
MAX_RUNTIME_S = 600
# Who launched the run, where the deployment knows it.
_USER_TAG = "user"


class Decided(Enum):
    """What a person may decide."""

    accept = "accept"
    attach = "attach"
    ignore = "ignore"


_WORDS = {Decided.accept: ACCEPTED, Decided.attach: ATTACHED, Decided.ignore: IGNORED}


class ResolveConfig(dg.Config):
    """The decision."""

    entry: int = Field(ge=1, description="The entry's number, as the asset billing/quarantine shows it.")
    decision: Decided = Field(
        description="accept: the payment is booked as it is. attach: it pays one period of `subscription`. ignore:"
        " nothing is granted for it, now or later. The asset's table says what each does to this entry."
    )
    subscription: int | None = Field(default=None, description="For attach: the id of the subscription.")
    reason: str = Field(default="", description="Why, for whoever reads it next. The audit trail keeps it.")
    by: str = Field(default="", description="Who decided. The run's tag `user` comes first, where there is one.")
    dry_run: bool = Field(default=True, description="Show what would happen and write nothing. false: do it.")


@dg.op(name=RESOLVE_OP, description="Resolve one entry, or show what resolving it would do.", out=dg.Out(dg.Nothing))
def resolve_entry(
    context: dg.OpExecutionContext,
    config: ResolveConfig,
    billing_database: dg.ResourceParam[BillingDatabase],
    payment_provider: dg.ResourceParam[ProviderConnection],
    clock: dg.ResourceParam[Clock],
) -> Iterator[dg.AssetMaterialization | dg.Output[None]]:
    """The one step. Red, with nothing written, when the entry cannot be resolved this way."""
    by = context.run.tags.get(_USER_TAG, "").strip() or config.by
    if config.dry_run:
        context.instance.add_run_tags(context.run_id, {DRY_RUN_TAG: "true"})
    with told_plainly():
        if (config.decision is Decided.attach) != bool(config.subscription):
            raise _refused(
                "attach needs the id of a subscription, and nothing else takes one. Nothing was read or written"
            )
        if not config.dry_run:
            billing_database.check_writing()
        try:
            done = resolve(
                billing_database.engine,
                # Closed by `resolve`, as the command line's is; the run's own lives until the run's end.
                lambda: payment_provider.client,
                billing_database.calendar,
                config.entry,
                Resolution(_WORDS[config.decision], config.reason, by, config.subscription),
                clock.now,
                run_id=context.run_id,
                dry_run=config.dry_run,
            )
        except NotResolved as error:
            raise _refused(str(error)) from None
        with billing_database.read() as connection:
            page = quarantine_page(connection, clock.now(), location_of(context))
    if not config.dry_run:
        context.instance.add_run_tags(context.run_id, {CHANGED_TAG: "1"})
        yield page
    for line in done:
        context.log.info(printable(line))
    yield dg.Output(None, metadata=_told(context, config, done, by))


def _told(
    context: dg.OpExecutionContext, config: ResolveConfig, done: list[str], by: str
) -> dict[str, dg.MetadataValue[Any]]:
    """Metadata: what was done, or would be; the next step; who decided."""
    said = printable("; ".join(done))
    if not config.dry_run:
        return {
            "result": dg.MetadataValue.text(said),
            "next: what else waits": dg.MetadataValue.asset(QUARANTINE),
            "by": dg.MetadataValue.text(by),
        }
    given: dict[str, Any] = {"reason": config.reason, "by": by, "dry_run": False}
    if config.subscription:
        given["subscription"] = config.subscription
    link = resolving_link(config.entry, config.decision.value, location=location_of(context), **given)
    return {
        "result": dg.MetadataValue.text(f"dry run, nothing was written. It would do this: {said}"),
        "next: do it": dg.MetadataValue.url(link),
    }


def _refused(words: str) -> dg.Failure:
    return failed(FailureCode.NOT_RESOLVED, words)


@dg.job(
    name=RESOLVE_JOB,
    description="Decides about one entry of the quarantine: accept, attach or ignore. Launched by a person, first as a"
    " dry run; the asset billing/quarantine opens it filled in.",
    executor_def=dg.in_process_executor,
    tags=singleton_tags(RESOLVE_JOB, MAX_RUNTIME_S),
)
def resolve_quarantine_job() -> None:
    """Resolve one entry."""
    resolve_entry()
