"""Items that one op leaves for the next, in constant memory: what a run holds does not grow with its slice."""

import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from operator import attrgetter
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

Item = TypeVar("Item")

# Up to here it stays in memory, as it does in an ordinary run.
_IN_MEMORY_BYTES = 8 * 1024 * 1024


class _Pickler(pickle.Pickler):
    """Writes a frozen dataclass as the call that makes it: a third of what Python's own way with slots takes."""

    _values: ClassVar[dict[type, Callable[[Any], tuple[Any, ...]] | None]] = {}

    def reducer_override(self, thing: Any) -> Any:
        """How to make it again; NotImplemented: as pickle would."""
        kind = type(thing)
        if kind not in self._values:
            names = [part.name for part in fields(kind) if part.init] if is_dataclass(kind) else []
            self._values[kind] = attrgetter(*names) if len(names) > 1 else None
        values = self._values[kind]
        return NotImplemented if values is None else (kind, values(thing))


class _Columns(NamedTuple):
    """A page of named tuples of one kind, as what is written of it: the kind once, and the values column by column."""

    kind: type
    columns: list[Any]


def _written(page: Sequence[Any]) -> Any:
    kinds = set(map(type, page))
    kind = kinds.pop()
    if kinds or not (issubclass(kind, tuple) and hasattr(kind, "_fields")):
        return page
    return _Columns(kind, [_written(column) for column in zip(*page, strict=True)])


def _read(page: Any) -> Any:
    if not isinstance(page, _Columns):
        return page
    # What `_make` does, without its frame in Python for each.
    return map(partial(tuple.__new__, page.kind), zip(*map(_read, page.columns), strict=True))


class Spool(Generic[Item]):
    """Pages of items, in the order in which they were added; to be read any number of times once all are in.

    A large one goes to a temporary file without a name: it is this process's alone, and gone with it, however that
    ends. So no data of a run stays on a disk (docs/decisions/0002).
    """

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES)  # noqa: SIM115 - as long-lived as this
        self._pages = 0
        self._items = 0

    def __len__(self) -> int:
        return self._items

    def add(self, page: Sequence[Item]) -> None:
        """Put a page at the end."""
        if page:
            _Pickler(self._file, protocol=pickle.HIGHEST_PROTOCOL).dump(_written(list(page)))
            self._pages += 1
            self._items += len(page)

    def pages(self) -> Iterator[list[Item]]:
        """Read the pages, from the first. One reader at a time."""
        self._file.seek(0)
        for _ in range(self._pages):
            page: Iterable[Item] = _read(pickle.load(self._file))  # noqa: S301 - written by this process
            yield list(page)

    def close(self) -> None:
        """Release the memory or the file."""
        self._file.close()
