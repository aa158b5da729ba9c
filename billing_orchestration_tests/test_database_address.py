"""Addresses of PostgreSQL databases: each usual form is read alike for both databases, and no fault quotes a part."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

from billing_orchestration.database.engine import create_engine
from billing_orchestration.database_address import read_address, read_run_history_address

ROOT = Path(__file__).parents[1]
PLAIN = {"user": "u", "password": "p", "host": "h", "dbname": "db"}


def connected_with(url: sa.URL) -> dict[str, Any]:
    dialect: Any = PGDialect_psycopg
    return dict(dialect().create_connect_args(sa.make_url(url.render_as_string(hide_password=False)))[1])


@pytest.mark.parametrize("read", [read_address, read_run_history_address])
@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("postgresql://u:p@h/db", PLAIN),
        ("postgres://u:p@h/db", PLAIN),
        ("postgresql+psycopg2://u:p@h/db", PLAIN),
        ("postgresql://u:p%40%2Fw@h:6543/db?sslmode=require",
         PLAIN | {"password": "p@/w", "port": 6543, "sslmode": "require"}),
        ("postgresql://u:p@[::1]:6543/db", PLAIN | {"host": "::1", "port": 6543}),
        ("postgresql://u:@/db?host=/var/run/pg", {"user": "u", "host": "/var/run/pg", "dbname": "db"}),
        ("postgres://u:p@h1,h2/db?target_session_attrs=read-write",
         PLAIN | {"host": "h1,h2", "target_session_attrs": "read-write"}),
        ("postgresql://u:p@/db?host=h1,h2&port=5432,5433", PLAIN | {"host": "h1,h2", "port": "5432,5433"}),
    ],
)  # fmt: skip
def test_every_form_that_both_databases_take_means_the_same(read: Any, given: str, meant: dict[str, Any]) -> None:
    assert connected_with(read(given)) == meant


@pytest.mark.parametrize(
    ("given", "meant", "words"),
    [
        ("postgresql+psycopg://u:p@h/db", PLAIN, "psycopg 3"),
        ("postgresql://u:p@h1:5432,h2:5433/db", PLAIN | {"host": "h1,h2", "port": "5432,5433"}, "cannot read"),
        # SQLAlchemy would give both hosts the one port.
        ("postgresql://u:p@h1,h2:5433/db", PLAIN | {"host": "h1,h2", "port": ",5433"}, "something else to Dagster"),
        ("postgresql://u:p@%2Frun%2Fpg/db", PLAIN | {"host": "/run/pg"}, "something else to Dagster"),
        ("postgresql://u:p@h/db?ssl=true", PLAIN | {"sslmode": "require"}, "something else to Dagster"),
    ],
)
def test_what_dagster_would_read_otherwise_is_refused_for_the_run_history_alone(
    given: str, meant: dict[str, Any], words: str
) -> None:
    assert connected_with(read_address(given)) == meant
    with pytest.raises(ValueError, match=words):
        read_run_history_address(given)


@pytest.mark.parametrize("read", [read_address, read_run_history_address])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("mysql://u:secret@h/db", "must begin with postgresql://"),
        ("postgresql+asyncpg://u:secret@h/db", "must begin with postgresql://"),
        ("u:secret@h/db", "must begin with postgresql://"),
        ("host=h password=secret dbname=db", "must begin with postgresql://"),
        ("postgresql://u:secret@h", "names no database"),
        ("postgresql://u:secret@h/", "names no database"),
        ("postgresql://", "names no database"),
        ("postgresql://u:p@secret@h/db", "holds an invalid host"),
        ("postgresql://u:p@h/db?host=secret:5432&host=secret:5433", "holds an invalid host"),
        ("postgresql://u:secret@h:port/db", "holds an invalid port"),
        ("postgresql://u:secret@h:99999/db", "holds an invalid port"),
        ("postgresql://u:p/secret@h/db", "holds an invalid port"),
        ("postgresql://u:12345/secret@h/db", "names a database with an @"),
        ("postgresql://u:secret@/db?host=a,b&port=1,2,3", "as many as hosts"),
        ("postgresql://u:p%secret@h/db", "cannot be read"),
        ("postgresql://u:p secret@h/db", "cannot be read"),
        ("postgresql://u:secret@[::1/db", "cannot be read"),
        ("postgresql://u:p@h/db?pool_timeout=3", r"an option after the \?"),
        ("postgresql://u:p@h/db?sslmode=require&secret=1", r"an option after the \?"),
    ],
)
def test_a_fault_says_what_is_wrong_in_one_line_and_quotes_nothing(read: Any, given: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read(given)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_first_host_that_accepts_writes_is_used(database_url: str) -> None:
    address = sa.make_url(database_url)
    both = address.update_query_dict(
        {"host": f"/nowhere,{address.query['host']}", "target_session_attrs": "read-write"}
    )
    engine = create_engine(read_address(both.render_as_string(hide_password=False)).render_as_string(False))
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT current_database()")) == address.database
    engine.dispose()


# Dagster's own commands


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg2"])
def test_dagster_keeps_its_runs_at_an_address_of_each_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database_url: str, scheme: str
) -> None:
    """The addresses that `doctor` accepts are those that Dagster, which reads them by itself, can use."""
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", empty_database_url.replace("postgresql", scheme, 1))
    (tmp_path / "dagster.yaml").write_text((ROOT / "deploy" / "dagster.yaml").read_text())

    @dg.op
    def nothing() -> None:
        """Does nothing."""

    @dg.job(executor_def=dg.in_process_executor)
    def a_job() -> None:
        nothing()

    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        run_id = a_job.execute_in_process(instance=instance).run_id
        # As another process of the deployment opens it.
        with dg.DagsterInstance.from_ref(instance.get_ref()) as other:
            assert other.get_run_by_id(run_id)
            assert other.all_logs(run_id)


def test_in_a_clean_checkout_definitions_validate_without_any_environment(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DAGSTER_", "BILLING_"))}
    (tmp_path / "dagster.yaml").write_text((ROOT / "dagster.yaml").read_text())
    validated = subprocess.run(
        [Path(sys.executable).parent / "dagster", "definitions", "validate", "-m", "billing_orchestration.definitions"],
        env=environment | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert validated.returncode == 0, validated.stderr[-2000:]
