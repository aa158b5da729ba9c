"""What may happen to PostgreSQL during a run, and how each is mended."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sa

from billing_orchestration_tests.fixtures.postgres import Server
from billing_orchestration_tests.jobs.service import Service
from billing_orchestration_tests.torture.kill_scenarios import Scenario, Story

_OURS = "billing-orchestration"
# In production a lock is waited for ten seconds, and somebody's transaction holds it for a minute. Here it is held
# until the run has ended, and waited for a fifth of a second.
_LOCK_TIMEOUT = "options=-c%20lock_timeout%3D200ms"


@dataclass
class World:
    """What a fault is done to."""

    server: Server
    url: str
    disk: Path | None = None
    somebody: list[psycopg.Connection[Any]] = field(default_factory=list)

    @property
    def database(self) -> str:
        """The database's name."""
        return str(sa.make_url(self.url).database)


@dataclass(frozen=True)
class Fault:
    """Something that happens to PostgreSQL, and how it is mended. `words`: what a run that fails by it must say."""

    name: str
    strike: Callable[[World], None]
    mend: Callable[[World], None] = lambda _: None
    words: str = "the next run|BILLING_DATABASE_URL"
    needs_disk: bool = False
    url_suffix: str = ""


def _cut(world: World) -> None:
    with world.server.connect() as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE datname = %s AND application_name = %s",
            (world.database, _OURS),
        )


def _restart(world: World) -> None:
    world.server.stop()
    world.server.start()


def _start_again(world: World) -> None:
    """However far it was: one that has not yet noticed a panic of its own would answer, and recover a moment later."""
    if world.server.is_running:
        world.server.crash()
    world.server.start()


def _lock_rows(world: World) -> None:
    """Everything that is not locked by the run itself: somebody's transaction, which hangs."""
    somebody = psycopg.connect(world.url)
    world.somebody.append(somebody)
    for table in ("subscriptions", "payments", "billing_orchestration.renewal_attempts"):
        somebody.execute(f"SELECT FROM {table} FOR UPDATE SKIP LOCKED")


def _let_go(world: World) -> None:
    for somebody in world.somebody:
        somebody.close()
    world.somebody.clear()


def _refuse_to_grow(world: World) -> None:
    with psycopg.connect(world.url, autocommit=True) as connection:
        connection.execute("INSERT INTO torture_disk VALUES ('full')")


def _grow_again(world: World) -> None:
    with psycopg.connect(world.url, autocommit=True) as connection:
        connection.execute("DELETE FROM torture_disk")


def ballast(disk: Path | None) -> Path:
    """The file that fills a disk, and frees it when it goes."""
    assert disk is not None
    return disk / "ballast"


def fill(disk: Path | None) -> None:
    """To the last byte."""
    with ballast(disk).open("wb", buffering=0) as file, suppress(OSError):
        for size in (2**20, 4096, 1):
            with suppress(OSError):
                while file.write(b"\0" * size) == size:
                    pass


def _fill_disk(world: World) -> None:
    fill(world.disk)


def _fill_disk_and_log(world: World) -> None:
    """And then the write-ahead log needs its next file: PostgreSQL panics."""
    fill(world.disk)
    with suppress(psycopg.Error), world.server.connect() as connection:
        connection.execute("SET lock_timeout = '5s'")
        for _ in range(50):
            connection.execute("SELECT pg_logical_emit_message(false, 'torture', repeat('x', 8000))")
            connection.execute("SELECT pg_switch_wal()")
        raise AssertionError("the log found room on a full disk")


def _free_disk(world: World) -> None:
    ballast(world.disk).unlink(missing_ok=True)
    _start_again(world)


_ABOUT_THE_DISK = "disk of the PostgreSQL server is full.*Free disk space.*the next run"
CUT = Fault("connections cut", _cut)
RESTARTED = Fault("restarted", _restart)
CRASHED = Fault("crashed and recovered", _start_again)
LOCKED = Fault(
    "rows locked by somebody", _lock_rows, _let_go, "the next run|wait for tomorrow", url_suffix=_LOCK_TIMEOUT
)
FULL_FOR_STATEMENTS = Fault("disk full (53100 from a trigger)", _refuse_to_grow, _grow_again, _ABOUT_THE_DISK)
FULL = Fault(
    "disk full", _fill_disk, _free_disk, f"{_ABOUT_THE_DISK}|the next run|BILLING_DATABASE_URL", needs_disk=True
)
PANIC = Fault("disk full, PostgreSQL panics", _fill_disk_and_log, _free_disk, needs_disk=True)
FAULTS = (CUT, RESTARTED, CRASHED, LOCKED, FULL_FOR_STATEMENTS, FULL, PANIC)

_TRIGGERS = """
    CREATE TABLE torture_disk (state text);
    CREATE FUNCTION torture_disk_full() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF EXISTS (SELECT FROM public.torture_disk) THEN
            RAISE disk_full USING MESSAGE = 'could not extend file "base/16384/16385": No space left on device';
        END IF;
        RETURN NULL;
    END $$;
    DO $$ DECLARE name text; BEGIN
        FOR name IN SELECT schemaname || '.' || tablename FROM pg_tables WHERE tablename <> 'torture_disk'
            AND (schemaname = 'billing_orchestration' OR tablename IN ('subscriptions', 'payments'))
        LOOP
            EXECUTE 'CREATE TRIGGER torture_disk_full BEFORE INSERT OR UPDATE ON ' || name
                || ' FOR EACH STATEMENT EXECUTE FUNCTION torture_disk_full()';
        END LOOP;
    END $$
"""


def with_triggers(scenario: Scenario) -> Scenario:
    """The same in a database whose tables say that the disk is full when a row of `torture_disk` says so."""

    def prepare(service: Service) -> Story:
        story = scenario.prepare(service)
        with service.engine.begin() as connection:
            connection.exec_driver_sql(_TRIGGERS)
        return story

    return replace(scenario, prepare=prepare)
