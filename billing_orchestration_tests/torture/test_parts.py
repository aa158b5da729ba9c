"""`make torture` in parts: none keeps another from running, and the end names those that failed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from billing_orchestration_tests.torture.__main__ import HERE, TESTS, Part, Torture, main, table


def part(name: str, program: str) -> Part:
    """A small one."""
    return Part(name, (sys.executable, "-c", program))


def test_a_part_that_fails_keeps_no_other_from_running_and_is_named_at_the_end() -> None:
    chosen = [part("kills", "raise SystemExit(3)"), *(part(f"part {n}", f"print('part {n} held')") for n in range(3))]
    told: list[str] = []

    ended = Torture(0, told.append).run(chosen)

    assert [(one.part.name, one.code) for one in ended] == [("kills", 3), ("part 0", 0), ("part 1", 0), ("part 2", 0)]
    assert {f"=== part {n}\npart {n} held\n" for n in range(3)} <= set(told)
    assert "FAILED: kills\n" in table(ended)
    assert table(ended[1:]).endswith("held in every part.")


def test_a_part_is_told_how_long_it_goes_on() -> None:
    [ended] = Torture(700, lambda _: None).run([part("night", "import os; print(os.environ['TORTURE_ROUNDS'])")])

    assert ended.words == "700\n"


_SHARE = """
from billing_orchestration_tests.torture.extent import is_its_turn
print([number for number in range(9) if is_its_turn(number, shares=3)])
"""


def test_as_many_short_tortures_as_there_are_shares_try_all_and_a_night_does_at_once() -> None:
    shares = [Torture(0, lambda _: None, first).run([part("share", _SHARE)])[0].words for first in (1, 2, 3)]
    [night] = Torture(100, lambda _: None, 1).run([part("night", _SHARE)])

    assert shares == ["[1, 4, 7]\n", "[2, 5, 8]\n", "[0, 3, 6]\n"]
    assert night.words == f"{list(range(9))}\n"


def test_every_test_of_the_torture_belongs_to_a_part() -> None:
    assert sorted(file for files in TESTS.values() for file in files) == sorted(
        path.name for path in Path(__file__).parent.glob("test_*.py")
    )


def test_a_part_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["earthquakes"])

    assert "no such part: earthquakes; there are simulation" in capsys.readouterr().err


_TWO_PARTS = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from {HERE.replace("/", ".")}.__main__ import Part, Torture

def told(words):
    print(words, flush=True)

sleeps = "import time; time.sleep(90)"
Torture(0, told).run([Part(name, (sys.executable, "-c", sleeps)) for name in "abc"])
"""


def test_an_interruption_ends_the_parts_under_way_and_begins_no_other() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _TWO_PARTS], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as torture:
        assert torture.stdout is not None
        assert sorted(torture.stdout.readline() for _ in range(2)) == ["=== a begins\n", "=== b begins\n"]
        torture.send_signal(signal.SIGINT)

        words, _ = torture.communicate(timeout=60)
    assert "=== c" not in words
    assert torture.returncode != 0
