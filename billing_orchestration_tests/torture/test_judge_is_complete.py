"""Each thing that the simulation's judge can say is expected by a test, in words that nothing else says.

A complaint that no test provokes may have been mute for months, and a seed would be green about it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
JUDGES = sorted((HERE / "simulation").glob("*.py"))
TESTS = (HERE / "test_simulation_oracle.py", HERE / "test_simulation_sends.py")


def _constant_parts(node: ast.AST) -> str | None:
    """The fixed words of a text, "…" where something is filled in; None for what is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else "…"
            for part in node.values
        )
    return None


def _is_complaint(function: ast.expr) -> bool:
    return isinstance(function, ast.Attribute) and (
        function.attr == "fault" or (function.attr == "append" and ast.unparse(function.value) == "found")
    )


def complaints_of(path: Path) -> Iterator[str]:
    """What is yielded, returned in a list, or told to be a fault."""
    is_oracle = path.name.startswith("oracle_")
    for node in ast.walk(ast.parse(path.read_text())):
        said: list[ast.expr] = []
        if is_oracle and isinstance(node, ast.Yield) and node.value is not None:
            said = [node.value]
        elif is_oracle and isinstance(node, ast.ListComp):
            said = [node.elt]
        elif is_oracle and isinstance(node, ast.Return) and isinstance(node.value, ast.List):
            said = node.value.elts
        elif isinstance(node, ast.Call) and _is_complaint(node.func):
            said = list(node.args)
        yield from (words for one in said if (words := _constant_parts(one)) is not None)


COMPLAINTS = [(path.stem, words) for path in JUDGES for words in dict.fromkeys(complaints_of(path))]
EXPECTED = {
    node.value
    for path in TESTS
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 7
}


def test_the_judge_has_much_to_say() -> None:
    assert len(COMPLAINTS) > 50


@pytest.mark.parametrize(("judge", "words"), COMPLAINTS)
def test_a_complaint_is_expected_by_a_test_in_words_of_its_own(judge: str, words: str) -> None:
    own = [text for text in EXPECTED if text in words and sum(text in other for _, other in COMPLAINTS) == 1]

    assert own, f"no test of the judge expects {words!r} of {judge}"
