"""On which of Dagster's executors autopayment_job runs. Others are refused by name, since nobody has seen them work.

A whole run hands its slices over in memory, so it stays in one process. Shards hand nothing over, and run wherever the
executor starts them; what was measured on which one is in docs/deployment.md, "Executors".
"""

import dagster as dg

from billing_orchestration.domain.shards import Sharding

_ONE_PROCESS = "in_process"
_PROCESSES = "multiprocess"
# By what they call themselves: dagster_celery.celery_executor, dagster_k8s.k8s_job_executor.
_MACHINES = ("celery", "k8s")

# What a shard's process needs, imported once in the process that all of them are forked from: imports are most of what
# the start of a process costs. None of these opens a connection or starts a thread.
_PRELOADED = [
    "billing_orchestration.definitions",
    "billing_orchestration.jobs.autopayment.pipeline",
    "billing_orchestration.database.renewals",
    "billing_orchestration.database.settling",
    "billing_orchestration.provider.sdk",
    "dagster_postgres",
    "sqlalchemy.dialects.postgresql.psycopg",
]


class UnsupportedExecutor(ValueError):
    """autopayment_job was to run on an executor that cannot, or is not known to, run it."""


def executor_for(sharding: Sharding | None, given: dg.ExecutorDefinition | None) -> dg.ExecutorDefinition:
    """The executor of autopayment_job: the deployment's own, else processes for what runs at once.

    Raises UnsupportedExecutor.
    """
    at_once = sharding.at_once if sharding is not None else 1
    name = given.name if given is not None else _PROCESSES if at_once > 1 else _ONE_PROCESS
    if name == _ONE_PROCESS and at_once > 1:
        raise UnsupportedExecutor(
            f"the executor in_process runs one shard after another, but {at_once} are to run at once: leave"
            " RENEWAL_SHARDS_AT_ONCE out, or the executor"
        )
    if name not in (_ONE_PROCESS, _PROCESSES, *_MACHINES):
        raise UnsupportedExecutor(
            f"the executor {name!r} is not supported: autopayment_job runs on {_ONE_PROCESS}, {_PROCESSES},"
            f" {' and '.join(_MACHINES)} (configured without a name of their own). The deployment guide has a table:"
            " Executors"
        )
    if name != _ONE_PROCESS and sharding is None:
        raise UnsupportedExecutor(
            f"the executor {name} starts a process for each op, which only a run in shards can do with: set"
            " RENEWAL_SHARDS"
        )
    if given is not None and name != _PROCESSES:
        return given
    if name == _ONE_PROCESS:
        return dg.in_process_executor
    configured: dg.ExecutorDefinition = dg.multiprocess_executor.configured(
        {"max_concurrent": at_once, "start_method": {"forkserver": {"preload_modules": _PRELOADED}}}, name=_PROCESSES
    )
    return configured
