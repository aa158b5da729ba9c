"""What a stranger has typed cannot rewrite a terminal, forge a line, or become a link or a mention in an alert."""

from __future__ import annotations

import pytest

from billing_orchestration.cli import _say
from billing_orchestration.domain.decisions import Action, Code, Decision
from billing_orchestration.domain.printable import printable, without_links
from billing_orchestration.jobs.run_report import decisions_in, describe_decisions

# Put together here, since no file of the project may hold what looks like a key.
KEY = "live_" + "Abcdefghijklmnopqrstuvwx-1"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("анна, 299.00 ₽ — ok", "анна, 299.00 ₽ — ok"),
        ("\x1b[2K\rpaid", r"\x1b[2K\rpaid"),
        ("\x9b2J", r"\x9b2J"),
        ("a\u202eb\u2066c\u200bd", r"a\u202eb\u2066c\u200bd"),
        ("one\nentry 7: accept", r"one\nentry 7: accept"),
        ("\ud800", r"\ud800"),
        (f"zone {KEY} is unknown", "zone live_*** is unknown"),
        ("test_payment, a test_disk_that_is_full", "test_payment, a test_disk_that_is_full"),
    ],
)
def test_what_does_not_print_is_shown_as_its_escape(given: str, shown: str) -> None:
    assert printable(given) == shown


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("pay at https://evil.example/x", "pay at hxxps://evil[.]example/x"),
        ("see t.me/thief", "see t[.]me/thief"),
        ("@everyone @here", "(at)everyone (at)here"),
        ("<!channel> <@U1>", "(!channel> ((at)U1>"),
        ("299.00 RUB, payment 2f1c.7", "299.00 RUB, payment 2f1c.7"),
    ],
)
def test_an_alert_holds_no_link_and_no_mention_of_a_strangers(given: str, shown: str) -> None:
    assert without_links(given) == shown


def test_neither_the_terminal_nor_a_runs_table_is_given_a_raw_one(capsys: pytest.CaptureFixture[str]) -> None:
    _say("user \x1b[2Kanna\nentry 8: nothing to do")
    decision = Decision(Action.LEAVE, "user \x1b[1A", "\u202epaid", None, Code.NO_METHOD)
    [row], _ = decisions_in(describe_decisions([decision]))

    assert capsys.readouterr().out == "user \\x1b[2Kanna\\nentry 8: nothing to do\n"
    assert (row["subject"], row["reason"]) == (r"user \x1b[1A", r"\u202epaid")
