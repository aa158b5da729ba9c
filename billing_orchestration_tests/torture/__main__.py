"""All of the torture, part by part: `make torture`.

    python -m billing_orchestration_tests.torture                       every part, two at a time
    python -m billing_orchestration_tests.torture simulation mutants    these parts only
    python -m billing_orchestration_tests.torture --rounds 1000 --first 2001

A part that fails keeps no other from running. The end says how each part ended, and how to run one alone.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

HERE = "billing_orchestration_tests/torture"
# The part that takes longest comes first: the others fit beside it.
TESTS = {
    "mutants": ("test_mutants.py",),
    "postgresql": ("test_postgres_faults.py",),
    "kills": ("test_kill_matrix.py",),
    "wire": ("test_wire_faults.py",),
    "races": ("test_races.py",),
    "judge": (
        "test_simulation.py",
        "test_simulation_oracle.py",
        "test_simulation_sends.py",
        "test_simulation_threads.py",
        "test_judge_is_complete.py",
        "test_parts.py",
    ),
}
SIMULATION = "simulation"
DEFAULT_SEEDS = 30
SIMULATION_S = 420
AT_A_TIME = 2


@dataclass(frozen=True)
class Part:
    """One attack, run as a command of its own."""

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Ended:
    """How a part ended: its exit code (0: the promise held), what it printed."""

    part: Part
    code: int
    words: str
    seconds: float


def parts(rounds: int, first: int) -> list[Part]:
    """All of them. `rounds` is a night's; 0: what twenty minutes have room for."""
    python = sys.executable
    seeds = ("--regressions", "--first", str(first), "--rounds", str(rounds or DEFAULT_SEEDS), "--workers", "1")
    if not rounds:
        seeds += ("--longest", str(SIMULATION_S))
    return [
        Part(SIMULATION, (python, "-m", "billing_orchestration_tests.torture.simulation", *seeds)),
        *(
            Part(name, (python, "-m", "pytest", *(f"{HERE}/{file}" for file in files)))
            for name, files in TESTS.items()
        ),
    ]  # fmt: skip


class Torture:
    """Runs parts, some at a time."""

    def __init__(self, rounds: int, told: Callable[[str], None], first: int = 1) -> None:
        self._rounds, self._told, self._first = rounds, told, first
        self._running: list[subprocess.Popen[str]] = []
        self._is_over = False

    def run(self, chosen: Sequence[Part]) -> list[Ended]:
        """How each ended, whatever the others did. Ctrl-C and SIGTERM end those under way, and begin no other."""
        before = {which: signal.signal(which, self._interrupt) for which in (signal.SIGINT, signal.SIGTERM)}
        try:
            with ThreadPoolExecutor(AT_A_TIME) as threads:
                playing = [threads.submit(self._play, part) for part in chosen]
                # In short stretches: a signal that comes right before a wait is only noticed after it.
                while wait(playing, timeout=0.2).not_done:
                    pass
        finally:
            for which, handler in before.items():
                signal.signal(which, handler)
        if self._is_over:
            raise KeyboardInterrupt
        return [part.result() for part in playing]

    def _interrupt(self, *_: object) -> None:
        # Nothing is raised here: an exception in the middle of anything might be lost.
        self._is_over = True
        for process in self._running:
            _end(process)

    def _play(self, part: Part) -> Ended:
        began = time.monotonic()
        if self._is_over:
            return Ended(part, -signal.SIGINT, "", 0.0)
        self._told(f"=== {part.name} begins")
        with subprocess.Popen(
            part.command,
            env={**os.environ, "TORTURE_ROUNDS": str(self._rounds), "TORTURE_FIRST": str(self._first)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            self._running.append(process)
            if self._is_over:  # since before it could be found
                _end(process)
            words, _ = process.communicate()
        self._told(f"=== {part.name}\n{words}")
        return Ended(part, process.returncode, words, time.monotonic() - began)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)


def table(ended: Sequence[Ended]) -> str:
    """How each part ended, the failed ones last, with the command that runs one alone."""
    lines = [
        f"  {one.part.name:<12} {one.seconds:>6.0f} s  {'held' if one.code == 0 else f'FAILED, exit code {one.code}'}"
        for one in sorted(ended, key=lambda one: one.code != 0)
    ]
    failed = [one.part for one in ended if one.code != 0]
    lines.append(f"FAILED: {', '.join(part.name for part in failed)}" if failed else "The promise held in every part.")
    lines += [f"  alone: {shlex.join((Path(part.command[0]).name, *part.command[1:]))}" for part in failed]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 when any part failed."""
    parser = argparse.ArgumentParser(description="Attack the promise, part by part.")
    every = {part.name: part for part in parts(0, 1)}
    parser.add_argument("part", nargs="*", help=", ".join(every))
    parser.add_argument("--rounds", type=int, default=0, help="how long it goes on, for a night; 0: its default")
    parser.add_argument("--first", type=int, default=1, help="the simulation's first seed, and where mutants begin")
    asked = parser.parse_args(arguments)
    if unknown := set(asked.part) - set(every):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    chosen = [part for part in parts(asked.rounds, asked.first) if not asked.part or part.name in asked.part]
    ended = Torture(asked.rounds, lambda words: print(words, flush=True), asked.first).run(chosen)
    print(table(ended), flush=True)
    return 1 if any(one.code for one in ended) else 0


if __name__ == "__main__":
    sys.exit(main())
