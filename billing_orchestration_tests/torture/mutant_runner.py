"""Runs chosen tests in a process of its own, against the package that lies in the working directory, and tells how.

    python -m billing_orchestration_tests.torture.mutant_runner REPORT TEST...

The report (JSON): `smoke` and `tests`, each a list of [test, "passed" | "assertion" | "error", words]. "assertion" is a
test that failed by what it asserts; any other exception is an "error", which proves nothing about a rule. The run ends
with the first test that fails by an assertion: the mutant is dead.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import billing_orchestration

SMOKE = "billing_orchestration_tests/torture/mutant_smoke.py"
PASSED, ASSERTION, ERROR = "passed", "assertion", "error"


def is_assertion(error: BaseException) -> bool:
    """Whether a test failed by its own words, or a group of only such failures.

    That is an assert, an exception that did not come, or a list taken apart in the test itself (`[row] = rows`) that
    has not as many items as the test says.
    """
    # An exception group, which Python 3.10 has from a backport.
    if (inner := getattr(error, "exceptions", None)) is not None:
        return all(is_assertion(one) for one in inner)
    if isinstance(error, ValueError) and "values to unpack" in str(error):
        return _is_of_a_test(error)
    return isinstance(error, (AssertionError, pytest.fail.Exception))


def _is_of_a_test(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].name.startswith("test_")


class Listener:
    """Notes how each test ends, and stops after the first that kills."""

    def __init__(self) -> None:
        self.ended: dict[str, tuple[str, str]] = {}
        self.session: pytest.Session | None = None

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Keep it, to stop it."""
        self.session = session

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        """Judge by the exception itself, not by the words of a report."""
        report = yield
        if call.excinfo is None:
            self.ended.setdefault(item.nodeid, (PASSED, ""))
            return report
        error = call.excinfo.value
        how = ASSERTION if call.when == "call" and is_assertion(error) else ERROR
        words = f"{type(error).__name__}: {error}".strip().splitlines()
        self.ended[item.nodeid] = (how, " ".join(words[:3])[:300])
        if self.session is not None and (how == ASSERTION or item.nodeid.startswith(SMOKE)):
            self.session.shouldstop = "dead"
        return report

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be collected is an error, not a death."""
        if report.failed:
            self.ended[report.nodeid] = (ERROR, str(report.longrepr)[-300:])


def run(tests: Sequence[str]) -> dict[str, Any]:
    """The smoke test first, then the others."""
    here = Path.cwd()
    if not Path(billing_orchestration.__file__).is_relative_to(here):
        raise RuntimeError(f"the package under test is {billing_orchestration.__file__}, not the one in {here}")
    listener = Listener()
    # The same generated data every time: a mutant must not live or die by the luck of the day.
    status = pytest.main([SMOKE, *tests, "--tb=no", "-q", "-p", "no:xdist", "--hypothesis-seed=0"], [listener])
    told = [[name, *how] for name, how in listener.ended.items()]
    return {
        "status": int(status),
        "smoke": [one for one in told if one[0].startswith(SMOKE)],
        "tests": [one for one in told if not one[0].startswith(SMOKE)],
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(run(sys.argv[2:])))
