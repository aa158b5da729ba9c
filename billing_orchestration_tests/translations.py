"""Where a Russian document has fallen behind its English one, or the other way round.

Sections are paired in their order. Of each pair the same things must be there: headings of one level, code blocks
(their comments are translated), paragraphs, list items, inline code, names of settings, numbers, tables cell by cell,
and links: one into a translated document leads to its translation, to the heading that stands in the same place.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cache
from itertools import zip_longest

from billing_orchestration.ui.documents import anchor_of

TRANSLATED = {
    "README.md": "README.ru.md",
    "docs/operations.md": "docs/ru/operations.md",
    "docs/deployment.md": "docs/ru/deployment.md",
}
_HEADING = re.compile(r"(#+) (.*)")
# A heading that is a name, such as autopayment_job or ClocksApart: alerts link to it.
_NAME = re.compile(r"[a-z]+(?:_[a-z]+)+|(?:[A-Z][a-z]+){2,}", re.ASCII)
_LIST_ITEM = re.compile(r"\s*(?:[-*]|\d+\.) ")
_COMMENT = re.compile(r"(?:^|\s)(?:#|--)\s.*")
_CODE = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\]\(([^)]+)\)")
_SETTING = re.compile(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b")
# 1,440 in English is 1 440 in Russian (with a no-break space), and 2.5 is 2,5.
_NUMBER = re.compile(r"\d(?:[\d.,:\u00a0-]*\d)?")


@dataclass
class _Section:
    """A heading and what stands below it, up to the next one."""

    title: str
    level: int
    line: int
    prose: list[str] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    tables: list[list[tuple[int, list[str]]]] = field(default_factory=list)

    @property
    def alike(self) -> tuple[int, str | frozenset[str], int]:
        """By what a section is found again in the other language."""
        name = self.title if _NAME.fullmatch(self.title) else frozenset(_CODE.findall("\n".join(self.prose)))
        return self.level, name, len(self.blocks)


def fallen_behind(english: str, texts: Mapping[str, str]) -> list[str]:
    """Each place where the two documents part, in words. `texts`: all documents by their path in the repository."""
    russian = TRANSLATED[english]
    if russian not in texts:
        return [f"{russian} is missing: {english} has no translation"]
    ours, theirs = _sections(texts[english]), _sections(texts[russian])
    if _levels(texts[english]) != _levels(texts[russian]):
        return list(_other_headings(english, ours, russian, theirs))
    return [
        f"{russian}:{theirs_.line}, {theirs_.title!r} ({english}:{ours_.line}, {ours_.title!r}): {difference}"
        for ours_, theirs_ in zip(ours, theirs, strict=True)
        for difference in _differences(ours_, theirs_, english, texts)
    ]


def _sections(text: str) -> list[_Section]:
    sections = [_Section("(top)", 0, 1)]
    block: list[str] | None = None
    in_table = False
    for number, line in enumerate(text.splitlines(), start=1):
        section, was_in_table, in_table = sections[-1], in_table, False
        if line.lstrip().startswith("```"):
            if block is None:
                block = [line.strip()]
            else:
                section.blocks.append("\n".join(block))
                block = None
        elif block is not None:
            code = line if block[0] == "```text" else _COMMENT.sub("", line)
            block.extend([" ".join(code.split())] if code.strip() else [])
        elif heading := _HEADING.fullmatch(line):
            sections.append(_Section(heading[2], len(heading[1]), number))
        elif line.startswith("|"):
            in_table = True
            if not was_in_table:
                section.tables.append([])
            cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
            section.tables[-1].append((number, cells))
        else:
            section.prose.append(line)
    return sections


def _other_headings(english: str, ours: list[_Section], russian: str, theirs: list[_Section]) -> Iterator[str]:
    matcher = SequenceMatcher(
        None, [section.alike for section in ours], [section.alike for section in theirs], autojunk=False
    )
    for word, first, last, first_there, last_there in matcher.get_opcodes():
        levels = [section.level for section in ours[first:last]]
        if word != "equal" and levels != [section.level for section in theirs[first_there:last_there]]:
            here = ", ".join(f"{'#' * part.level} {part.title} (line {part.line})" for part in ours[first:last])
            there = ", ".join(
                f"{'#' * part.level} {part.title} (line {part.line})" for part in theirs[first_there:last_there]
            )
            yield f"other headings: {english} has {here or 'none'}; {russian} has {there or 'none'} there"


def _differences(ours: _Section, theirs: _Section, english: str, texts: Mapping[str, str]) -> Iterator[str]:
    if _NAME.fullmatch(ours.title) and ours.title != theirs.title:
        yield "a heading that alerts link to is another one"
    for number, (block, block_there) in enumerate(zip_longest(ours.blocks, theirs.blocks, fillvalue=""), start=1):
        if block != block_there:
            yield f"code block {number}: {_first_difference(block, block_there)}"
    counts_there = _counts(theirs)
    for what, here in _counts(ours).items():
        if here != counts_there[what]:
            yield f"{what}: {here} in English, {counts_there[what]} in Russian"
    yield from _other_words("\n".join(ours.prose), "\n".join(theirs.prose), english, texts)
    if len(ours.tables) != len(theirs.tables):
        yield f"{len(ours.tables)} tables in English, {len(theirs.tables)} in Russian"
        return
    for table, table_there in zip(ours.tables, theirs.tables, strict=True):
        yield from _other_table(table, table_there, english, texts)


def _counts(section: _Section) -> dict[str, int]:
    prose = "\n".join(section.prose)
    return {
        "paragraphs": sum(bool(part.strip()) for part in re.split(r"\n\s*\n", prose)),
        "list items": sum(bool(_LIST_ITEM.match(line)) for line in section.prose),
        "bold passages": prose.count("**") // 2,
    }


def _first_difference(block: str, block_there: str) -> str:
    for line, line_there in zip_longest(block.splitlines(), block_there.splitlines(), fillvalue="(nothing)"):
        if line != line_there:
            return f"{line!r} in English, {line_there!r} in Russian"
    return "other lines"


def _other_table(
    ours: list[tuple[int, list[str]]], theirs: list[tuple[int, list[str]]], english: str, texts: Mapping[str, str]
) -> Iterator[str]:
    if len(ours) != len(theirs):
        names = {row[0] for _, row in theirs}
        lost = next((row[0] for _, row in ours if row[0].startswith("`") and row[0] not in names), "")
        yield f"a table has {len(ours)} rows in English, {len(theirs)} in Russian{lost and f'; {lost} is not there'}"
        return
    for (line, cells), (line_there, cells_there) in zip(ours, theirs, strict=True):
        where = f"table row {cells[0]!r} (line {line}; Russian line {line_there})"
        if len(cells) != len(cells_there):
            yield f"{where}: {len(cells)} columns in English, {len(cells_there)} in Russian"
            continue
        for number, (cell, cell_there) in enumerate(zip(cells, cells_there, strict=True), start=1):
            for difference in _other_words(cell, cell_there, english, texts):
                yield f"{where}, column {number}: {difference}"


def _other_words(ours: str, theirs: str, english: str, texts: Mapping[str, str]) -> Iterator[str]:
    expected = _links_to_expect(ours, english, texts)
    told = (
        ("code", _codes(ours), _codes(theirs)),
        ("settings", set(_SETTING.findall(ours)), set(_SETTING.findall(theirs))),
        ("numbers", _numbers(ours), _numbers(theirs)),
        ("links", _known(expected, texts), _known(_links(theirs, TRANSLATED[english]), texts)),
    )
    for what, here, there in told:
        if lost := sorted(here - there):
            yield f"{what} only in English: {', '.join(lost)}"
        if left := sorted(there - here):
            yield f"{what} only in Russian: {', '.join(left)}"


def _codes(text: str) -> set[str]:
    return {" ".join(code.split()) for code in _CODE.findall(text)}


def _numbers(text: str) -> set[str]:
    prose = _LINK.sub("]", _CODE.sub("", text))
    return {re.sub(r"\D", "", number) for number in _NUMBER.findall(re.sub(r"(?m)^\s*\d+\. ", "", prose))}


def _links(text: str, document: str) -> set[str]:
    """The links of a text, by their path in the repository."""
    found = set()
    for target in _LINK.findall(text):
        path, _, heading = target.partition("#")
        if "://" not in target:
            path = posixpath.normpath(posixpath.join(posixpath.dirname(document), path)) if path else document
        found.add(f"{path}#{heading}" if heading else path)
    return found


def _links_to_expect(text: str, english: str, texts: Mapping[str, str]) -> set[str]:
    """Where the links of an English text lead in its translation."""
    expected = set()
    for link in _links(text, english):
        path, _, heading = link.partition("#")
        if path == TRANSLATED[english]:  # "in Russian" is answered by "in English"
            expected.add(english)
        elif path in TRANSLATED and TRANSLATED[path] in texts:
            expected.add(TRANSLATED[path] + (heading and f"#{_same_heading(heading, path, texts)}"))
        else:
            expected.add(link)
    return expected


def _known(links: set[str], texts: Mapping[str, str]) -> set[str]:
    """Links, without the heading where a document has others than its translation: that is told of the document."""
    parted = {
        russian
        for english, russian in TRANSLATED.items()
        if english in texts and russian in texts and _levels(texts[english]) != _levels(texts[russian])
    }
    return {path if (path := link.partition("#")[0]) in parted else link for link in links}


@cache
def _levels(text: str) -> list[int]:
    return [section.level for section in _sections(text)]


def _same_heading(anchor: str, english: str, texts: Mapping[str, str]) -> str:
    """The anchor of the heading that stands in the same place of the translation."""
    ours = [anchor_of(section.title) for section in _sections(texts[english])]
    theirs = [anchor_of(section.title) for section in _sections(texts[TRANSLATED[english]])]
    place = ours.index(anchor) if anchor in ours else len(theirs)
    return theirs[place] if place < len(theirs) else anchor
