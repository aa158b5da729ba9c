"""An empty Dagster job with as many ops as a matching job, in the same deployment: what Dagster itself costs."""

import dagster as dg


@dg.op
def first() -> None:
    """Nothing."""


@dg.op(ins={"before": dg.In(dg.Nothing)})
def second() -> None:
    """Nothing."""


@dg.op(ins={"before": dg.In(dg.Nothing)})
def third() -> None:
    """Nothing."""


@dg.op(ins={"before": dg.In(dg.Nothing)})
def fourth() -> None:
    """Nothing."""


@dg.job(executor_def=dg.in_process_executor)
def empty_job() -> None:
    """Four ops in a row."""
    fourth(third(second(first())))


defs = dg.Definitions(jobs=[empty_job], resources={"io_manager": dg.mem_io_manager})
