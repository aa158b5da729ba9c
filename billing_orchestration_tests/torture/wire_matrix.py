"""The matrix of faults on the wire: every fault, on every kind of request, in every job that makes such a request.

    python -m billing_orchestration_tests.torture.wire_matrix                       all of it, printed as a table
    python -m billing_orchestration_tests.torture.wire_matrix --fault "lost answer" --call POST

A cell: a job with all its kinds of work runs while the fault strikes (once, at every second request, at the list's
second page, or at every request), then runs again without it, at most three times; then the provider's ledger and our
tables must agree (`kill_oracle`). The number in the table is of runs until they did.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from billing_orchestration.sandbox.provider.misbehaviour import Misbehaviour
from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.fixtures.postgres import Server
from billing_orchestration_tests.jobs.service import Service
from billing_orchestration_tests.torture.kill_matrix import MOST_RUNS_AGAIN, Stage, workshop
from billing_orchestration_tests.torture.kill_oracle import complaints
from billing_orchestration_tests.torture.kill_points import Death
from billing_orchestration_tests.torture.kill_runner import Case, Runner
from billing_orchestration_tests.torture.kill_scenarios import ALL as SCENARIOS
from billing_orchestration_tests.torture.kill_scenarios import DAY, HOUR, Scenario, Story
from billing_orchestration_tests.torture.repeating_proxy import repeating_proxy

# The silence lasts a minute; a run of these takes half a second for it. Production's patience is checked by itself
# (provider/test_client_wire.py).
SILENCE_S = 60.0
_PATIENCE_S = 0.5
_LATE_S = 0.8
REPEATED = "delivered twice at once"
REFUSED_REPEAT = "delivered twice at once, the second refused"

FAULTS: Mapping[str, Mapping[str, Any]] = {
    "lost request": {"effect": "cut_before"},
    "lost answer": {"effect": "cut_after"},
    "reset before": {"effect": "reset_before"},
    "reset after": {"effect": "reset_after"},
    "60 s of silence before": {"effect": "silence_before", "seconds": SILENCE_S},
    "60 s of silence after": {"effect": "silence_after", "seconds": SILENCE_S},
    "executed after the client has left": {"effect": "none", "delay_s": _LATE_S},
    "truncated body": {"effect": "truncated"},
    "an answer that drips": {"effect": "drip", "seconds": 2.0},
    "HTML 502 before": {"effect": "html_before"},
    "HTML 502 after": {"effect": "html_after"},
    "HTML 200 after": {"effect": "html_after", "status": 200},
    "HTML 404": {"effect": "html_before", "status": 404},
    "429": {"effect": "too_many_requests", "retry_after_s": 0},
    "500 before": {"effect": "error_before"},
    "500 after": {"effect": "error_after"},
    "202 after": {"effect": "processing_after"},
    "executed twice": {"effect": "duplicate"},
    REPEATED: {},
    REFUSED_REPEAT: {},
    "the provider's clock three hours ahead": {},
    "the provider's clock three hours behind": {},
}
# How far the provider's clock is ahead of ours, where that is the fault.
CLOCKS = {
    "the provider's clock three hours ahead": 3 * HOUR,
    "the provider's clock three hours behind": -3 * HOUR,
}
# All answers come in the end, the late ones perhaps in time (where the client itself was held up): these may leave a
# run green.
HARMLESS = (
    "executed twice", REPEATED, REFUSED_REPEAT, "executed after the client has left", "an answer that drips",
)  # fmt: skip
_SLOW = (
    "60 s of silence before",
    "60 s of silence after",
    "executed after the client has left",
    "an answer that drips",
)

ONCE, EVERY_SECOND, ALWAYS = "once", "every second", "always"
PAGE_2_ONCE, PAGE_2 = "page 2, once", "page 2"
EXTENTS: Mapping[str, Mapping[str, Any]] = {
    ONCE: {"times": 1},
    EVERY_SECOND: {"times": None, "every": 2},
    PAGE_2_ONCE: {"times": 1, "page": 2},
    PAGE_2: {"times": None, "page": 2},
    ALWAYS: {"times": None},
}
CALLS = {"POST": "create", "list": "list", "GET": "get"}


def _crowded(scenario: Scenario) -> Scenario:
    """The same among so many other payments that every list has a second page, and none of them is anybody's work."""

    def prepare(service: Service) -> Story:
        story = scenario.prepare(service)
        # In the window that matching reads: successes that the service has written down itself ...
        agreed = [f"agreed-{number}" for number in range(120)]
        granted = service.subscription("crowd", ended_at=NOON + 60 * DAY)
        service.provider.add_payments(
            {"id": name, "created_at": NOON - HOUR / 3, "amount": "299.00", "metadata": {"user_id": name}}
            for name in agreed
        )
        service.execute(
            "INSERT INTO payments (subscription_id, payment_provider_id, status, currency, amount, external_payment_id,"
            " created_at, updated_at) SELECT :granted, :provider, 'SUCCEEDED', 'RUB', 299, name, :at, :at"
            " FROM unnest(CAST(:names AS text[])) AS name",
            granted=granted,
            provider=service.provider_id,
            names=agreed,
            at=(NOON - HOUR / 3).replace(tzinfo=None),
        )
        # ... and where a lost charge is searched for, yesterday: what was declined.
        service.provider.add_payments(
            {"id": f"declined-{number}", "created_at": NOON - DAY - HOUR, "amount": "299.00", "status": "canceled",
             "metadata": {"user_id": "x"}}
            for number in range(120)
        )  # fmt: skip
        ends = {**story.expected.ends, granted: ("ACTIVE", NOON + 60 * DAY)}
        return replace(story, expected=replace(story.expected, ends=ends))

    return replace(scenario, name=f"{scenario.name}, among many", prepare=prepare)


_BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}
CHARGING = _BY_NAME["autopayment, every kind of renewal"]
EXPIRY = _BY_NAME["expiry of payments"]
MATCHING = (_BY_NAME["matching pending payments"], _BY_NAME["matching successful payments"])
# Which job makes which requests, and to what extent they are struck.
STRUCK: Sequence[tuple[Scenario, str, Sequence[str]]] = (
    (CHARGING, "POST", (ONCE, EVERY_SECOND, ALWAYS)),
    (CHARGING, "GET", (ONCE, EVERY_SECOND, ALWAYS)),
    (EXPIRY, "GET", (ONCE, EVERY_SECOND, ALWAYS)),
    *((_crowded(scenario), "list", (ONCE, PAGE_2_ONCE, PAGE_2, ALWAYS)) for scenario in (CHARGING, *MATCHING)),
)

SHORTLY_STRUCK = tuple((scenario, call) for scenario, call, _ in (STRUCK[0], STRUCK[2], STRUCK[-1]))


@dataclass(frozen=True)
class Cell:
    """One fault in one job. `runs`: how many runs without it, after the one with it; None: not within three."""

    scenario: str
    call: str
    fault: str
    extent: str
    struck: int
    runs: int | None
    first_failure: str
    wrong: tuple[str, ...] = ()

    @property
    def subject(self) -> str:
        """As a person names it."""
        return f"{self.fault} ({self.extent}) on {self.call}, {self.scenario}"

    @property
    def is_green_by_mistake(self) -> bool:
        """Whether the struck run called itself a success although an answer that it needs never came."""
        never_came = self.extent in (ALWAYS, PAGE_2) and self.fault not in HARMLESS
        return never_came and not self.first_failure


class WireStage(Stage):
    """A scenario's world, in which the wire may be struck."""

    api_url = ""
    patience_s = 2.0

    def _case(self, url: str, now: datetime, death: Death | None = None) -> Case:
        case = super()._case(url, now, death)
        return replace(case, api_url=self.api_url or case.api_url, patience_s=self.patience_s)

    def suffer(self, fault: str, call: str, extent: str) -> Cell:
        """A run with the fault, and runs without it until the books agree."""
        with self._world() as url, self._striking(fault, call, extent) as rule:
            failure = self._run(url, 0).failure
            counts = self._sandbox.api.counts
            struck = rule.fired if rule else sum(counts.values()) if fault in CLOCKS else counts[CALLS[call]]
            if rule is not None:
                rule.skip = sys.maxsize  # the story's own rules stay
            self.api_url, self.patience_s, self.provider_ahead = "", 10.0, 0 * HOUR
            self._wait_for_peace(url)
            wrong: list[str] = []
            for runs in range(MOST_RUNS_AGAIN + 1):
                wrong = complaints(url, self._sandbox.provider.ledger(), self.story.expected)
                if not wrong:
                    return Cell(self.scenario.name, call, fault, extent, struck, runs, failure)
                if runs < MOST_RUNS_AGAIN:
                    self._run(url, runs + 1)
            return Cell(self.scenario.name, call, fault, extent, struck, None, failure, tuple(wrong))

    @contextmanager
    def _striking(self, fault: str, call: str, extent: str) -> Iterator[Misbehaviour | None]:
        self.patience_s = _PATIENCE_S if fault in _SLOW else 2.0
        if fault in CLOCKS:
            self.provider_ahead = CLOCKS[fault]
            yield None
            return
        if fault not in (REPEATED, REFUSED_REPEAT):
            yield self._sandbox.misbehave(CALLS[call], **FAULTS[fault], **EXTENTS[extent])
            return
        before = self._sandbox.provider.switches
        self._sandbox.provider.switches = replace(
            before, processing_s=0.05, concurrent_same_key="conflict" if fault == REFUSED_REPEAT else "wait"
        )
        try:
            with repeating_proxy(self._sandbox.url) as self.api_url:
                yield None
        finally:
            self.api_url = ""
            self._sandbox.provider.switches = before


