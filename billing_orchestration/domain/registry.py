"""A registry: the provider's own list of a day's succeeded payments, or refunds, as it comes by mail.

Not all of its columns are documented. What is named is taken, wherever it stands; a mapping may name more; the rest is
kept. Whatever does not fit is told with its line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from itertools import islice
from typing import Any

from billing_orchestration.domain.money import CURRENCIES, parse_amount

# What a column is, and the names under which it is known, in lower case. Where several are there, the first is meant: a
# refund's own come before those of its payment, which stand beside them.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "payment_id": ("идентификатор платежа", "payment id", "payment identifier", "payment_id"),
    "refund_id": ("идентификатор возврата", "refund id", "refund identifier", "refund_id"),
    "amount": ("сумма возврата", "сумма платежа", "refund amount", "payment amount", "amount"),
    "currency": ("валюта возврата", "валюта платежа", "валюта", "refund currency", "payment currency", "currency"),
    "income": ("сумма платежа за вычетом комиссии нко", "payment amount less commission", "income_amount"),
    "at": ("время возврата", "дата возврата", "время платежа", "дата платежа", "refund time", "payment time", "time"),
}
_TOTALS = ("итого", "всего", "total")
_TIME = "%d.%m.%Y %H:%M:%S"
# A title or two may stand above the header.
_HEADER_WITHIN = 20
Cells = Sequence[Any]


class RegistryFault(ValueError):
    """The file cannot be taken for a registry. Its text is one line that names the line of the file."""


@dataclass(frozen=True, slots=True)
class RegistryLine:
    """One payment or refund. `number`: its line in the file; `rest`: the columns that nobody asked for."""

    number: int
    id: str
    amount: Decimal
    currency: str
    income: Decimal | None = None
    at: datetime | None = None
    rest: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Registry:
    """A whole registry. `kind`: payment or refund."""

    kind: str
    lines: Mapping[str, RegistryLine]

    @property
    def days(self) -> tuple[date, date] | None:
        """The first and the last day that it tells of; None when it tells no time."""
        days = [line.at.date() for line in self.lines.values() if line.at is not None]
        return (min(days), max(days)) if days else None


def find_columns(cells: Cells, named: Mapping[str, str]) -> dict[str, int]:
    """Which cell of a header is which column. `named`: names that a person gave for some of them."""
    titles = [_text(cell).casefold() for cell in cells]
    found: dict[str, int] = {}
    for column, names in COLUMNS.items():
        wanted = (named[column].strip().casefold(),) if column in named else names
        at = next((titles.index(name) for name in wanted if name in titles), None)
        if at is not None:
            found[column] = at
    return found


def read_registry(table: Iterable[tuple[int, Cells]], named: Mapping[str, str]) -> Registry:
    """Read (line, cells) pairs. Raises RegistryFault."""
    rows = iter(table)
    columns, titles, header_line = _header(rows, named)
    kind = "refund" if "refund_id" in columns else "payment"
    lines: dict[str, RegistryLine] = {}
    for number, cells in rows:
        if not any(_text(cell) for cell in cells):
            continue
        if _is_total(cells, columns[f"{kind}_id"]):
            _check_total(number, cells, columns, lines.values())
            continue
        if len(cells) != len(titles):
            raise RegistryFault(
                f"line {number} has {len(cells)} cells, and the header in line {header_line} has {len(titles)}: a cell"
                " holds the separator, or the line is cut off"
            )
        line = _line(number, cells, columns, titles, kind)
        if line.id in lines:
            raise RegistryFault(f"line {number}: {kind} {line.id} stands in line {lines[line.id].number} already")
        lines[line.id] = line
    return Registry(kind, lines)


def _header(rows: Iterator[tuple[int, Cells]], named: Mapping[str, str]) -> tuple[dict[str, int], list[str], int]:
    for number, cells in islice(rows, _HEADER_WITHIN):
        columns = find_columns(cells, named)
        if "payment_id" in columns or "refund_id" in columns:
            missing = [name for name in ("amount", "currency") if name not in columns]
            if missing:
                raise RegistryFault(
                    f"line {number} names no column for {' and '.join(missing)}: name it with --column"
                    f" {missing[0]}=TITLE"
                )
            return columns, [_text(cell) for cell in cells], number
    raise RegistryFault(
        f"line 1: no column «{COLUMNS['payment_id'][0]}» within the first {_HEADER_WITHIN} lines. Is it a registry,"
        " with columns separated by a semicolon, comma or tab? A column of another name: --column payment_id=TITLE"
    )


def _line(number: int, cells: Cells, columns: Mapping[str, int], titles: Sequence[str], kind: str) -> RegistryLine:
    id_ = _text(cells[columns[f"{kind}_id"]])
    if not id_:
        raise RegistryFault(f"line {number} has no id")
    currency = _text(cells[columns["currency"]]).upper()
    if currency not in CURRENCIES:
        raise RegistryFault(f"line {number}: the currency {currency[:20]!r} is none of {', '.join(sorted(CURRENCIES))}")
    has_income = "income" in columns and _text(cells[columns["income"]])
    taken = set(columns.values())
    return RegistryLine(
        number,
        id_,
        _amount(number, cells[columns["amount"]]),
        currency,
        _amount(number, cells[columns["income"]]) if has_income else None,
        _time(number, cells[columns["at"]]) if "at" in columns else None,
        {title: cell for at, (title, cell) in enumerate(zip(titles, cells, strict=True)) if at not in taken},
    )


def _is_total(cells: Cells, id_column: int) -> bool:
    """Whether a line holds totals: one with an id is a payment, whatever its description begins with."""
    id_ = _text(cells[id_column]) if id_column < len(cells) else ""
    return any(_text(cell).casefold().startswith(_TOTALS) for cell in ([id_] if id_ else cells))


def _check_total(number: int, cells: Cells, columns: Mapping[str, int], lines: Iterable[RegistryLine]) -> None:
    """A line with totals must be what the lines above it come to."""
    told = list(lines)
    for name, amounts in (("amount", [line.amount for line in told]), ("income", [line.income or 0 for line in told])):
        at = columns.get(name)
        if at is None or at >= len(cells) or not _text(cells[at]):
            continue
        try:
            total = _decimal(cells[at])
        except (ValueError, ArithmeticError):
            continue  # a word, such as "Итого" itself
        if total != sum(amounts):
            raise RegistryFault(f"line {number}: the total is {total}, and the lines above come to {sum(amounts)}")


def _text(cell: Any) -> str:
    return "" if cell is None else str(cell).strip()


def _decimal(cell: Any) -> Decimal:
    # A workbook holds numbers in binary, and a sum of them is off by a little.
    return Decimal(repr(round(cell, 6))) if isinstance(cell, float) else Decimal(_text(cell))


def _amount(number: int, cell: Any) -> Decimal:
    try:
        return parse_amount(_decimal(cell) if isinstance(cell, (int, float)) else _text(cell))
    except (ValueError, ArithmeticError):
        raise RegistryFault(
            f"line {number}: {_text(cell)[:40]!r} is not an amount; it must look like 1299.00"
        ) from None


def _time(number: int, cell: Any) -> datetime | None:
    """Moscow time, without an offset."""
    if isinstance(cell, datetime) or not _text(cell):
        return cell if isinstance(cell, datetime) else None
    try:
        return datetime.strptime(_text(cell), _TIME)  # noqa: DTZ007 - of Moscow, as its day is
    except ValueError:
        raise RegistryFault(
            f"line {number}: {_text(cell)[:40]!r} is not a time; it must look like 31.01.2026 23:59:59"
        ) from None
