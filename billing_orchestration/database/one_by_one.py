"""One poisoned row never stops the others: all in one transaction, and if that fails, each in its own.

An error that is about every row alike is raised: the connection is lost, the schema does not fit. Where PostgreSQL's
code leaves a doubt (a table is missing: for all, or in the trigger of one row?), the other rows decide. If they go
through, it is that row's fault. If a few fail alike and none goes through in between, it is the database's.
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
# So many doubtful refusals alike, with nothing written in between, are no coincidence.
FEW = 3


def is_about_every_row(error: BaseException) -> bool:
    """Whether no other row would fare better."""
    return isinstance(error, (DatabaseUnavailable, AccessDenied, SchemaProblem)) and not error.is_doubtful


@dataclass(frozen=True, slots=True)
class NotWritten:
    """Why one item was not written; nothing of it was. `for_good`: the database would refuse it again.

    `doubt`: the error, as long as it is not known whether it is about this item alone.
    """

    reason: str
    for_good: bool
    doubt: BillingDatabaseError | None = None


class Witnesses:
    """What the rows of a run say about a doubtful refusal. One for all calls of a run that write the same tables."""

    def __init__(self) -> None:
        self._any_written = False
        self._in_a_row = 0
        self._last = ""

    def written(self) -> None:
        """A row went through: whatever was refused before is the refused row's fault."""
        self._any_written, self._in_a_row = True, 0

    def refused(self, doubt: BillingDatabaseError) -> None:
        """A row was refused with this doubtful error. Raises it if a few in a row were refused alike."""
        self._in_a_row = self._in_a_row + 1 if doubt.sqlstate == self._last else 1
        self._last = doubt.sqlstate
        if self._in_a_row >= FEW:
            raise doubt

    def verdict(self, doubted: NotWritten) -> NotWritten:
        """What is to become of the refused row. Without a witness the doubt stays."""
        return NotWritten(doubted.reason, for_good=True) if self._any_written else doubted


def one_by_one(
    items: Sequence[Item],
    write: Callable[[Sequence[Item]], Result],
    *,
    tries: int = TRIES,
    part_size: int | None = None,
    witnesses: Witnesses | None = None,
) -> Iterator[tuple[Sequence[Item], Result | NotWritten]]:
    """Write all items together, else each alone; yield what was written together with what `write` returned for it.

    `write` is one transaction: all of its items or none. `part_size`: between "all" and "alone", parts of this many are
    tried. NotWritten always comes with a single item; a doubtful one waits for the first witness after it.
    """
    witnesses = witnesses or Witnesses()
    doubted: list[tuple[Sequence[Item], NotWritten]] = []
    for part, result in _together_or_alone(items, write, tries, part_size):
        if isinstance(result, NotWritten) and result.doubt is not None:
            doubted.append((part, result))
            witnesses.refused(result.doubt)
            continue
        if not isinstance(result, NotWritten):
            witnesses.written()
            yield from ((waiting, witnesses.verdict(doubt)) for waiting, doubt in doubted)
            doubted.clear()
        yield part, result
    yield from ((waiting, witnesses.verdict(doubt)) for waiting, doubt in doubted)


def _together_or_alone(
    items: Sequence[Item], write: Callable[[Sequence[Item]], Result], tries: int, part_size: int | None
) -> Iterator[tuple[Sequence[Item], Result | NotWritten]]:
    if not items:
        return
    if len(items) == 1:
        yield items, write_alone(items[0], write, tries=tries)
        return
    try:
        result = write(items)
    except Exception as error:
        if is_about_every_row(error):
            raise
    else:
        yield items, result
        return
    # Whatever it was, each item gets its own try and its own words.
    size = part_size if part_size is not None and part_size < len(items) else 1
    for start in range(0, len(items), size):
        yield from _together_or_alone(items[start : start + size], write, tries, None)


def write_alone(item: Item, write: Callable[[Sequence[Item]], Result], *, tries: int = TRIES) -> Result | NotWritten:
    """Write one item; say so when the database refuses it, or is busy `tries` times."""
    refusal = NotWritten("", for_good=False)
    for _ in range(tries):
        try:
            return write([item])
        except BillingDatabaseError as error:
            if is_about_every_row(error):
                raise
            doubt = error if error.is_doubtful else None
            refusal = NotWritten(str(error), for_good=isinstance(error, RowRefused), doubt=doubt)
            # A unique index refused it: a concurrent writer was faster, and the next try finds what it wrote.
            if not isinstance(error, DatabaseBusy) and doubt is None and error.sqlstate != "23505":
                return refusal
        except (ValueError, TypeError, OverflowError) as error:
            # A value of the item or of its rows that the database or the calendar cannot hold.
            return NotWritten(f"{type(error).__name__}: {error}", for_good=True)
    return refusal
