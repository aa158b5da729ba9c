"""A registry's file, CSV or XLSX, as lines of cells."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from openpyxl import load_workbook

from billing_orchestration.domain.registry import Registry, RegistryFault, find_columns, read_registry

_SEPARATORS = (";", ",", "\t")
# How such a file begins.
_OLD_WORKBOOK = bytes.fromhex("d0cf11e0")


def load_registry(path: Path, named: Mapping[str, str], encoding: str) -> Registry:
    """Read a registry. Raises RegistryFault, one line that names the file and its line."""
    try:
        data = path.read_bytes()
        if data.startswith(_OLD_WORKBOOK):
            raise RegistryFault("line 1: a workbook of an old kind (.xls): save it as .xlsx or .csv")
        table = _workbook(data) if data[:2] == b"PK" else _text(data, named, encoding)
        return read_registry(table, named)
    except OSError as error:
        raise RegistryFault(f"{path} cannot be read: {error.strerror or error}") from error
    except RegistryFault as fault:
        raise RegistryFault(f"{path}: {fault}") from None


def _workbook(data: bytes) -> Iterator[tuple[int, list[Any]]]:
    """Rows as wide as the widest so far: many programs end a row with its last filled cell."""
    width = 0
    try:
        book = load_workbook(io.BytesIO(data), read_only=True, data_only=True)
        for number, cells in enumerate(book.worksheets[0].iter_rows(values_only=True), 1):
            filled = list(cells)
            while filled and filled[-1] is None:
                filled.pop()
            width = max(width, len(filled))
            yield number, filled + [None] * (width - len(filled))
    except Exception as error:  # whatever the parsers of archives and XML raise
        raise RegistryFault(f"line 1: not a workbook ({type(error).__name__})") from error


def _text(data: bytes, named: Mapping[str, str], encoding: str) -> Iterator[tuple[int, list[str]]]:
    try:
        text = data.decode("utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding)
    except LookupError:
        raise RegistryFault(f"{encoding!r} is not an encoding; use utf-8 or cp1251") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        other = "cp1251" if encoding.lower().startswith("utf") else "utf-8"
        raise RegistryFault(f"line {line} is not {encoding} text: try --encoding {other}") from None
    separator = next(
        (sign for sign in _SEPARATORS if any(_names_ids(cells, named) for cells in _head(text, sign))), ";"
    )
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as error:
        raise RegistryFault(f"line {reader.line_num}: {error}") from error


def _names_ids(cells: list[str], named: Mapping[str, str]) -> bool:
    return not {"payment_id", "refund_id"}.isdisjoint(find_columns(cells, named))


def _head(text: str, separator: str) -> list[list[str]]:
    """The first lines, cut at a separator. Quotes do not matter for finding a title."""
    return [[cell.strip('" ') for cell in line.split(separator)] for line in text.splitlines()[:20]]
