"""The daily report as sections: a title, a sentence, a table. Markdown for the UI and chats, HTML as a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from html import escape
from typing import Any

import sqlalchemy as sa

from billing_orchestration.database import report as counted
from billing_orchestration.jobs.quarantine_page import age_in_words

Rows = Sequence[Sequence[str]]
_NOTHING = "Nothing."
_STYLE = (
    ":root { color-scheme: light dark } body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem;"
    " margin: 2rem auto; padding: 0 1rem } table { border-collapse: collapse }"
    " td, th { border: 1px solid gray; padding: .2rem .6rem;"
    " text-align: left } img { max-width: 100% }"
)


@dataclass(frozen=True, slots=True)
class Section:
    """One question and its answer. `rows` begin with the header; empty: there is nothing to show."""

    title: str
    rows: Rows
    plot: str = ""


@dataclass(frozen=True, slots=True)
class Counted:
    """Everything that the report is made from. `fees`: of the days that were reconciled, by day and currency."""

    at: datetime
    due: Sequence[Any]
    charges: Sequence[Any]
    dunning: Sequence[Any]
    revenue: Sequence[Any]
    fees: Mapping[tuple[date, str], Decimal]
    quarantine: Sequence[Any]
    repairs: Sequence[Any]
    unknown: Sequence[Any]


def count(
    connection: sa.Connection, now: datetime, zone: str, fees: Mapping[tuple[date, str], Decimal] | None = None
) -> Counted:
    """Ask the database, one statement a section."""
    return Counted(
        at=now,
        due=counted.renewals_due(connection, now, zone),
        charges=counted.charges_by_day(connection, now, zone),
        dunning=counted.dunning(connection, now),
        revenue=counted.revenue_by_day(connection, now, zone),
        fees=fees or {},
        quarantine=counted.quarantine_by_age(connection, now),
        repairs=counted.slowest_repairs(connection, now),
        unknown=counted.unknown_outcomes(connection),
    )


def sections(of: Counted) -> list[Section]:
    """The report, first what moves money."""
    return [
        Section("Renewals due in the next 7 days", _table(("day", "renewals"), [(d.day, d.renewals) for d in of.due])),
        Section(
            "Charges by day",
            _table(
                ("day", "charged", "declined", "rejected", "open"),
                [(c.day, c.charged, c.declined, c.rejected, c.open) for c in reversed(of.charges)],
            ),
            "charges",
        ),
        Section("Declines and what came back (30 days)", _table(
            ("first decline", "periods", "paid after 1 day", "2 days", "3 days", "in all"),
            [(d[0], d.declined, *(_share(n, d.declined) for n in (d.after_1, d.after_2, d.after_3, d.recovered)))
             for d in of.dunning],
        ), "dunning"),
        Section("Revenue by day", _revenue(of), "revenue"),
        Section(
            "Quarantine by age",
            _table(("kind", "under a day", "under a week", "older"),
                   [(q.kind, q.day, q.week, q.older) for q in of.quarantine]),
        ),
        Section(
            "Slowest repairs (30 days, since the payment was made)",
            _table(("payment", "granted", "after"),
                   [(f"row {r.payment}", r.kind, age_in_words(r.took)) for r in of.repairs]),
        ),
        Section("Unknown outcomes", _table(
            ("currency", "charges", "sum", "oldest, for"),
            [(u.currency, u.charges, u.amount, age_in_words(of.at - u.oldest)) for u in of.unknown],
        )),
    ]  # fmt: skip


def headline(of: Counted) -> str:
    """The answer to "how are we doing?" in one sentence."""
    last = of.charges[-1] if of.charges else None
    charged = f"{last.charged} charged and {last.declined} declined on {last.day}" if last else "no charge in 30 days"
    waiting = sum(q.day + q.week + q.older for q in of.quarantine)
    return f"{charged}; {waiting} wait for a person; {sum(u.charges for u in of.unknown)} outcomes unknown"


def as_markdown(of: Counted, images: Mapping[str, str]) -> str:
    """`images`: data URIs by the plot's name."""
    lines = [f"**{headline(of)}** (as of {of.at:%Y-%m-%d %H:%M} UTC)", ""]
    for section in sections(of):
        lines += [f"### {section.title}", ""]
        if section.plot in images:
            lines += [f"![{section.title}]({images[section.plot]})", ""]
        if section.rows:
            header, *rows = section.rows
            lines += [_pipes(header), _pipes(["---"] * len(header)), *map(_pipes, rows), ""]
        else:
            lines += [_NOTHING, ""]
    return "\n".join(lines)


def as_html(of: Counted, images: Mapping[str, str]) -> str:
    """One file with everything in it, readable in both themes."""
    parts = [f"<h1>Billing report</h1><p><b>{escape(headline(of))}</b> (as of {of.at:%Y-%m-%d %H:%M} UTC)</p>"]
    for section in sections(of):
        parts.append(f"<h2>{escape(section.title)}</h2>")
        if section.plot in images:
            parts.append(f'<img alt="{escape(section.title)}" src="{images[section.plot]}">')
        rows = [(tag, row) for tag, row in zip(("th", *("td" for _ in section.rows)), section.rows, strict=False)]
        cells = ["".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) for tag, row in rows]
        parts.append("<table>" + "".join(f"<tr>{line}</tr>" for line in cells) + "</table>" if cells else _NOTHING)
    head = f'<meta charset="utf-8"><title>Billing report</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>'


def _revenue(of: Counted) -> Rows:
    rows = []
    for line in reversed(of.revenue):
        fee = of.fees.get((line.day, line.currency))
        rows.append((line.day, line.payments, _sum(line.paid), _sum(line.refunded), _sum(fee), line.currency))
    return _table(("day", "payments", "paid", "refunded", "fees, where known", "currency"), rows)


def _sum(amount: Decimal | None) -> str:
    return "" if amount is None else f"{amount:,.2f}"


def _share(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.0%})"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Rows:
    return [header, *([str(cell) for cell in row] for row in rows)] if rows else []


def _pipes(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
