"""The service that job tests run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.jobs.service import Service


@pytest.fixture
def service(engine: sa.Engine, database_url: str, sandbox: Sandbox) -> Service:
    """A service on a fresh database and a fresh sandbox, in UTC."""
    return Service(engine, database_url, sandbox)


@pytest.fixture
def service_with(engine: sa.Engine, database_url: str, sandbox: Sandbox) -> Callable[..., Service]:
    """The same, with settings of the test's own (`billing_timezone="Europe/Moscow"`)."""

    def build(**settings: Any) -> Service:
        return Service(engine, database_url, sandbox, **settings)

    return build
