"""Tables on a terminal: plain text in at most 100 columns, for a small screen, a pipe and a log alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from textwrap import wrap

from billing_orchestration.domain.printable import printable

WIDTH = 100
_BETWEEN = "  "
# What a line begins with, and its further lines hang behind: an indentation, and when it was.
_HEAD = re.compile(r" *(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  )?")


def table(rows: Sequence[Sequence[str]], width: int = WIDTH) -> list[str]:
    """Rows as lines, in columns. What does not fit goes on below, within its column."""
    if not rows:
        return []
    # Before any line is broken: behind a break the rest of a secret key is no longer known as one.
    rows = [[printable(text) for text in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    while sum(widths) + len(_BETWEEN) * (len(widths) - 1) > width:
        widths[widths.index(max(widths))] -= 1
    return [line for row in rows for line in _lines(row, widths)]


def hanging(head: str, text: str, width: int = WIDTH) -> list[str]:
    """A text behind its head; what does not fit goes on below, as far in."""
    first, *rest = _cell(printable(text), width - len(head))
    return [(head + first).rstrip(), *(" " * len(head) + line for line in rest)]


def folded(lines: Iterable[str], width: int = WIDTH) -> Iterator[str]:
    """Lines that fit: each hangs behind its indentation."""
    for line in map(printable, lines):
        if len(line) <= width:
            yield line
        else:
            head = _HEAD.match(line)[0]  # type: ignore[index]
            yield from hanging(head, line[len(head) :], width)


def _lines(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    cells = [_cell(text, width) for text, width in zip(row, widths, strict=True)]
    for parts in zip_longest(*cells, fillvalue=""):
        yield _BETWEEN.join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip()


def _cell(text: str, width: int) -> list[str]:
    return wrap(text, width, break_on_hyphens=False) or [""]
