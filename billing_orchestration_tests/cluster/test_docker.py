"""deploy/compose/dagster.yaml by Dagster's own launcher for Docker. Nothing here starts a container."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest
from dagster_docker import DockerRunLauncher

ROOT = Path(__file__).parents[2]


def test_dagster_takes_the_launcher_of_compose(
    tmp_path: Path, empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", empty_database_url)
    (tmp_path / "dagster.yaml").write_text((ROOT / "deploy" / "compose" / "dagster.yaml").read_text())

    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        launcher = instance.run_launcher

    assert isinstance(launcher, DockerRunLauncher)
    assert launcher.supports_check_run_worker_health
    assert launcher.container_kwargs["stop_timeout"] > 60