def cells_of(scenario: Scenario, call: str, extents: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The faults and extents to try in this job on this kind of request."""
    for fault in FAULTS:
        if fault in (REPEATED, REFUSED_REPEAT):
            if call == "POST":  # a proxy repeats all of them or none
                yield fault, ALWAYS
        elif fault in CLOCKS:
            if ALWAYS in extents:
                yield fault, ALWAYS
        else:
            yield from ((fault, extent) for extent in extents)


def play(
    server: Server,
    migrated: str,
    sandbox: Sandbox,
    runner: Runner,
    scenario: Scenario,
    call: str,
    wanted: Sequence[tuple[str, str]],
) -> list[Cell]:
    """These cells of one job and kind of request."""
    stage = WireStage(server, migrated, sandbox, runner, scenario)
    try:
        stage.warm_up()
        _, wrong = stage.live()
        if wrong:
            raise AssertionError(f"{scenario.name}, undisturbed: {'; '.join(wrong)}")
        return [stage.suffer(fault, call, extent) for fault, extent in wanted]
    finally:
        stage.close()


def table(cells: Sequence[Cell]) -> str:
    """As a person reads it: a block for each job and kind of request, a line a fault, a column an extent."""
    lines: list[str] = []
    for scenario, call in dict.fromkeys((cell.scenario, cell.call) for cell in cells):
        mine = [cell for cell in cells if (cell.scenario, cell.call) == (scenario, call)]
        extents = [extent for extent in EXTENTS if any(cell.extent == extent for cell in mine)]
        lost = sum(cell.runs is None for cell in mine)
        lines.append(f"{call}, {scenario}: {len(mine)} cells, {lost} lost (struck / runs again until the books agreed)")
        lines.append(f"  {'fault':<44}" + "".join(f"{extent:>16}" for extent in extents))
        for fault in dict.fromkeys(cell.fault for cell in mine):
            told = {cell.extent: f"{cell.struck} / {'LOST' if cell.runs is None else cell.runs}"
                    for cell in mine if cell.fault == fault}  # fmt: skip
            lines.append(f"  {fault:<44}" + "".join(f"{told.get(extent, '-'):>16}" for extent in extents))
        lines.extend(f"  LOST: {c.subject}: {'; '.join(c.wrong)} {c.first_failure}" for c in mine if c.runs is None)
        lines.extend(f"  GREEN, and half blind: {cell.subject}" for cell in mine if cell.is_green_by_mistake)
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Strike the wire of each job.")
    parser.add_argument("--fault", choices=[*FAULTS])
    parser.add_argument("--call", choices=[*CALLS])
    parser.add_argument("--extent", choices=[*EXTENTS])
    asked = parser.parse_args()
    started, lost, count = time.monotonic(), 0, 0
    with workshop() as (server, migrated, sandbox, runner):
        for scenario, call, extents in STRUCK:
            wanted = [
                (fault, extent)
                for fault, extent in cells_of(scenario, call, extents)
                if asked.call in (None, call) and asked.fault in (None, fault) and asked.extent in (None, extent)
            ]
            if wanted:
                cells = play(server, migrated, sandbox, runner, scenario, call, wanted)
                lost += sum(cell.runs is None or cell.is_green_by_mistake for cell in cells)
                count += len(cells)
                print(table(cells), flush=True)
    print(f"{count} cells, {lost} lost, {time.monotonic() - started:.0f} s")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
