"""One poisoned row never stops the others: all in one transaction, and if that fails, each in its own.

An error that is about every row alike is raised: the connection is lost, a privilege is missing, the schema does not
fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from billing_orchestration.database.errors import (
    AccessDenied,
    BillingDatabaseError,
    DatabaseBusy,
    DatabaseUnavailable,
    RowRefused,
    SchemaProblem,
)

Item = TypeVar("Item")
Result = TypeVar("Result")

# A busy row, or one that a concurrent writer has just written, is decided again from what that writer has left.
TRIES = 3
_ABOUT_EVERY_ROW = (DatabaseUnavailable, AccessDenied, SchemaProblem)


@dataclass(frozen=True, slots=True)
class NotWritten:
    """Why one item was not written; nothing of it was. `for_good`: the database would refuse it again."""

    reason: str
    for_good: bool


def one_by_one(
    items: Sequence[Item],
    write: Callable[[Sequence[Item]], Result],
    *,
    tries: int = TRIES,
    part_size: int | None = None,
) -> Iterator[tuple[Sequence[Item], Result | NotWritten]]:
    """Write all items together, else each alone; yield what was written together with what `write` returned for it.

    `write` is one transaction: all of its items or none. `part_size`: between "all" and "alone", parts of this many are
    tried. NotWritten always comes with a single item.
    """
    if len(items) > 1:
        try:
            result = write(items)
        except _ABOUT_EVERY_ROW:
            raise
        except Exception:  # noqa: BLE001 - whatever it is, each item gets its own try and its own words below
            size = part_size if part_size is not None and part_size < len(items) else 1
            for start in range(0, len(items), size):
                yield from one_by_one(items[start : start + size], write, tries=tries)
        else:
            yield items, result
    elif items:
        yield items, write_alone(items[0], write, tries=tries)


def write_alone(item: Item, write: Callable[[Sequence[Item]], Result], *, tries: int = TRIES) -> Result | NotWritten:
    """Write one item; say so when the database refuses it, or is busy `tries` times."""
    reason = ""
    for _ in range(tries):
        try:
            return write([item])
        except _ABOUT_EVERY_ROW:
            raise
        except DatabaseBusy as error:
            reason = str(error)
        except RowRefused as error:
            reason = str(error)
            if not _is_conflict(error):
                return NotWritten(reason, for_good=True)
        except BillingDatabaseError as error:
            return NotWritten(str(error), for_good=False)
        except (ValueError, TypeError, OverflowError) as error:
            # A value of the item or of its rows that the database or the calendar cannot hold.
            return NotWritten(f"{type(error).__name__}: {error}", for_good=True)
    return NotWritten(reason, for_good=False)


def _is_conflict(error: RowRefused) -> bool:
    """Whether a unique index refused it: a concurrent writer was faster, and the next try finds what it wrote."""
    original = getattr(error.__cause__, "orig", None)
    return getattr(original, "sqlstate", None) == "23505"
