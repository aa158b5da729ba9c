"""The audit trail and the quarantine: nothing that a provider or a customer writes can break them."""

from __future__ import annotations

import random
import uuid
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa

from billing_orchestration.database.audit import (
    Change,
    Problem,
    evidence_of,
    open_problems,
    record_changes,
)
from billing_orchestration.database.quarantine import count_and_last
from billing_orchestration_tests.books import NOON, Books
from billing_orchestration_tests.waiting import at_once

AN_HOUR = timedelta(hours=1)
ODD_TEXTS = {
    "NUL": "before\x00after",
    "half of a surrogate pair": "a\ud83d b",
    "emoji and scripts": "😀 Ёж مرحبا",
    "quotes and backslashes": "'; DROP TABLE payments; -- \\ \" \\u0000",
    "control characters": "\x01\x1b[31m\r\n\t",
}


def open_one(books: Books, problem: Problem, run_id: str = "run") -> set[str]:
    with books.engine.begin() as connection:
        return open_problems(connection, books.stamp(run_id), [problem])


# The audit trail


@pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS.keys())
def test_whatever_is_in_a_text_its_change_is_recorded(books: Books, text: str) -> None:
    change = Change("payment", "1", "expired", text, {text: text}, {"nested": [{text: (text,)}]}, text)
    with books.engine.begin() as connection:
        record_changes(connection, books.stamp(), [change, replace(change, entity_id="2")])
    first, second = books.rows("audit_trail")
    assert (first.entity_id, second.entity_id) == ("1", "2")
    assert first.new["nested"][0].popitem()[1] == [first.reason]
    for part in ("before", "after", "😀", "DROP TABLE"):
        assert (part in text) == (part in first.reason)


def test_values_of_every_type_are_readable_in_the_audit_trail(books: Books) -> None:
    identity = uuid.uuid4()
    new = {
        "money": Decimal("1.10"),
        "at": NOON,
        "id": identity,
        "not a number": float("nan"),
        "infinite": float("inf"),
        "large": 10**40,
        "nothing": None,
        "flag": True,
        7: "a key that is no text",
        "odd": object,
    }
    with books.engine.begin() as connection:
        record_changes(connection, books.stamp(), [Change("payment", "1", "x", "reason", None, new)])
    (row,) = books.rows("audit_trail")
    assert row.old is None
    assert row.new["money"] == "1.10"
    assert datetime.fromisoformat(row.new["at"]) == NOON
    assert row.new["id"] == str(identity)
    assert (row.new["not a number"], row.new["infinite"], row.new["large"]) == ("nan", "inf", 10**40)
    assert (row.new["nothing"], row.new["flag"], row.new["7"]) == (None, True, "a key that is no text")


def test_ten_thousand_changes_are_one_statement(books: Books) -> None:
    statements: list[str] = []
    sa.event.listen(books.engine, "before_cursor_execute", lambda *event: statements.append(event[2]))
    with books.engine.begin() as connection:
        record_changes(
            connection, books.stamp(), [Change("payment", str(n), "expired", "stale") for n in range(10_000)]
        )
        record_changes(connection, books.stamp(), [])
    assert len(statements) == 1
    assert len({row.entity_id for row in books.rows("audit_trail")}) == 10_000


# The quarantine


@pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS.keys())
def test_whatever_is_in_a_text_its_problem_is_opened_once(books: Books, text: str) -> None:
    problem = Problem(
        f"payment {text}", "unreadable", text, external_payment_id=text, evidence=evidence_of({text: text})
    )
    assert open_one(books, problem) == {problem.key}
    assert open_one(books, problem) == set()
    assert len(books.rows("quarantine")) == 1


def test_a_huge_id_is_quarantined_all_the_same_and_told_apart_from_its_like(books: Books) -> None:
    # Not compressible: an index entry cannot hold it.
    huge = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=20_000))
    problems = [
        Problem(f"payment {huge}{end}", "unreadable", "odd", external_payment_id=huge + end) for end in ("a", "b")
    ]
    assert len(open_one(books, problems[0])) == len(open_one(books, problems[1])) == 1
    assert open_one(books, problems[0]) == set()
    assert all(len(row.problem_key) < 1000 for row in books.rows("quarantine"))


def test_evidence_is_cut_to_what_a_person_reads(books: Books) -> None:
    evidence = evidence_of({"metadata": {f"key {n}": "x" * 1000 for n in range(1000)}})
    open_one(books, Problem("payment p", "unreadable", "odd", evidence=evidence))
    (row,) = books.rows("quarantine")
    assert row.evidence["cut"] is True
    assert len(row.evidence["item"]) <= 2000
    assert evidence_of({"a": 1}) == {"item": {"a": 1}}


@pytest.mark.parametrize("depth", [100, 20_000])
def test_evidence_of_any_depth_is_kept(books: Books, depth: int) -> None:
    nested: Any = "the core"
    for _ in range(depth):
        nested = [{"in": nested}]
    open_one(books, Problem("payment p", "unreadable", "odd", evidence=evidence_of(nested)))
    assert count(books) == 1
    while isinstance(nested, list):  # taken apart by hand: Python's own clean-up of it is recursive
        nested = nested[0].pop("in")


def count(books: Books) -> int:
    with books.engine.connect() as connection:
        return count_and_last(connection)[0]


def test_a_problem_opened_by_eight_at_once_is_opened_by_one(books: Books) -> None:
    problems = [Problem(f"payment {n}", "metadata", "odd") for n in range(20)]

    def work(seed: int) -> set[str]:
        mine = random.Random(seed).sample(problems, 20)
        with books.engine.begin() as connection:
            return open_problems(connection, books.stamp(f"run {seed}"), mine)

    opened = at_once([partial(work, seed) for seed in range(8)])
    assert sorted(key for keys in opened for key in keys) == sorted(problem.key for problem in problems)
    assert count(books) == 20


def test_one_subject_with_two_kinds_of_problems_has_two_entries(books: Books) -> None:
    open_one(books, Problem("payment p", "metadata", "odd"))
    open_one(books, Problem("payment p", "amount_differs", "odd"))
    assert count(books) == 2


@pytest.mark.parametrize("resolution", ["ignored", "accepted", "attached"])
def test_what_a_person_resolved_for_good_is_not_opened_again(books: Books, resolution: str) -> None:
    problem = Problem("payment p", "metadata", "odd")
    open_one(books, problem)
    books.execute(
        "UPDATE billing_orchestration.quarantine SET resolved_at = now(), resolution = :resolution",
        resolution=resolution,
    )
    assert open_one(books, problem) == set()
    assert count(books) == 0


def test_settling_closes_problems_by_payment_and_kind(books: Books) -> None:
    for payment_id in ("p", "q"):
        for kind in ("metadata", "refunded_there"):
            open_one(books, Problem(f"payment {payment_id}", kind, "odd", external_payment_id=payment_id))
    books.settle(books.paid("p"))
    open_ones = {row.problem_key for row in books.rows("quarantine", "resolved_at IS NULL")}
    assert open_ones == {"payment p:refunded_there", "payment q:metadata", "payment q:refunded_there"}
