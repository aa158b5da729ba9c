"""The suite notices known faults: every mutant with `make torture`; always, that each still fits, and some for real."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from billing_orchestration_tests.fixtures.postgres import Server
from billing_orchestration_tests.torture.extent import FIRST, NIGHT
from billing_orchestration_tests.torture.mutant import Edit, Mutant
from billing_orchestration_tests.torture.mutant_catalogue import ALL, PROMISED
from billing_orchestration_tests.torture.mutants import (
    BROKEN,
    KILLED,
    ROOT,
    SURVIVED,
    TESTS,
    DoesNotFit,
    attempt,
    attempt_all,
    edited,
    judge,
    markdown,
    table,
)
from billing_orchestration_tests.torture.zygote import Zygote

# All of `make torture` stays below 20 minutes; a night tries every mutant.
SHORT_S = 420.0
_A_RANDOM_KEY = next(mutant for mutant in ALL if mutant.name == "a random key")
_A_TEST = "domain/test_attempts.py::test_the_key_of_an_attempt_is_the_same_for_ever"


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_a_mutant_fits_the_source_as_it_is_today_and_names_tests_that_exist(mutant: Mutant) -> None:
    assert edited(ROOT, mutant.edits)
    for test in mutant.tests:
        file, _, name = test.partition("::")
        function = name.partition("[")[0]
        assert re.search(rf"^def {function}\(", (ROOT / TESTS / file).read_text(), re.M), test


def test_the_documentation_lists_every_mutant() -> None:
    assert markdown(ALL) in (ROOT / "docs" / "mutants.md").read_text(), "see mutants --markdown"


def test_each_mutant_has_a_name_of_its_own() -> None:
    assert len({mutant.name for mutant in ALL}) == len(ALL)
    assert len(PROMISED) == 13


@pytest.mark.thorough
def test_every_mutant_that_there_is_time_for_is_killed(capsys: pytest.CaptureFixture[str]) -> None:
    # Each FIRST begins elsewhere in the catalogue: several short runs try all of it.
    start = FIRST * 67 % len(ALL)
    mutants = [*ALL[start:], *ALL[:start]]

    unsound, verdicts = attempt_all(mutants) if NIGHT else attempt_all(mutants, SHORT_S)

    with capsys.disabled():
        print(f"\n{table(verdicts)}\n  not tried, for want of time: {len(ALL) - len(verdicts)}")
    assert unsound == []
    assert verdicts
    assert [(verdict.mutant.name, verdict.by) for verdict in verdicts if verdict.outcome != KILLED] == []


# --- the machinery itself: it must be able to say each of its words


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as zygote:
        yield zygote


def test_a_mutant_is_killed_by_an_assertion(postgres_server: Server, zygote: Zygote) -> None:
    verdict = attempt(_A_RANDOM_KEY, postgres_server.url(), zygote)

    assert (verdict.outcome, verdict.by) == (KILLED, _A_TEST)


def test_a_change_that_breaks_no_rule_survives_and_one_that_does_not_start_kills_nothing(
    postgres_server: Server, zygote: Zygote
) -> None:
    harmless = Mutant("harmless", "none", (Edit("domain/attempts.py", "_HOURS = 23", "_HOURS = 46 // 2"),), (_A_TEST,))
    unbootable = Mutant("unbootable", "none", (Edit("domain/money.py", '"RUB", ', '"RUB" / '),), (_A_TEST,))

    assert attempt(harmless, postgres_server.url(), zygote).outcome == SURVIVED
    assert attempt(unbootable, postgres_server.url(), zygote).outcome == BROKEN


@pytest.mark.parametrize("edit", [
    Edit("domain/renewals.py", "a line that is not there", ""),
    Edit("domain/renewals.py", "attempt", "other"),
    Edit("domain/attempts.py", "_HOURS = 23", "_HOURS = "),
    Edit("domain/attempts.py", "_HOURS = 23", "_HOURS = 23"),
], ids=["not there", "more than once", "no Python", "no change"])  # fmt: skip
def test_a_replacement_that_does_not_fit_is_broken_and_never_a_silent_survivor(edit: Edit, zygote: Zygote) -> None:
    with pytest.raises(DoesNotFit):
        edited(ROOT, (edit,))

    assert attempt(Mutant("misfit", "none", (edit,), (_A_TEST,)), "postgresql://nowhere", zygote).outcome == BROKEN


SMOKE = ["smoke", "passed", ""]


@pytest.mark.parametrize(("told", "outcome"), [
    ({"smoke": [SMOKE], "tests": [["a", "passed", ""], ["b", "assertion", "assert 1 == 2"]]}, KILLED),
    ({"smoke": [SMOKE], "tests": [["a", "error", "KeyError"], ["b", "assertion", "assert 1 == 2"]]}, KILLED),
    ({"smoke": [SMOKE], "tests": [["a", "passed", ""]]}, SURVIVED),
    ({"smoke": [SMOKE], "tests": [["a", "error", "KeyError"], ["b", "passed", ""]]}, BROKEN),
    ({"smoke": [SMOKE], "tests": []}, BROKEN),
    ({"smoke": [["smoke", "assertion", "a job is red"]], "tests": []}, BROKEN),
    ({"smoke": [], "tests": [["b", "assertion", "assert 1 == 2"]]}, BROKEN),
])  # fmt: skip
def test_only_an_assertion_after_a_sound_start_is_a_kill(told: dict[str, list[list[str]]], outcome: str) -> None:
    assert judge(_A_RANDOM_KEY, told).outcome == outcome


def test_the_tree_itself_is_never_edited() -> None:
    before = {path: path.read_bytes() for path in Path(ROOT, "billing_orchestration").rglob("*.py")}

    edited(ROOT, _A_RANDOM_KEY.edits)

    assert {path: path.read_bytes() for path in before} == before
