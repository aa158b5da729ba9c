"""What the commands print: tables in 100 columns, plain text in a pipe, JSON from everything that lists something."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from billing_orchestration.cli import _parser, _show
from billing_orchestration.desk.tables import folded, hanging, table
from billing_orchestration.sandbox.demo import make_console
from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.fixtures.installation import command

# They do something, or serve; `customer export` writes JSON and nothing else.
LIST_NOTHING = {
    "migrate", "webserver", "sandbox", "demo", "quarantine resolve", "customer export", "customer erase",
}  # fmt: skip
LISTS = (
    ("doctor",),
    ("plan", "matching_successful_payments_job"),
    ("upcoming",),
    ("quarantine", "list", "--all"),
    ("quarantine", "show", "1"),
    ("explain", "payment", "paid"),
    ("reconcile", "--from", "2026-03-01", "--to", "2026-03-01"),
)
LONG = "a reason that goes on and on, " * 8


def commands(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command with its parser, those of a command too."""
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        yield name, parser
    for action in nested:
        for word, below in action.choices.items():
            yield from commands(below, f"{name} {word}".strip())


def test_every_command_that_lists_something_lists_it_as_json() -> None:
    with_json = {name for name, parser in commands(_parser()) if "--json" in parser._option_string_actions}
    every = {name for name, _ in commands(_parser())}
    assert every - with_json == LIST_NOTHING
    asked = {" ".join(words) for words in LISTS}
    assert all(any(line.startswith(name) for line in asked) for name in with_json - {"start", "stop"})


@pytest.fixture
def busy(healthy: pytest.MonkeyPatch, database_url: str, sandbox: Sandbox) -> pytest.MonkeyPatch:
    """An installation with a renewal that is due, an entry with a long reason, and a payment of nobody."""
    healthy.setenv("COLUMNS", "60")
    with psycopg.connect(database_url, autocommit=True) as connection:
        for statement in (
            "INSERT INTO plans (id, name, duration, duration_unit, created_at, updated_at)"
            " VALUES (1, 'Monthly', 1, 'month', now(), now())",
            "INSERT INTO payment_providers (id, name, created_at, updated_at) VALUES (1, 'YooKassa', now(), now())",
            "INSERT INTO subscriptions (user_id, status, started_at, ended_at, plan_id, created_at, updated_at) VALUES"
            " ('4f8fd2f8-0ab1-43ae-9b1c-d2e6a4ad9c11', 'ACTIVE', now() - interval '30 days', now(), 1, now(), now())",
        ):
            connection.execute(statement)
        connection.execute(
            "INSERT INTO billing_orchestration.quarantine (problem_key, kind, reason, external_payment_id, evidence,"
            " job, run_id, opened_at) VALUES ('payment paid:test_payment', 'test_payment', %s, 'paid', '{}', 'm', 'r',"
            " now())",
            [LONG],
        )
    metadata = {"user_id": "anna", "plan_id": "1", "payment_provider_id": "1"}
    sandbox.provider.add_payment(id="paid", amount="299.00", metadata=metadata)
    return healthy


@pytest.mark.parametrize("words", LISTS, ids=lambda words: " ".join(words[:2]))
def test_what_is_listed_is_whole_as_json_and_plain_in_a_pipe(busy: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    busy.setenv("CI", "true")
    shown, told = command(*words), command(*words, "--json")
    data: Any = json.loads(told.stdout)
    assert isinstance(data, (list, dict))
    assert told.returncode == shown.returncode
    assert "\x1b" not in shown.stdout + told.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 100
    if words[0] == "quarantine":
        entry = data[0] if isinstance(data, list) else data
        assert (entry["id"], entry["reason"], entry["about"]) == (1, LONG, "payment paid")
        assert entry["answers"]["accept"] == "grants it anyway"


def test_a_table_keeps_every_word_and_its_width() -> None:
    rows = [("12", "payment 329e18c9-000f-5000-8000-45ab2901c58b", LONG), ("7", "subscription 1", "short")]
    lines = table(rows)
    assert max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines if line[0] != " "] == ["12", "7"]
    column = lines[0].index("a reason")
    assert " ".join(line[column:] for line in lines[:-1]).split() == LONG.split()


@pytest.mark.parametrize("sign", ["\xa0", "\x7f", "\x85", "\u2028", "\u202e", "\U000e0001", "\n", '"', "я"])
def test_json_stays_json_whatever_it_holds(capsys: pytest.CaptureFixture[str], sign: str) -> None:
    _show(argparse.Namespace(json=True), [], {f"a{sign}b": [f"1{sign}299"]})
    told = capsys.readouterr().out
    assert json.loads(told) == {f"a{sign}b": [f"1{sign}299"]}
    assert all(line.isprintable() for line in told.split("\n"))


def test_a_line_that_does_not_fit_goes_on_behind_its_indentation_and_its_time() -> None:
    lines = list(folded([f"  2026-03-12 12:00:00  {LONG}", "  short", f"    {LONG}", ""]))
    assert max(map(len, lines)) <= 100
    assert lines.count("  short") == lines.count("") == 1
    assert {len(line) - len(line.lstrip()) for line in lines[1 : lines.index("  short")]} == {23}
    assert {len(line) - len(line.lstrip()) for line in lines[lines.index("  short") + 1 : -1]} == {4}


def test_what_is_masked_or_escaped_is_so_before_a_line_is_broken() -> None:
    # Behind a break the rest of a key is no longer known as one, and an escape is longer than its sign.
    key = "live_" + "aB3-dEf_" * 6
    lines = [*table([("1", "x" * 60, f"refused: {key}"), ("2", "\x1b" * 90, "")]), *hanging("  reason: ", key, 30)]
    assert "aB3" not in " ".join(lines)
    assert "".join(lines).count("***") == 2
    assert all(line.isprintable() and len(line) <= 100 for line in lines)


def test_a_narrow_table_stands_as_it_is() -> None:
    assert table([("id", "what"), ("1", "")]) == ["id  what", "1"]
    assert table([]) == []


def test_a_long_text_hangs_below_its_beginning() -> None:
    lines = hanging("fault    ", LONG, 40)
    assert max(map(len, lines)) <= 40
    assert all(line.startswith(" " * 9) for line in lines[1:])


@pytest.mark.parametrize(
    "given",
    [{}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}, {"CI": "true", "GITHUB_ACTIONS": "true"}],
    ids=["pipe", "NO_COLOR", "CI"],
)
def test_the_demo_writes_plain_text_where_nobody_sees_colours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: dict[str, str]
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    console = make_console()
    console.print("green: all is well", style="green")
    assert console.width <= 100
    assert capsys.readouterr().out == "green: all is well\n"
