"""Where Dagster keeps its run history: dagster-postgres, told by DAGSTER_POSTGRES_URL, or ended in one line.

dagster.yaml names this class. Dagster's own `postgres:` setting does the same work, but a missing, empty or wrong
address is there some seventy lines of traces, most of which do not name the setting, and `.env` is not read for it.
It is loaded by every process of Dagster, so it imports nothing that those do not import anyway.
"""

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dagster._serdes import ConfigurableClassData
from dagster_postgres import DagsterPostgresStorage

VARIABLE = "DAGSTER_POSTGRES_URL"
_FORM = "postgresql+psycopg2://USER:PASSWORD@HOST:5432/DATABASE"
_NOTHING_DONE = "Nothing was read or written"


class RunHistoryUnavailable(RuntimeError):
    """The run history cannot be used; one line that names the setting and the way out, without its value."""


class RunHistoryStorage(DagsterPostgresStorage):
    """dagster-postgres at DAGSTER_POSTGRES_URL, from the environment or `.env`."""

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        """No config: the address is a secret, and stands in no file of Dagster's."""
        return {}

    @classmethod
    def from_config_value(
        cls,
        inst_data: ConfigurableClassData | None,
        config_value: Mapping[str, Any],  # noqa: ARG003 - Dagster's interface
    ) -> "RunHistoryStorage":
        """Open it. A process whose main thread asks is ended with one line when that is not possible."""
        try:
            return cls._open(inst_data)
        except RunHistoryUnavailable as error:
            if threading.current_thread() is threading.main_thread():
                raise SystemExit(str(error)) from None
            raise

    @classmethod
    def _open(cls, inst_data: ConfigurableClassData | None) -> "RunHistoryStorage":
        from sqlalchemy.exc import SQLAlchemyError

        url = run_history_url()
        try:
            return cls(url, inst_data=inst_data)
        # What dagster-postgres raises when it gave up trying has the database's words in its cause.
        except Exception as error:
            cause = error if isinstance(error, SQLAlchemyError) else error.__cause__
            reason = getattr(cause, "orig", None) or cause or error
            raise RunHistoryUnavailable(
                f"the run history's database ({VARIABLE}) cannot be used: {_first_line(reason)}. Correct the address,"
                f" or start the server. {_NOTHING_DONE}"
            ) from error

    @property
    def run_storage_data(self) -> ConfigurableClassData | None:
        """None: what opens a part of it opens it as a whole, by this class."""
        return None

    @property
    def event_storage_data(self) -> ConfigurableClassData | None:
        """None, as `run_storage_data`."""
        return None

    @property
    def schedule_storage_data(self) -> ConfigurableClassData | None:
        """None, as `run_storage_data`."""
        return None


def run_history_url() -> str:
    """The checked address, for psycopg 2. Raises RunHistoryUnavailable; the address itself is never shown."""
    url = os.environ.get(VARIABLE, "").strip() or _from_env_file().strip()
    if not url:
        raise RunHistoryUnavailable(
            f"{VARIABLE} is not set: put the address of the run history's own database, {_FORM}, into the environment"
            f" or .env. {_NOTHING_DONE}"
        )
    scheme, separator, rest = url.partition("://")
    if not separator or not rest or scheme not in ("postgresql", "postgres", "postgresql+psycopg2"):
        raise RunHistoryUnavailable(
            f"{VARIABLE} is not a PostgreSQL address; it must look like {_FORM}. {_NOTHING_DONE}"
        )
    # dagster-postgres works on psycopg 2 only (docs/decisions/0001).
    return f"postgresql+psycopg2://{rest}"


def _from_env_file() -> str:
    if not Path(".env").is_file():
        return ""
    from dotenv import dotenv_values

    return dotenv_values(".env").get(VARIABLE) or ""


def _first_line(error: object) -> str:
    text = str(error).strip()
    return " ".join(text.splitlines()[0].split()) if text else type(error).__name__
