"""`make bench`: measure, print one table of ratios, keep the raw numbers, plans and plot in bench/results/latest/."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from datetime import datetime, timezone
from typing import Any

from bench import charging, day, expiry, growth, history, matching, peers, reconciliation, shards, ten_renewals, tick
from bench.measuring import LATEST, PUBLISHED, Row, machine, markdown
from bench.stage import database

PARTS = (
    "charging",
    "shards",
    "tick",
    "renewals",
    "day",
    "expiry",
    "matching",
    "growth",
    "history",
    "reconciliation",
    "peers",
)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"what to measure: {', '.join(PARTS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of each measurement (5)")
    parser.add_argument("--charges", type=int, default=2_000, help="due subscriptions (the goal speaks of 20000)")
    parser.add_argument("--concurrency", type=int, default=64, help="charges in flight (64)")
    parser.add_argument("--subscriptions", type=int, default=200_000, help="rows of expiry (goal: 1000000)")
    parser.add_argument("--slice", type=int, default=10_000, help="provider payments to match (goal: 100000)")
    parser.add_argument("--repair", type=int, default=500, help="of them to repair (goal: 5000)")
    parser.add_argument("--payments", type=int, default=500_000, help="rows of the payments table (goal: 5000000)")
    parser.add_argument("--days", type=int, default=3, help="days to reconcile (goal: 30, with --slice 33334)")
    parser.add_argument("--largest", type=int, default=100_000, help="growth: rows of the largest table (100000)")
    parser.add_argument("--publish", action="store_true", help="keep them in bench/results/, for docs/performance.md")
    given = parser.parse_args()
    # Ended from outside, it still stops its server and removes its data.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    parts = given.parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: none of {', '.join(PARTS)}")
    about = {**machine(), "at": datetime.now(timezone.utc).isoformat(timespec="seconds"), "arguments": vars(given)}
    print(json.dumps(about))
    rows: list[Row] = []
    results = PUBLISHED if given.publish else LATEST
    results.mkdir(parents=True, exist_ok=True)
    with database() as server:
        for part in parts:
            print(f"{part} …", flush=True)
            raw: Any
            if part == "charging":
                raw, more = charging.measure(server, given.rounds, given.charges, given.concurrency)
            elif part == "shards":
                raw, more = shards.measure(server, given.rounds, given.charges, given.concurrency)
            elif part == "tick":
                raw, more = tick.measure(server, given.rounds)
            elif part == "renewals":
                raw, more = ten_renewals.measure(server, given.rounds)
            elif part == "day":
                raw, more = day.measure(server, given.rounds)
            elif part == "peers":
                raw, more = peers.measure(server, given.rounds)
            elif part == "expiry":
                raw, more = expiry.measure(server, results, given.rounds, given.subscriptions)
            elif part == "matching":
                raw, more = matching.measure(server, results, given.rounds, given.slice, given.repair, given.payments)
            elif part == "reconciliation":
                raw, more = reconciliation.measure(server, given.rounds, given.days, given.slice)
            elif part == "history":
                raw, more = history.measure(server)
            else:
                raw, more = growth.measure(server, results, given.largest)
            rows += more
            table = [row.cells for row in more]
            text = json.dumps({"machine": about, "rounds": raw, "table": table}, indent=1, ensure_ascii=False)
            (results / f"{part}.json").write_text(text + "\n", encoding="utf-8")
    print(f"\n{markdown(rows)}")


if __name__ == "__main__":
    main()
