"""`reconcile`: both sides' books of a period, day by day, as a report; a registry may be the third side. It only reads.

A day is in memory at a time, never a month. The sums of every day must close to the kopeck.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import date, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pandas as pd
from rich.console import Console
from rich.progress import track

from billing_orchestration.both_sides import read_books, read_provider
from billing_orchestration.database.engine import read
from billing_orchestration.desk.reconciliation_words import (
    LINES_HEADER,
    NO_PAYMENTS,
    REGISTRY_HEADER,
    SUMS_HEADER,
    WHY,
    Words,
)
from billing_orchestration.desk.registry_files import load_registry
from billing_orchestration.desk.report_files import LINES, ReportFile, Sheet, files_of, open_report
from billing_orchestration.desk.resolving import Desk
from billing_orchestration.domain.billing_calendar import BillingCalendar
from billing_orchestration.domain.provider_payment import SUCCEEDED
from billing_orchestration.domain.reconciled import CLASSES, QUIET, Day, NotReconciled
from billing_orchestration.domain.reconciliation import SUMS, reason_of, subject_of, sum_up, to_amount
from billing_orchestration.domain.registry import Registry, RegistryFault, RegistryLine
from billing_orchestration.provider.client import PaymentProvider

# A registry is of a day of Moscow, whatever the shop's time zone.
REGISTRY_ZONE = ZoneInfo("Europe/Moscow")
_LOOKED_UP_AT_ONCE = 8
_NAMED = 20


@dataclass(frozen=True)
class Wanted:
    """What a person asked for. `named`: titles of the registry's columns; `encoding`: its text's."""

    first: date | None
    last: date | None
    output: Path | None = None
    registry: Path | None = None
    named: Mapping[str, str] = field(default_factory=dict)
    encoding: str = "utf-8"


class _Named:
    """Differences in words: the first few are held, all are counted."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[str] = []

    def extend(self, texts: Iterable[str]) -> None:
        """Add some."""
        for text in texts:
            self.count += 1
            if self.count <= _NAMED:
                self._first.append(text)

    def told(self) -> list[str]:
        """The first few, and how many more."""
        more = self.count - len(self._first)
        return [*self._first, *([f"and {more} more"] if more else [])]


@dataclass
class _Registered:
    """A registry while it is compared."""

    kind: str
    left: dict[str, RegistryLine]
    differences: _Named = field(default_factory=_Named)
    agreed: int = 0


def reconcile_period(desk: Desk, wanted: Wanted) -> tuple[list[str], bool]:
    """Compare a period; return lines for a person, and whether everything agrees.

    Raises NotReconciled, and what reading raises: then no file is written.
    """
    words = Words(desk.settings.billing_language)
    registry = _load(wanted) if wanted.registry else None
    calendar = BillingCalendar(REGISTRY_ZONE if registry else desk.settings.reconciliation_zone)
    first, last = _period(wanted, registry, calendar.day_of(desk.now()))
    sheets = _sheets(words, registry)
    files = _files(wanted, sheets)
    registered = _Registered(registry.kind, dict(registry.lines)) if registry else None
    totals: dict[tuple[str, str], dict[str, int]] = {}
    differences = _Named()
    provider = desk.connect()
    report: Any = open_report(wanted.output, sheets, russian=words.russian) if wanted.output else nullcontext()
    try:
        with report as file:
            for lines, sums, day in _days(desk, provider, calendar, first, last):
                _add(totals, sums)
                differences.extend(f"{day.day}: {text}" for text in _differences(lines, words))
                if registered is not None:
                    _compare(registered, lines, file, words)
                if file is not None:
                    _write(file, day, lines, sums, words)
                del lines, sums  # before the next day is read
            if registered is not None:
                _missing_there(registered, file, words)
            if file is not None:
                _write_sums(file, words("all days"), _rows_of(totals), words)
    except OSError as error:
        raise NotReconciled(f"the report could not be written, and nothing of it is left: {error}") from error
    finally:
        provider.close()
    told = [*_told(totals, words), *differences.told(), *_registry_told(registered)]
    told += [f"written: {path}" for path in files]
    agrees = not differences.count and (registered is None or not registered.differences.count)
    return told, agrees


