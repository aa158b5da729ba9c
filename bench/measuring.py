"""What is common to all measurements: a child process with its CPU and memory, rounds, and ratios with their spread."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# What docs/performance.md was written from, and where else the numbers of a run go.
PUBLISHED = ROOT / "bench" / "results"
LATEST = PUBLISHED / "latest"


@dataclass(frozen=True)
class Spent:
    """What a finished process has used, and what it printed last, if that was JSON."""

    wall_s: float
    cpu_s: float
    memory_mib: float
    told: dict[str, float]


def run(command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Spent:
    """Run a process to its end. Raises RuntimeError with its last words when it fails."""
    began = time.monotonic()
    process = subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=dict(env if env is not None else os.environ),
        cwd=cwd or ROOT,
        text=True,
    )
    assert process.stdout is not None
    words = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall_s = time.monotonic() - began
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)[:200]} ended with {process.returncode}:\n{words[-3000:]}")
    last = words.strip().rpartition("\n")[2]
    told = json.loads(last) if last.startswith("{") else {}
    return Spent(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, told)


def run_module(module: str, *arguments: object) -> Spent:
    """Run a module of this package in a process of its own."""
    return run([sys.executable, "-m", module, *(str(argument) for argument in arguments)])


def memory_mib() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


Round = Mapping[str, Mapping[str, float]]


def interleaved(rounds: int, sides: Mapping[str, Callable[[], Mapping[str, float]]]) -> list[Round]:
    """Measure every side in turn, `rounds` times over, so that a busy minute of the machine hits them all."""
    done = []
    for number in range(rounds):
        results = {}
        for name, measure in sides.items():
            results[name] = dict(measure())
        done.append(results)
        shown = "; ".join(
            f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())
            for name, numbers in results.items()
        )
        print(f"  round {number + 1} of {rounds}: {shown}", flush=True)
    return done


@dataclass(frozen=True)
class Row:
    """One line of the table: a number of ours against one of theirs, over the rounds."""

    what: str
    against: str
    goal: str
    values: tuple[float, ...]
    unit: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """The line's cells, as text."""
        middle, least, most = statistics.median(self.values), min(self.values), max(self.values)
        return (
            self.what,
            self.against,
            f"{middle:.2f}{self.unit}",
            f"{least:.2f} – {most:.2f}",
            self.goal,
        )


def ratio(rounds: Sequence[Round], key: str, ours: str, theirs: str) -> tuple[float, ...]:
    """Ours through theirs, round by round."""
    return tuple(results[ours][key] / results[theirs][key] for results in rounds)


def values(rounds: Sequence[Round], key: str, side: str) -> tuple[float, ...]:
    """One side's numbers, round by round."""
    return tuple(results[side][key] for results in rounds)


def machine() -> dict[str, Any]:
    """What it was measured on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    ) if Path("/proc/cpuinfo").exists() else platform.processor()  # fmt: skip
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3, 1),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "load_at_start": [round(load, 1) for load in os.getloadavg()],
    }


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    head = ("what", "against", "median", "least – most", "goal")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(row.cells)} |" for row in rows]
    return "\n".join(lines)
