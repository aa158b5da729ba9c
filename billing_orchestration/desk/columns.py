"""Rows for a terminal, in columns under a header."""

from __future__ import annotations

from collections.abc import Sequence


def in_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for the header and one for each row. All have as many cells as the header."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
