"""A dry run as a preview: it shows the hash of its plan, and a run with `approved_plan` applies that plan only.

What has changed since the preview is refused row by row, while the preview is in the run history. Without it (a CLI run
keeps none), a plan that differs is refused as a whole, before anything is applied.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import dagster as dg

from billing_orchestration.domain.approval import allowed, fingerprint, plan_hash
from billing_orchestration.domain.decisions import Action, Code, Decision
from billing_orchestration.domain.run_scope import RunScope
from billing_orchestration.jobs.next_steps import launch_again
from billing_orchestration.jobs.run_failures import FailureCode, failed

PLAN_TAG = "billing/plan"
PLANS = dg.AssetKey(["billing", "plans"])
_CHANGES = "changes of the plan"
Change = TypeVar("Change")


def bind(
    context: dg.OpExecutionContext,
    scope: RunScope,
    changes: Sequence[tuple[str, Change]],
    shown: Mapping[str, Decision],
) -> tuple[list[Change], list[Decision]]:
    """The changes that may be applied, and the refusal of each that may not.

    `changes`: (line, change) for each; `shown`: the report's decision by line. A dry run's hash, and how to approve
    it, are attached to the run. Raises dg.Failure when a plan was approved that cannot be compared with this one.
    """
    if not scope.dry_run and scope.approved_plan is None:
        return [change for _, change in changes], []
    names = [(fingerprint(line), line, change) for line, change in changes]
    now = plan_hash(name for name, _, _ in names)
    if scope.dry_run:
        context.instance.add_run_tags(context.run_id, {PLAN_TAG: now})
        context.log_event(
            dg.AssetObservation(
                PLANS,
                description=f"{len(names)} changes",
                metadata={
                    "plan": dg.MetadataValue.text(now),
                    "to approve it": dg.MetadataValue.md(
                        f"[Launch {context.job_name} with this plan]({approval_link(context, scope, now)})"
                    ),
                    _CHANGES: dg.MetadataValue.text(json.dumps([name for name, _, _ in names])),
                },
            )
        )
    if scope.approved_plan is None:
        return [change for _, change in changes], []
    previewed = _previewed(context, scope.approved_plan)
    approved = allowed([name for name, _, _ in names], scope.approved_plan, previewed)
    if approved is None:
        raise failed(
            FailureCode.PLAN_CHANGED,
            f"stopped before anything was applied: the plan is now {now}, approved was {scope.approved_plan}. The dry"
            " run that showed it is not in this run history, so what has changed is unknown. Launch a new dry run"
            f" (with as_of {scope.as_of.isoformat()}) and approve its plan",
        )
    refused = [
        Decision(
            Action.REFUSE,
            shown[line].subject,
            f"not in the approved plan, changed since: {shown[line].reason}",
            shown[line].money,
            Code.NOT_APPROVED,
        )
        for name, line, _ in names
        if name not in approved
    ]
    if refused:
        context.log.warning(f"{len(refused)} changes are not in the approved plan {scope.approved_plan}: refused")
    return [change for name, _, change in names if name in approved], refused


def approval_link(context: dg.OpExecutionContext, scope: RunScope, plan: str) -> str:
    """The launchpad that applies the plan of this dry run, with everything else as this run had it."""
    return launch_again(context, dry_run=None, as_of=scope.as_of.isoformat(), approved_plan=plan)


def link_of_plan(context: dg.OpExecutionContext, scope: RunScope) -> str | None:
    """The same, for the plan that this run has shown. None: it has shown none, as a divided run."""
    run = context.instance.get_run_by_id(context.run_id)
    plan = run.tags.get(PLAN_TAG) if run is not None else None
    return None if plan is None else approval_link(context, scope, plan)


def _previewed(context: dg.OpExecutionContext, plan: str) -> list[str] | None:
    """The changes that the dry run of a plan has shown; None when this run history does not know it."""
    records = context.instance.get_run_records(dg.RunsFilter(job_name=context.job_name, tags={PLAN_TAG: plan}), limit=1)
    for record in records:
        for entry in context.instance.all_logs(
            record.dagster_run.run_id, of_type=dg.DagsterEventType.ASSET_OBSERVATION
        ):
            event = entry.dagster_event
            if event is not None and event.asset_observation_data is not None:
                metadata: Mapping[str, Any] = event.asset_observation_data.asset_observation.metadata
                if _CHANGES in metadata:
                    return list(json.loads(metadata[_CHANGES].value))
    return None
