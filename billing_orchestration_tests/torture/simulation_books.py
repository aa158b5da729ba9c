"""Some quiet days of a small service, played once, and copies of their books to be spoiled."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from typing import Any

import psycopg
import pytest

from billing_orchestration_tests.fixtures.postgres import Server
from billing_orchestration_tests.torture.simulation.judge import Journal, Rules
from billing_orchestration_tests.torture.simulation.mishaps import MISHAPS
from billing_orchestration_tests.torture.simulation.oracle import Oracle
from billing_orchestration_tests.torture.simulation.story import Simulation
from billing_orchestration_tests.torture.simulation.traits import draw_traits

SEED, DAYS = 7, 14
RENEWED = "SELECT external_payment_id FROM one_renewal"
OURS = f"external_payment_id = ({RENEWED})"


@dataclass
class Played:
    """What a simulation has left behind."""

    database: str
    simulation: Simulation


@dataclass
class Books:
    """A copy of it, to be spoiled."""

    connection: psycopg.Connection[Any]
    journal: Journal
    oracle: Oracle
    ledger: list[Any]
    payments: dict[str, Any]
    now: datetime

    def execute(self, statement: str) -> None:
        """Spoil the tables."""
        for index in ("payments", "renewal_attempts"):
            found = self.connection.execute(
                "SELECT format('%%I.%%I', schemaname, indexname) FROM pg_indexes"
                " WHERE tablename = %s AND indexname NOT LIKE '%%pkey'", (index,)
            )  # fmt: skip
            for (name,) in found.fetchall():
                with suppress(psycopg.errors.DependentObjectsStillExist):
                    self.connection.execute(f"DROP INDEX {name}")
        self.connection.execute("SET session_replication_role = replica")
        assert self.connection.execute(statement).rowcount, "nothing was spoiled"

    def renewed(self) -> str:
        """A renewal of ours that was settled."""
        found = self.connection.execute(RENEWED).fetchone()
        assert found is not None
        return str(found[0])

    def complaints(self) -> list[str]:
        """What the judge says every day."""
        return self.oracle.violations(self.ledger, self.payments, self.now)

    def unsettled(self) -> list[str]:
        """What it says after a green tick."""
        return self.oracle.unsettled(self.ledger, self.payments, self.now, self.now)


@pytest.fixture(scope="module")
def played(postgres_server: Server, migrated_template: str) -> Iterator[Played]:
    """Quiet days of a small service; the connections are closed, so that the database can be copied."""
    database = postgres_server.create_database(migrated_template)
    traits = replace(
        draw_traits(SEED), accidents=0.0, zone="UTC", writes_unknown=True, settles_renewals="leave",
        provider_skew=timedelta(0), service_skew=timedelta(0), list_lag=timedelta(0), max_concurrency=1,
    )  # fmt: skip
    simulation = Simulation(postgres_server.url(database), SEED, traits=traits)
    try:
        simulation.play(DAYS)
        assert not simulation.world.faults
        # One that nobody refunded, so that each test spoils a sound one.
        simulation.world.service.connection.execute(
            "CREATE TABLE one_renewal AS SELECT external_payment_id FROM billing_orchestration.settlements"
            " WHERE kind = 'renewed' AND NOT external_payment_id = ANY(%s) ORDER BY settled_at LIMIT 1",
            (list(simulation.world.journal.refunded),),
        )
    finally:
        simulation.world.close()
    yield Played(database, simulation)
    postgres_server.drop_database(database)


@pytest.fixture
def books(postgres_server: Server, played: Played) -> Iterator[Books]:
    """A copy for one test."""
    world = played.simulation.world
    with postgres_server.database(played.database) as url, psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET TIME ZONE 'UTC'")
        journal = copy.deepcopy(world.journal)
        rules = Rules(
            timezone.utc, world.traits.grace_days, world.traits.ttl_days, timedelta(0), timedelta(0), frozenset(MISHAPS)
        )
        yield Books(
            connection, journal, Oracle(connection, journal, rules), copy.deepcopy(world.provider.ledger()),
            copy.deepcopy(world.payments()), world.now,
        )  # fmt: skip
