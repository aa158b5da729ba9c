"""Plays seeds, each in a database of its own, in processes that end with the one that has started them."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import psycopg
import sqlalchemy as sa

from billing_orchestration.database.engine import create_engine
from billing_orchestration.database.migrating import migrate
from billing_orchestration.sandbox.provider.account import SandboxProvider
from billing_orchestration.sandbox.provider.server import Sandbox, running_sandbox
from billing_orchestration_tests.fixtures.postgres import start_server
from billing_orchestration_tests.torture.simulation.results import Result
from billing_orchestration_tests.torture.simulation.story import DAYS, Simulation
from billing_orchestration_tests.torture.simulation.traits import Traits, draw_traits


def play_seed(
    admin_url: str,
    template: str,
    seed: int,
    days: int = DAYS,
    traits: Traits | None = None,
    *,
    mishaps: frozenset[str] = frozenset(),
    live: bool = False,
) -> Result:
    """Play one seed in a database of its own. `admin_url`: any database of the server; `template`: a migrated one.

    `mishaps`: those that befall it whatever was drawn.
    """
    name = f"simulation_{os.getpid()}_{seed}_{time.monotonic_ns()}"
    began = time.monotonic()
    with psycopg.connect(admin_url, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        url = _with_database(admin_url, name)
        try:
            with _served(seed) as served:
                simulation = Simulation(url, seed, served=served, traits=traits or draw_traits(seed, mishaps))
                try:
                    simulation.world.live = live
                    simulation.play(days)
                    world = simulation.world
                    return Result(
                        seed, days, world.runs, tuple(world.faults), tuple(world.told), time.monotonic() - began,
                        simulation.numbers(),
                    )  # fmt: skip
                finally:
                    simulation.world.close()
        finally:
            admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def _with_database(url: str, name: str) -> str:
    return sa.make_url(url).set(database=name).render_as_string(hide_password=False)


@contextmanager
def _served(seed: int) -> Iterator[Sandbox | None]:
    """The sandbox over HTTP for every tenth seed; otherwise it is called in process."""
    if seed % 10:
        yield None
        return
    with running_sandbox(SandboxProvider(seed=seed)) as sandbox:
        yield sandbox


@contextmanager
def simulated_server() -> Iterator[tuple[str, str]]:
    """A PostgreSQL of its own with a migrated template in it."""
    with start_server() as server:
        template = server.create_database()
        engine = create_engine(server.url(template))
        migrate(engine, echo=lambda _: None)
        engine.dispose()
        yield server.url(), template


def end_with_parent() -> None:
    """From now on this process ends when the one that has started it does, however that ended."""
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("only for a process that multiprocessing has started")

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="ends with the parent", daemon=True).start()


def _begin_worker() -> None:
    end_with_parent()
    # What interrupts all of them is told by the parent, once; it ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def workers_of(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that play seeds; an interruption ends them at once instead of waiting for sixty days of each."""
    workers = ProcessPoolExecutor(count, initializer=_begin_worker)
    try:
        yield workers
    except BaseException:
        for process in list(workers._processes.values()):
            process.kill()
        raise
    finally:
        workers.shutdown(cancel_futures=True)
