"""Every text that a run history holds: what a reader of Dagster's database sees."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import dagster as dg
import sqlalchemy as sa


def texts(instance: dg.DagsterInstance) -> Iterator[tuple[str, str]]:
    """Each value of each table of a run history: the table's name, and the value as text."""
    storages: list[Any] = [instance.event_log_storage, instance.run_storage]
    for storage in storages:
        with (storage.index_connection if storage is instance.event_log_storage else storage.connect)() as connection:
            yield from _of_database(connection)


def _of_database(connection: sa.Connection) -> Iterator[tuple[str, str]]:
    for table in sa.inspect(connection).get_table_names():
        for row in connection.execute(sa.text(f'SELECT * FROM "{table}"')):
            yield from ((table, _text(value)) for value in row if value is not None)


def _text(value: Any) -> str:
    if not isinstance(value, (bytes, memoryview)):
        return str(value)
    try:
        return zlib.decompress(value).decode("utf-8", "replace")
    except zlib.error:
        return bytes(value).decode("utf-8", "replace")


def found_in(told: Sequence[tuple[Any, str]], marks: Sequence[str]) -> list[str]:
    """Where a mark stands in one of these texts, with what is around it."""
    return [
        f"{mark} in {where}: …{text[max(0, text.find(mark) - 120) : text.find(mark) + 60]}"
        for where, text in told
        for mark in marks
        if mark in text
    ]
