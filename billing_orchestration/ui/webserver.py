"""`billing-orchestration webserver`: Dagster's webserver as its own command starts it, behind the guard.

It reads no setting of the shop or the billing database: beside those of the UI it needs the run history's address (by
DAGSTER_HOME) and a workspace file that says where the code is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import uvicorn

# Dagster has no public way to its webserver as an object; these are what its own command is made of.
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import WorkspaceFileTarget
from dagster_webserver.app import create_app_from_workspace_process_context
from dotenv import load_dotenv
from starlette.types import ASGIApp

from billing_orchestration.database_address import keep_addresses_out_of_logs
from billing_orchestration.loopback import is_loopback
from billing_orchestration.settings import SettingsError, load_ui_settings
from billing_orchestration.ui.documents import Documents, documents_folder
from billing_orchestration.ui.guard import Guard

# Dagster's own defaults.
_STATEMENT_TIMEOUT_MS = 15_000
_POOL_RECYCLE_S = 3600
_POOL_MAX_OVERFLOW = 20
_POLL_RATE_MS = 2000


def serve(host: str, port: int, workspace: Path, prefix: str) -> None:
    """Serve the UI until interrupted. Raises SettingsError, before it listens, for what must not be served so."""
    keep_addresses_out_of_logs()
    settings = load_ui_settings()
    login = settings.ui_login
    if login is None and not is_loopback(host):
        raise SettingsError(
            {"UI_AUTH": "UI_AUTH is not set, so the UI listens on this machine only: set it, or use --host 127.0.0.1"}
        )
    load_dotenv(".env")  # for dagster.yaml and the workspace file
    if not os.environ.get("DAGSTER_HOME"):
        raise SettingsError(
            {"DAGSTER_HOME": "DAGSTER_HOME is not set: name the folder with a copy of deploy/dagster.yaml"}
        )
    if not workspace.is_file():
        raise SettingsError({"--workspace": f"{workspace} is no file: name the workspace file with -w"})
    with (
        dg.DagsterInstance.get() as instance,
        official_app(instance, workspace, read_only=settings.ui_read_only, prefix=prefix) as app,
    ):
        uvicorn.run(
            Guard(Documents(app, documents_folder(), prefix), names=settings.ui_names, login=login, prefix=prefix),
            host=host,
            port=port,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # the guard must know who is connected, not whom a header names
        )


@contextmanager
def official_app(instance: dg.DagsterInstance, workspace: Path, *, read_only: bool, prefix: str) -> Iterator[ASGIApp]:
    """Dagster's webserver as an ASGI application, connected to its code locations."""
    instance.optimize_for_webserver(_STATEMENT_TIMEOUT_MS, _POOL_RECYCLE_S, _POOL_MAX_OVERFLOW)
    with WorkspaceProcessContext(
        instance, WorkspaceFileTarget([str(workspace)]), version=dg.__version__, read_only=read_only
    ) as context:
        yield create_app_from_workspace_process_context(context, prefix, _POLL_RATE_MS)
