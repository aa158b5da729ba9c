"""Dagster's own webserver on a run history with one run, and any ASGI application on a port of this machine."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import uvicorn
from starlette.types import ASGIApp

from billing_orchestration.ui.webserver import official_app
from billing_orchestration_tests.waiting import wait_until

HOST = "127.0.0.1"


@dataclass
class DagsterUi:
    """Dagster's webserver as it comes, and the run history behind it."""

    app: ASGIApp
    instance: dg.DagsterInstance

    def add_run(self) -> str:
        """Put a run into the history: what an attack deletes."""
        return self.instance.add_run(dg.DagsterRun(job_name="autopayment_job")).run_id

    def has_run(self, run_id: str) -> bool:
        """Whether it is still there."""
        return self.instance.has_run(run_id)


@contextmanager
def dagster_ui(folder: Path, *, read_only: bool = False, prefix: str = "") -> Iterator[DagsterUi]:
    """Lend the webserver on a run history of its own. It knows no code location: these tests need none."""
    (folder / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    workspace = folder / "workspace.yaml"
    workspace.write_text("load_from: []\n")
    with (
        dg.DagsterInstance.from_config(str(folder)) as instance,
        official_app(instance, workspace, read_only=read_only, prefix=prefix) as app,
    ):
        yield DagsterUi(app, instance)


@contextmanager
def listening(app: ASGIApp) -> Iterator[int]:
    """Serve an application as the command does, on a free port of this machine."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        server = uvicorn.Server(uvicorn.Config(app, proxy_headers=False, lifespan="off", log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started, "a listening server")
        try:
            yield int(listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(30)


def deletion(run_id: str) -> str:
    """The mutation that removes a run from the history."""
    return f'mutation {{ deletePipelineRun(runId: "{run_id}") {{ __typename }} }}'
