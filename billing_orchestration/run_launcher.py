"""Dagster's own run launcher, and the knowledge that a run's process is gone.

Runs are children of the code server, and die with its container or unit. Dagster then keeps them as "started" until
max_runtime, and the job's next run waits behind. With this launcher (`run_launcher` in deploy/dagster.yaml) run
monitoring fails such a run within minutes. Launchers that start each run apart (Docker, Kubernetes) watch it by
themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import dagster as dg
from dagster._config.config_schema import UserConfigSchema
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.launcher.base import CheckRunHealthResult, WorkerStatus
from dagster._core.launcher.default_run_launcher import DefaultRunLauncher
from dagster._grpc.types import GetCurrentRunsResult
from dagster._serdes import ConfigurableClassData, deserialize_value
from typing_extensions import Self

# A run whose code server was killed alone may go on as an orphan: it is gone when it has recorded nothing for so long.
# Charging writes a line every 10 s.
_SILENT_SECONDS = 120


class WatchedRunLauncher(DefaultRunLauncher):
    """Tells run monitoring of a run that its code server does not know and that has fallen silent."""

    def __init__(self, silent_seconds: int = _SILENT_SECONDS, inst_data: ConfigurableClassData | None = None) -> None:
        super().__init__(inst_data)
        self._silence = timedelta(seconds=silent_seconds)

    @classmethod
    def config_type(cls) -> UserConfigSchema:
        return {"silent_seconds": dg.Field(int, default_value=_SILENT_SECONDS)}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData, config_value: Mapping[str, Any]) -> Self:
        return cls(config_value["silent_seconds"], inst_data)

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """FAILED only for what is known to be gone: a code server that does not answer says nothing of its runs."""
        client = self._get_grpc_client_for_termination(run.run_id)  # type: ignore[no-untyped-call]
        if client is None:
            return CheckRunHealthResult(WorkerStatus.RUNNING)  # it has just ended, or was not started by this launcher
        try:
            known = deserialize_value(client.get_current_runs(), GetCurrentRunsResult)
        except DagsterUserCodeUnreachableError:
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        if run.run_id in known.current_runs or not self._is_silent(run.run_id):
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        return CheckRunHealthResult(
            WorkerStatus.FAILED,
            "the process of this run is gone, with the code server that it was started by. Attempts under way keep"
            " their keys: launch the job again",
        )

    def _is_silent(self, run_id: str) -> bool:
        last = self._instance.get_records_for_run(run_id, limit=1, ascending=False).records
        if not last:
            return False
        return datetime.now(timezone.utc) - datetime.fromtimestamp(last[0].timestamp, timezone.utc) > self._silence
