"""The run history's address: from the environment or .env, and one line when it is missing or wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from billing_orchestration.run_history_storage import RunHistoryStorage, RunHistoryUnavailable, run_history_url

ROOT = Path(__file__).parents[1]
PASSWORD = "a-password-of-nobody"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without .env, and an environment without the setting."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DAGSTER_POSTGRES_URL", raising=False)
    return tmp_path


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg2"])
def test_the_address_is_opened_by_psycopg_2_whatever_its_form(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", f" {scheme}://user:pw@host:5432/runs ")
    assert run_history_url() == "postgresql+psycopg2://user:pw@host:5432/runs"


def test_the_address_is_read_from_the_env_file_and_the_environment_goes_first(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (elsewhere / ".env").write_text("DAGSTER_POSTGRES_URL=postgresql://from/file\n")
    assert run_history_url() == "postgresql+psycopg2://from/file"
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", "postgresql://from/environment")
    assert run_history_url() == "postgresql+psycopg2://from/environment"


@pytest.mark.parametrize("value", ["nonsense", "mysql://host/db", "postgresql://", f"http://{PASSWORD}@host"])
def test_a_wrong_address_is_told_without_its_value(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", value)
    with pytest.raises(RunHistoryUnavailable, match="DAGSTER_POSTGRES_URL is not a PostgreSQL address") as told:
        run_history_url()
    assert PASSWORD not in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (None, "DAGSTER_POSTGRES_URL is not set"),
        ("  ", "DAGSTER_POSTGRES_URL is not set"),
        (f"redis://user:{PASSWORD}@host", "DAGSTER_POSTGRES_URL is not a PostgreSQL address"),
    ],
)
def test_a_command_of_dagster_ends_with_one_line_that_names_the_setting(
    elsewhere: Path, value: str | None, sentence: str
) -> None:
    (elsewhere / "dagster.yaml").write_text((ROOT / "dagster.yaml").read_text())
    environment = {name: text for name, text in os.environ.items() if not name.startswith("DAGSTER_")}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    if value is not None:
        environment["DAGSTER_POSTGRES_URL"] = value
    command = [str(Path(sys.executable).parent / "dagster"), "job", "execute"]
    command += ["-m", "billing_orchestration.definitions", "-j", "expire_payments_job"]

    ended = subprocess.run(
        command, env=environment, cwd=elsewhere, capture_output=True, text=True, timeout=120, check=False
    )

    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith(sentence)
    assert last.endswith("Nothing was read or written")
    assert "Traceback" not in ended.stderr
    assert PASSWORD not in ended.stdout + ended.stderr


def test_the_run_history_of_our_dagster_yaml_keeps_runs(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, empty_database_url: str
) -> None:
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", empty_database_url)
    (elsewhere / "dagster.yaml").write_text((ROOT / "dagster.yaml").read_text())

    @dg.op
    def nothing() -> None:
        """Does nothing."""

    @dg.job(executor_def=dg.in_process_executor)
    def a_job() -> None:
        nothing()

    with dg.DagsterInstance.from_config(str(elsewhere)) as instance:
        stored_by = instance.get_ref().storage_data
        assert stored_by is not None
        assert stored_by.class_name == RunHistoryStorage.__name__
        run_id = a_job.execute_in_process(instance=instance).run_id
        # As another process of the deployment opens it.
        with dg.DagsterInstance.from_ref(instance.get_ref()) as other:
            run = other.get_run_by_id(run_id)
            assert run is not None
            assert run.is_success
            assert other.all_logs(run_id)
