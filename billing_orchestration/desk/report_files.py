"""Reports as files: a workbook with sheets (.xlsx), or a file for each sheet (.csv). Row by row, whole or not at all.

What a cell shows is foreign text: it never becomes a formula, and holds nothing that a spreadsheet cannot.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from openpyxl import Workbook
from openpyxl.utils.exceptions import WorkbookAlreadySaved

from billing_orchestration.domain.printable import no_formula

LINES = "lines"
# A sheet of a workbook ends there; a longer one goes on in the next.
ROWS_OF_A_SHEET = 1_048_576


class Sheet(NamedTuple):
    """A sheet: its key, and what its reader sees."""

    key: str
    title: str
    header: Sequence[str]


class ReportFile(Protocol):
    """An open report."""

    def write(self, sheet: str, row: Sequence[Any]) -> None:
        """Add a row to one of the sheets, named by its key."""


@contextmanager
def open_report(path: Path, sheets: Sequence[Sheet], *, russian: bool) -> Iterator[ReportFile]:
    """A report with these sheets. Its files appear when all of it is written, and not before."""
    is_book = path.suffix.lower() == ".xlsx"
    report = _Book(path, sheets) if is_book else _Files(path, sheets, russian=russian)
    try:
        yield report
        report.finish()
    except BaseException:
        report.discard()
        raise


def files_of(path: Path, sheets: Sequence[Sheet]) -> dict[str, Path]:
    """The file of each sheet: a workbook for all, or for CSV one each, of which that of all lines has the name itself.

    Raises ValueError for a name that ends with neither .xlsx nor .csv.
    """
    if path.suffix.lower() not in (".xlsx", ".csv"):
        raise ValueError(f"{path} must end with .xlsx or .csv")
    one = path.suffix.lower() == ".xlsx"
    return {
        sheet.key: path if one or sheet.key == LINES else path.with_suffix(f".{sheet.key}{path.suffix}")
        for sheet in sheets
    }


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        text = "".join(sign if sign.isprintable() else "\ufffd" for sign in value)
        return no_formula(text)
    return value.replace(tzinfo=None) if isinstance(value, datetime) else value


class _Book:
    def __init__(self, path: Path, sheets: Sequence[Sheet]) -> None:
        self._path, self._part = path, path.with_suffix(".part")
        self._book = Workbook(write_only=True)
        self._sheets = {sheet.key: sheet for sheet in sheets}
        self._open = {sheet.key: self._book.create_sheet(sheet.title) for sheet in sheets}
        self._rows = dict.fromkeys(self._sheets, 0)
        self._parts = dict.fromkeys(self._sheets, 1)
        for sheet in sheets:
            self.write(sheet.key, sheet.header)

    def write(self, sheet: str, row: Sequence[Any]) -> None:
        if self._rows[sheet] == ROWS_OF_A_SHEET:
            self._parts[sheet] += 1
            self._rows[sheet] = 0
            self._open[sheet] = self._book.create_sheet(f"{self._sheets[sheet].title} {self._parts[sheet]}")
            self.write(sheet, self._sheets[sheet].header)
        self._open[sheet].append([_cell(value) for value in row])
        self._rows[sheet] += 1

    def finish(self) -> None:
        self._book.save(self._part)
        self._part.replace(self._path)

    def discard(self) -> None:
        self._part.unlink(missing_ok=True)
        with suppress(WorkbookAlreadySaved):
            for sheet in self._book.worksheets:
                sheet.close()  # its temporary file


class _Files:
    def __init__(self, path: Path, sheets: Sequence[Sheet], *, russian: bool) -> None:
        # A Russian spreadsheet separates cells by semicolons and decimals by commas: 10.12 would be a day in December.
        self._russian = russian
        self._paths = {key: (file.with_suffix(".part"), file) for key, file in files_of(path, sheets).items()}
        # With a byte order mark: without it, a spreadsheet takes UTF-8 for another encoding.
        self._files = {key: part.open("w", encoding="utf-8-sig", newline="") for key, (part, _) in self._paths.items()}
        self._writers = {key: csv.writer(file, delimiter=";" if russian else ",") for key, file in self._files.items()}
        for sheet in sheets:
            self.write(sheet.key, sheet.header)

    def write(self, sheet: str, row: Sequence[Any]) -> None:
        self._writers[sheet].writerow([self._shown(value) for value in row])

    def finish(self) -> None:
        for file in self._files.values():
            file.close()
        for part, path in self._paths.values():
            part.replace(path)

    def discard(self) -> None:
        for file in self._files.values():
            file.close()
        for part, _ in self._paths.values():
            part.unlink(missing_ok=True)

    def _shown(self, value: Any) -> Any:
        if isinstance(value, Decimal):
            return str(value).replace(".", ",") if self._russian else str(value)
        return _cell(value)
