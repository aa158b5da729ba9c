"""What a reconciling run shows: the table of classes, the differences with their reasons, numbers by day."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import dagster as dg

from billing_orchestration.domain.decisions import Action, Decision, Tally
from billing_orchestration.domain.reconciled import CLASSES, QUIET, REPAIRABLE
from billing_orchestration.jobs.run_report import ROWS_SHOWN

if TYPE_CHECKING:
    import pandas as pd

Metadata = dict[str, dg.MetadataValue[Any]]
# The columns of the table of classes that hold amounts, with their titles.
_AMOUNTS = {
    "paid_there": "paid there",
    "fee": "fees",
    "refunded_there": "refunded there",
    "paid_here": "paid here",
    "refunded_here": "refunded here",
}


def differing(lines: "pd.DataFrame") -> "pd.DataFrame":
    """The lines that are a difference in money."""
    return lines[~lines["class"].isin(QUIET)]


def each(lines: "pd.DataFrame") -> Iterator[Any]:
    """Line by line. `klass` is its class, which is no name in Python."""
    yield from lines.rename(columns={"class": "klass"}).itertuples(index=False)


def decision_of(action: str, line: Any) -> Decision:
    """A line as a row of the report."""
    from billing_orchestration.domain.reconciliation import money_of, reason_of, subject_of

    reason = f"{CLASSES[line.klass]}: {reason_of(line)}"
    return Decision(action, subject_of(line), reason, money_of(line), line.klass)


def as_found(lines: "pd.DataFrame") -> Tally:
    """The differences as they were found, before anything is applied."""
    return Tally(
        ROWS_SHOWN,
        (
            decision_of(Action.SETTLE if line.klass in REPAIRABLE else Action.QUARANTINE, line)
            for line in each(differing(lines))
        ),
    )


def table_of_classes(sums: "pd.DataFrame") -> Metadata:
    """Metadata: lines and sums of each class and currency."""
    from billing_orchestration.domain.reconciliation import to_amount

    columns = ["class", "lines", "currency", *_AMOUNTS.values()]
    records = []
    for line in each(sums):
        amounts = {title: f"{to_amount(getattr(line, name)):,.2f}" for name, title in _AMOUNTS.items()}
        records.append({"class": CLASSES[line.klass], "lines": line.lines, "currency": line.currency, **amounts})
    return {
        "classes": dg.MetadataValue.table(
            [dg.TableRecord(record) for record in records], dg.TableSchema([dg.TableColumn(name) for name in columns])
        )
    }


def numbers_of_day(sums: "pd.DataFrame", found: int, left: int) -> Metadata:
    """Metadata: what Dagster plots over the days."""
    from billing_orchestration.domain.reconciliation import to_amount

    numbers: Metadata = {
        "differences": dg.MetadataValue.int(found),
        "differences left": dg.MetadataValue.int(left),
    }
    by_currency = sums.groupby("currency")[list(_AMOUNTS)].sum()
    for name, title in (("paid_there", "paid"), ("fee", "fees"), ("refunded_there", "refunds")):
        for currency, kopecks in by_currency[name].items():
            numbers[f"{title}, {currency}"] = dg.MetadataValue.float(float(to_amount(int(kopecks))))
    return numbers


def in_words(names: Sequence[str], shown: int = 3) -> str:
    """The first few, and how many more."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return "; ".join(names[:shown]) + more
