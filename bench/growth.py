"""Growth (point 5): what each job costs at sizes a factor of ten apart, and the exponent of each step.

An exponent of 1 is linear; n log n is about 1.1 at these sizes. Sizes are rows of the largest table: a tenth of the
subscriptions and payments is over, a fiftieth of the payments is in the provider's slice or in the day that is
reconciled, a thousandth to be repaired (the proportions of the goals), a hundredth of the subscriptions is due. The
money checks, the numbers over time and `doctor` are asked about three years of payments (see `asking`). The plot is
written to performance.png beside the numbers when matplotlib is there (the extra `bench`).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bench import asking, charging, expiry, matching, reconciliation
from bench.measuring import Row, run_module
from bench.provider import provider
from bench.stage import Database

_TIMES = 3
# Copying a database of some gigabytes for each measurement takes longer than the measurement.
_ONCE_FROM = 5_000_000
_CONCURRENCY = 64
_LATENCY_S = 0.01
_ASKED = {"money_checks": "money checks", "numbers": "numbers over time", "doctor": "doctor, database work"}

Costs = dict[str, dict[int, list[float]]]
# Each cost by its name; what it needs is there until the next one is asked for.
Measurements = Iterator[tuple[str, Callable[[], float]]]


def measure(server: Database, folder: Path, largest: int) -> tuple[Costs, list[Row]]:
    """Seconds by job and size, and the table's lines."""
    costs: Costs = {}
    for size in (largest // 1000, largest // 100, largest // 10, largest):
        times = _TIMES if size < _ONCE_FROM else 1
        for costs_of in (_expiring, _matching, _charging, _reconciling, _asking):
            for what, cost in costs_of(server, size):
                costs.setdefault(what, {})[size] = [cost() for _ in range(times)]
        server.drop("work")
        shown = ", ".join(f"{what} {statistics.median(told[size]):.3f} s" for what, told in costs.items())
        print(f"  {size:,}: {shown}", flush=True)
    server.drop("size")
    rows = [
        Row(
            f"growth: {what}, {fewer:,} to {more:,}",
            "exponent; 1 is linear",
            "≤ 1.1",
            _exponents(by_size[fewer], by_size[more], more / fewer),
        )
        for what, by_size in costs.items()
        for fewer, more in itertools.pairwise(sorted(by_size)[1:])
    ]
    rows += [
        Row(f"{what}, {largest:,} payments", "", "< 1 s", tuple(costs[what][largest]), " s") for what in _ASKED.values()
    ]
    _plot(costs, folder / "performance.png")
    return costs, rows


def _expiring(server: Database, size: int) -> Measurements:
    expiry.fill(server.create("size", "billing"), size)

    def expire(what: str) -> float:
        return run_module("bench.expiry", what, server.create("work", "size")).told["wall_s"]

    for what in ("subscriptions", "payments"):
        yield f"expire_{what}_job, database work", partial(expire, what)


def _matching(server: Database, size: int) -> Measurements:
    slice_size, repair = max(20, size // 50), max(2, size // 1000)
    matching.fill(server.create("size", "billing"), slice_size, repair, size)
    with provider(0.0, matching.history(slice_size)) as api_url:

        def match(which: str) -> float:
            told = run_module("bench.matching", which, server.create("work", "size"), api_url).told
            if told["rows"] != repair:
                raise RuntimeError(f"{told['rows']} of {repair} payments repaired")
            return told["wall_s"]

        for which in ("pending", "successful"):
            yield f"matching_{which}_payments_job", partial(match, which)


def _charging(server: Database, size: int) -> Measurements:
    due = max(20, size // 100)
    with provider(_LATENCY_S) as api_url:

        def charge() -> float:
            url = server.create("work", "billing")
            charging.fill(url, due)
            told = run_module("bench.charging", "ours", url, api_url, _CONCURRENCY).told
            return told["cpu_ms"] * told["charges"] / 1000

        yield "autopayment_job, CPU of charging", charge


def _reconciling(server: Database, size: int) -> Measurements:
    count = max(20, size // 50)
    url = server.create("size", "billing")
    reconciliation.fill(url, 1, count, size - count)
    with provider(0.0, reconciliation.history(1, count)) as api_url:

        def reconcile() -> float:
            told = run_module("bench.reconciliation", "ours", url, api_url, 1).told
            if told["lines"] != count:
                raise RuntimeError(f"{told['lines']} of {count} payments agree")
            return told["wall_s"]

        yield "reconciliation of a day", reconcile


def _asking(server: Database, size: int) -> Measurements:
    url = server.create("size", "billing")
    asking.fill(url, size)

    def ask(what: str) -> float:
        return run_module("bench.asking", what, url).told["wall_s"]

    for what, name in _ASKED.items():
        yield name, partial(ask, what)


def _exponents(fewer: list[float], more: list[float], factor: float) -> tuple[float, ...]:
    """Of each of the larger size's measurements, against the median of the smaller's."""
    return tuple(sorted(math.log(cost / statistics.median(fewer)) / math.log(factor) for cost in more))


def _plot(costs: Costs, path: Path) -> None:
    try:
        import matplotlib as mpl
    except ImportError:
        print("  no plot: pip install -e '.[bench]' brings matplotlib")
        return
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5), dpi=90)
    for what, told in costs.items():
        sizes = sorted(told)
        axes.plot(sizes, [statistics.median(told[size]) for size in sizes], marker="o", label=what)
    first = min(min(told) for told in costs.values())
    last = max(max(told) for told in costs.values())
    base = min(statistics.median(told[min(told)]) for told in costs.values())
    for name, style, growth in (
        ("linear", ":", lambda size: size / first),
        ("n log n", "--", lambda size: size * math.log(size) / (first * math.log(first))),
    ):
        axes.plot([first, last], [base, base * growth(last)], color="grey", linestyle=style, label=name)
    axes.set(xscale="log", yscale="log", xlabel="rows of the table", ylabel="seconds", title="Cost against size")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
