"""The documents keep up with the code: links lead somewhere, and the table "Rule → where" names what exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from billing_orchestration.ui.documents import anchor_of

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "billing_orchestration"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
# A rule that someone looks up by name stays in the table, whatever becomes of the code.
RULES = (
    "anchor day",
    "saved method",
    "decline classes",
    "second look",
    "never re-sent after 23 h",
    "settling order",
    "held back",
    "20 % guard",
    "`max_changes`",
    "quarantine entry opens once",
)


def _rules() -> list[tuple[str, str, str]]:
    """The rows of "Rule → where": the rule, its file, one name in it."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.split("\n## Rule → where\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if "| `" in line]
    return [(rule, file.strip("` "), name) for rule, file, names in rows for name in re.findall(r"`([^`]+)`", names)]


def _names(path: Path) -> set[str]:
    """What a module defines at its top, methods as `Class.method`; of a migration, the indexes that it creates too."""
    names = set()
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    if "migrations" in path.parts:
        names |= set(re.findall(r"CREATE (?:UNIQUE )?INDEX (\w+)", path.read_text()))
    return names


@pytest.mark.parametrize(("rule", "file", "name"), _rules(), ids=lambda value: str(value)[:60])
def test_the_table_of_rules_names_what_the_code_defines(rule: str, file: str, name: str) -> None:
    assert (PACKAGE / file).is_file(), f"{rule}: {file} is gone"
    assert name in _names(PACKAGE / file), f"{rule}: {file} does not define {name}"


@pytest.mark.parametrize("rule", RULES)
def test_the_table_of_rules_has_the_rules_that_people_ask_about(rule: str) -> None:
    assert any(f"**{rule}**" in row for row, _, _ in _rules())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_a_document_leads_to_a_file_and_a_heading(document: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if "://" in target:
            continue
        file, _, heading = target.partition("#")
        path = document.parent / file if file else document
        assert path.exists(), target
        assert not heading or heading in _anchors(path), target


def test_the_tests_that_the_safety_page_names_exist() -> None:
    named = set(re.findall(r"`(\w+/test_[\w*.]+)`", (ROOT / "docs" / "safety.md").read_text()))
    assert len(named) > 10
    assert [name for name in named if not list(Path(__file__).parent.glob(name))] == []


def test_no_message_sends_a_reader_to_a_path_that_only_a_checkout_has() -> None:
    """The UI links to the documents (`DOCS_URL`), and in an image there is no docs/ to open."""
    named = [
        f"{path.name}:{text.lineno}"
        for path in PACKAGE.rglob("*.py")
        for text in _messages(ast.parse(path.read_text()))
        if re.search(r"\bdocs/[\w-]+\.md", str(text.value))
    ]
    assert named == []


def _messages(tree: ast.Module) -> list[ast.Constant]:
    """The texts of a module, without its docstrings."""
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [text for text in texts if id(text) not in alone]


def _anchors(path: Path) -> set[str]:
    return {anchor_of(title) for title in re.findall(r"^#+ (.*)$", path.read_text(), re.M)}


def test_the_readme_names_commands_that_exist() -> None:
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:^|`)make ([a-z]+)", readme, re.M))
    assert {"demo", "dev", "test"} <= targets <= set(re.findall(r"^([a-z]+):", makefile, re.M))
    commands = set(re.findall(r"billing-orchestration ([a-z]+)", readme))
    parsers = set(re.findall(r"""commands\.add_parser\(\s*"([a-z]+)\"""", (PACKAGE / "cli.py").read_text()))
    assert {"migrate", "doctor"} <= commands <= parsers
