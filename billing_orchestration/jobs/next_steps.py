"""The next step of a run, as a link that opens the right launchpad filled in."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import dagster as dg

from billing_orchestration.launchpad import LOCATION, launchpad
from billing_orchestration.resources import PARTITION_TAG, SCHEDULE_TAG
from billing_orchestration.settings import ui_prefix


def location_of(context: dg.OpExecutionContext) -> str:
    """The name of the code location that the run belongs to; a run in this process belongs to none."""
    origin = context.run.remote_job_origin
    return LOCATION if origin is None else origin.location_name


def launch_again(context: dg.OpExecutionContext, **options: Any) -> str:
    """The launchpad of the run's job with the run's own config. `options` of `run` are set; None unsets one.

    A tick's run stands for the tick. Launched again, it stands for its day; of a matching job, for now: only such a run
    catches up.
    """
    config: dict[str, Any] = deepcopy(dict(context.run.run_config or {}))
    run = config.setdefault("resources", {}).setdefault("run", {}).setdefault("config", {})
    tags = {name: value for name, value in context.run.tags.items() if name == PARTITION_TAG}
    if SCHEDULE_TAG in context.run.tags:
        options = {"as_of": None, **options}
        if isinstance(context.job_def.partitions_def, dg.HourlyPartitionsDefinition):
            tags = {}
    for name, value in options.items():
        run.pop(name, None)
        if value is not None:
            run[name] = value
    return launchpad(context.job_name, _pruned(config), tags=tags, location=location_of(context), prefix=ui_prefix())


def _pruned(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without branches that hold nothing: the editor would show them as empty."""
    pruned = {name: _pruned(value) if isinstance(value, Mapping) else value for name, value in config.items()}
    return {name: value for name, value in pruned.items() if value not in ({}, None)}