def _files(wanted: Wanted, sheets: Sequence[Sheet]) -> list[Path]:
    """The files of the report. Refused now what could not be written after an hour of reading."""
    if wanted.output is None:
        return []
    try:
        files = sorted(set(files_of(wanted.output, sheets).values()))
    except ValueError as error:
        raise NotReconciled(str(error)) from None
    folder = wanted.output.parent
    if not folder.is_dir():
        raise NotReconciled(f"{folder} {'is no folder' if folder.exists() else 'does not exist: create the folder'}")
    for path in files:
        if path.is_dir():
            raise NotReconciled(f"{path} is a folder: name a file")
        if wanted.registry is not None and path.exists() and path.samefile(wanted.registry):
            raise NotReconciled(f"{path} is the registry itself: name another file for the report")
    return files


def _load(wanted: Wanted) -> Registry:
    assert wanted.registry is not None  # noqa: S101 - the caller has looked
    try:
        return load_registry(wanted.registry, wanted.named, wanted.encoding)
    except RegistryFault as fault:
        raise NotReconciled(str(fault)) from None


def _period(wanted: Wanted, registry: Registry | None, today: date) -> tuple[date, date]:
    first, last = wanted.first, wanted.last
    if first is None and registry is not None:
        if registry.days is None:
            raise NotReconciled(
                "the registry tells no time, so its days are unknown: give --from and --to, or name its column with"
                " --column at=TITLE"
            )
        first, last = registry.days
    if first is None:
        raise NotReconciled("give the period: --from 2026-11-01 --to 2026-11-30")
    last = last or first
    if last < first:
        raise NotReconciled(f"the period ends on {last}, before it begins on {first}")
    if last > today:
        raise NotReconciled(f"the period ends on {last}, in the future: today is {today}")
    return first, last


def _sheets(words: Words, registry: Registry | None) -> list[Sheet]:
    sheets = [
        Sheet("sums", words("sums"), words.header(SUMS_HEADER)),
        Sheet(LINES, words(LINES), words.header(LINES_HEADER)),
        Sheet("differences", words("differences"), words.header([*LINES_HEADER, WHY])),
    ]
    if registry is not None:
        rest = next((list(line.rest) for line in registry.lines.values()), [])
        sheets.append(Sheet("registry", words("registry"), [*words.header(REGISTRY_HEADER), *rest]))
    return sheets


def _days(
    desk: Desk, provider: PaymentProvider, calendar: BillingCalendar, first: date, last: date
) -> Iterator[tuple[pd.DataFrame, pd.DataFrame, Day]]:
    """Each day's lines and sums, with a progress bar where a person watches."""
    days = [first + timedelta(days=number) for number in range((last - first).days + 1)]
    console = Console(stderr=True)
    shown: Iterable[date] = track(days, "reading", console=console, transient=True) if console.is_terminal else days
    for date_ in shown:
        yield _a_day(desk, provider, Day.of(date_, calendar, since=first))


def _a_day(desk: Desk, provider: PaymentProvider, day: Day) -> tuple[pd.DataFrame, pd.DataFrame, Day]:
    leaves_foreign = desk.settings.foreign_payments == "ignore"
    both = read_books(
        partial(read, desk.engine),
        provider,
        day,
        read_provider(provider, day),
        _LOOKED_UP_AT_ONCE,
        leaves_foreign=leaves_foreign,
    )
    lines = both.compare()
    sums = sum_up(lines)
    if faults := both.unclosed(sums):
        raise NotReconciled(f"{day.day} does not add up, a fault of this program: {'; '.join(faults)}")
    return lines, sums, day


def _each(lines: pd.DataFrame) -> Iterator[Any]:
    yield from lines.rename(columns={"class": "klass"}).itertuples(index=False)


def _differences(lines: pd.DataFrame, words: Words) -> Iterator[str]:
    for line in _each(lines[~lines["class"].isin(QUIET)]):
        yield f"{subject_of(line)}: {words(CLASSES[line.klass])}: {reason_of(line)}"


# --- sums ---------------------------------------------------------------------------------------------------------


def _add(totals: dict[tuple[str, str], dict[str, int]], sums: pd.DataFrame) -> None:
    for line in _each(sums):
        total = totals.setdefault((line.klass, line.currency), dict.fromkeys(("lines", *SUMS), 0))
        for name in total:
            total[name] += int(getattr(line, name))


def _rows_of(totals: Mapping[tuple[str, str], Mapping[str, int]]) -> Iterator[tuple[str, str, Mapping[str, int]]]:
    order = {name: number for number, name in enumerate(CLASSES)}
    for klass, currency in sorted(totals, key=lambda key: (order[key[0]], key[1])):
        yield klass, currency, totals[klass, currency]


