"""Items that one op leaves for the next, in constant memory however long the slice is."""

import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from operator import attrgetter
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

Item = TypeVar("Item")

# A spool up to this size stays in memory, as in an ordinary run.
_IN_MEMORY_BYTES = 8 * 1024 * 1024


class _Pickler(pickle.Pickler):
    """Writes a frozen dataclass as the call that makes it, in a third of the time that pickle takes for slots."""

    _values: ClassVar[dict[type, Callable[[Any], tuple[Any, ...]] | None]] = {}

    def reducer_override(self, thing: Any) -> Any:
        """How to make it again; NotImplemented leaves that to pickle."""
        kind = type(thing)
        if kind not in self._values:
            names = [part.name for part in fields(kind) if part.init] if is_dataclass(kind) else []
            self._values[kind] = attrgetter(*names) if len(names) > 1 else None
        values = self._values[kind]
        return NotImplemented if values is None else (kind, values(thing))


class _Columns(NamedTuple):
    """How a page of named tuples of one kind is written: the kind once, then the values column by column."""

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
    # What `_make` does, without a Python call per row.
    return map(partial(tuple.__new__, page.kind), zip(*map(_read, page.columns), strict=True))


class Spool(Generic[Item]):
    """Pages of items, in the order they were added. Once all are in, they can be read any number of times.

    A large spool goes to a temporary file without a name: no other process can open it, and it disappears with this
    one, however that ends. No data of a run stays on a disk (docs/decisions/0002).
    """

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES)  # noqa: SIM115 - as long-lived as this
        self._pages = 0
        self._items = 0

    def __len__(self) -> int:
        return self._items

    def add(self, page: Sequence[Item]) -> None:
        """Append a page."""
        if page:
            _Pickler(self._file, protocol=pickle.HIGHEST_PROTOCOL).dump(_written(list(page)))
            self._pages += 1
            self._items += len(page)

    def pages(self) -> Iterator[list[Item]]:
        """Read the pages from the first. Only one reader at once."""
        self._file.seek(0)
        for _ in range(self._pages):
            page: Iterable[Item] = _read(pickle.load(self._file))  # noqa: S301 - written by this process
            yield list(page)

    def close(self) -> None:
        """Release the memory or the file."""
        self._file.close()
