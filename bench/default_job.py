"""A matching job as one writes it first: four ops that hand a table on through Dagster's default IO manager."""

from typing import Any

import dagster as dg

_ROWS = [{"id": number, "amount": "299.00", "status": "SUCCEEDED"} for number in range(200)]
_Rows = list[dict[str, Any]]


@dg.op
def fetch_here() -> _Rows:
    """A slice."""
    return _ROWS


@dg.op
def fetch_there(here: _Rows) -> _Rows:
    """Another."""
    return here


@dg.op
def diff(there: _Rows) -> _Rows:
    """What differs."""
    return there


@dg.op
def apply(context: dg.OpExecutionContext, rows: _Rows) -> None:
    """What is done."""
    context.log.info(f"nothing to do for {len(rows)} rows")


@dg.job(executor_def=dg.in_process_executor)
def default_job() -> None:
    """Four ops in a row."""
    apply(diff(fetch_there(fetch_here())))


defs = dg.Definitions(jobs=[default_job])
