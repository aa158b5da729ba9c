"""A known fault that the suite must notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Edit:
    """`old`, which `file` of the package holds exactly once, becomes `new`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """A fault with its name, the rule that it breaks, and where the suite should notice (pytest's node ids)."""

    name: str
    rule: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]
