"""The command line."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import CancelledError, as_completed

from billing_orchestration_tests.torture.simulation import __doc__ as about
from billing_orchestration_tests.torture.simulation.mishaps import MISHAPS
from billing_orchestration_tests.torture.simulation.playing import play_seed, simulated_server, workers_of
from billing_orchestration_tests.torture.simulation.results import REGRESSIONS, Result, summary, told
from billing_orchestration_tests.torture.simulation.story import DAYS


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 when any seed broke the promise."""
    parser = argparse.ArgumentParser(description=(about or "").split("\n")[0])
    parser.add_argument("--seed", type=int, action="append", help="play this seed (may be repeated)")
    parser.add_argument("--rounds", type=int, default=20, help="without --seed: how many seeds to play")
    parser.add_argument("--first", type=int, default=1, help="the first seed of the rounds")
    parser.add_argument("--regressions", action="store_true", help="also those that showed a fault once")
    parser.add_argument("--days", type=int, default=DAYS)
    parser.add_argument("--longest", type=float, default=float("inf"), help="seconds after which no seed is begun")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--mishap", action="append", choices=MISHAPS, help="befalls every seed (may be repeated)")
    parser.add_argument("--story", action="store_true", help="print everything that happened")
    given = parser.parse_args(arguments)
    # As Ctrl-C: the workers and the PostgreSQL are ended, not left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    seeds = given.seed or list(range(given.first, given.first + given.rounds))
    if given.regressions:
        seeds = list(dict.fromkeys([*REGRESSIONS, *seeds]))
    began = time.monotonic()
    results: list[Result] = []
    with simulated_server() as server:
        for result in _played(server, seeds, given):
            results.append(result)
            print(told(result), flush=True)
    words, good = summary(results, given.days, time.monotonic() - began)
    print(words)
    if len(results) < len(seeds):
        print(f"not played, for want of time: {len(seeds) - len(results)} seeds")
    return 0 if good else 1


def _played(server: tuple[str, str], seeds: list[int], given: argparse.Namespace) -> Iterator[Result]:
    """One seed in this process, where its story can be watched; several side by side."""
    mishaps = frozenset(given.mishap or ())
    if len(seeds) == 1:
        yield play_seed(*server, seeds[0], given.days, mishaps=mishaps, live=given.story)
        return
    end = time.monotonic() + given.longest
    with workers_of(given.workers) as workers:
        playing = {workers.submit(play_seed, *server, seed, given.days, mishaps=mishaps): seed for seed in seeds}
        for done in as_completed(playing):
            if time.monotonic() > end:
                for future in playing:
                    future.cancel()
            try:
                yield done.result()
            except CancelledError:
                continue
            except Exception:  # noqa: BLE001 - a seed that the simulation itself cannot play
                broke = f"the simulation broke:\n{traceback.format_exc()}"
                yield Result(playing[done], given.days, 0, (broke,), (), 0.0)


if __name__ == "__main__":
    sys.exit(main())