def _told(totals: Mapping[tuple[str, str], Mapping[str, int]], words: Words) -> list[str]:
    told = []
    for klass, currency, total in _rows_of(totals):
        amounts = ", ".join(
            f"{words(name.replace('_', ' ')).lower()} {to_amount(total[name]):,.2f} {currency}"
            for name in SUMS
            if total[name]
        )
        told.append(f"{words(CLASSES[klass])}: {total['lines']}" + (f" ({amounts})" if amounts else ""))
    return told or [words(NO_PAYMENTS)]


# --- the file -----------------------------------------------------------------------------------------------------


def _write(file: ReportFile, day: Day, lines: pd.DataFrame, sums: pd.DataFrame, words: Words) -> None:
    rows = ((line.klass, line.currency, line._asdict()) for line in _each(sums))
    _write_sums(file, str(day.day), rows, words)
    for line in _each(lines):
        row = _row(day, line, words)
        file.write(LINES, row)
        if line.klass not in QUIET:
            file.write("differences", [*row, reason_of(line)])


def _write_sums(file: ReportFile, day: str, rows: Iterable[tuple[str, str, Mapping[str, Any]]], words: Words) -> None:
    for klass, currency, total in rows:
        amounts = [to_amount(total[name]) for name in SUMS]
        file.write("sums", [day, words(CLASSES[klass]), currency, int(total["lines"]), *amounts])


def _row(day: Day, line: Any, words: Words) -> list[Any]:
    there = to_amount(line.kopecks) if line.currency else ""
    here: list[Any] = [line.row, line.here, to_amount(line.kopecks_here), line.currency_here] if line.rows else [""] * 4
    return [str(day.day), words(CLASSES[line.klass]), words(line.line), line.id,
            "" if line.payment_id.startswith("\x00") else line.payment_id, line.at.to_pydatetime(), line.there, there,
            line.currency, to_amount(line.fee), *here, int(line.rows)]  # fmt: skip


# --- the registry -------------------------------------------------------------------------------------------------


def _compare(registered: _Registered, lines: pd.DataFrame, file: ReportFile | None, words: Words) -> None:
    """A day's lines of the provider against the registry's."""
    own = lines[(lines["line"] == registered.kind) & (lines["there"] == SUCCEEDED)]
    # A payment of another day stands in that day's registry.
    own = own[(own["paid_there"] > 0) | (own["line"] == "refund")]
    for line in _each(own):
        told = registered.left.pop(line.id, None)
        amount = to_amount(line.kopecks)
        if told is None:
            difference = "not in the registry"
        elif (told.amount, told.currency) != (amount, line.currency):
            difference = "another amount or currency"
        elif told.income is not None and line.fee and told.income != amount - to_amount(line.fee):
            difference = "another income"
        else:
            difference = ""
        _note(registered, told, line.id, amount, CLASSES[line.klass], difference, file, words)


def _missing_there(registered: _Registered, file: ReportFile | None, words: Words) -> None:
    for told in registered.left.values():
        _note(registered, told, told.id, None, "", "not at the provider", file, words)


def _note(
    registered: _Registered,
    told: RegistryLine | None,
    id_: str,
    amount: Decimal | None,
    result: str,
    difference: str,
    file: ReportFile | None,
    words: Words,
) -> None:
    if difference:
        where = f"line {told.number}" if told else "no line"
        registry = f"{told.amount} {told.currency}" if told else "nothing"
        there = "nothing" if amount is None else amount
        name = f"registry, {where}: {registered.kind} {id_}"
        registered.differences.extend([f"{name}: {difference}: {registry} in the registry, {there} at the provider"])
    else:
        registered.agreed += 1
    if file is not None:
        of_registry: list[Any] = [told.number, id_, told.amount, told.currency] if told else ["", id_, "", ""]
        rest = list(told.rest.values()) if told else []
        word = words(difference or "agrees with the registry")
        file.write("registry", [*of_registry, "" if amount is None else amount, words(result), word, *rest])


def _registry_told(registered: _Registered | None) -> list[str]:
    if registered is None:
        return []
    return [
        f"registry of {registered.kind}s: {registered.agreed} agree, {registered.differences.count} differ",
        *registered.differences.told(),
    ]
