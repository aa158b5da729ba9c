"""Growth (point 5): what each job costs at 1, 10 and 100 times a size, and the exponent between the last two.

An exponent of 1 is linear; n log n is about 1.1 at these sizes. The plot is written to docs/performance.png when
matplotlib is there (the extra `bench`).
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from bench import charging, expiry, matching
from bench.measuring import ROOT, Row, run_module
from bench.provider import provider
from bench.stage import Database

_TIMES = 3


def measure(server: Database, largest: int) -> tuple[dict[str, dict[int, list[float]]], list[Row]]:
    """Seconds by job and size, and the table's lines."""
    costs: dict[str, dict[int, list[float]]] = {
        "expiring a tenth of the subscriptions, wall": {},
        "matching a slice of a tenth of the payments, wall": {},
        "charging a hundredth, CPU": {},
    }
    expired, matched, charged = costs
    for size in (largest // 100, largest // 10, largest):
        expiry.fill(server.create("size", "billing"), size)
        costs[expired][size] = [
            run_module("bench.expiry", "subscriptions", server.create("work", "size")).told["wall_s"]
            for _ in range(_TIMES)
        ]
        slice_size, repair = max(20, size // 10), max(2, size // 200)
        matching.fill(server.create("size", "billing"), slice_size, repair, size)
        with provider(0.0, matching.history(slice_size)) as api_url:
            costs[matched][size] = [
                run_module("bench.matching", "ours", server.create("work", "size"), api_url).told["wall_s"]
                for _ in range(_TIMES)
            ]
        due = max(20, size // 100)
        url = server.create("size", "billing")
        with provider(0.01) as api_url:
            costs[charged][size] = []
            for _ in range(_TIMES):
                charging.fill(url, due)
                told = run_module("bench.charging", "ours", url, api_url, 16).told
                costs[charged][size].append(told["cpu_ms"] * told["charges"] / 1000)
        shown = ", ".join(f"{what} {statistics.median(told[size]):.3f} s" for what, told in costs.items())
        print(f"  {size:,}: {shown}", flush=True)
    server.drop("work")
    server.drop("size")
    rows = []
    for what, by_size in costs.items():
        sizes = sorted(by_size)
        exponents = sorted(
            math.log(more / less) / math.log(sizes[-1] / sizes[-2])
            for less, more in zip(sorted(by_size[sizes[-2]]), sorted(by_size[sizes[-1]]), strict=True)
        )
        rows.append(
            Row(f"growth: {what}, {sizes[-2]:,} to {sizes[-1]:,}", "exponent; 1 is linear", "≤ 1.1", tuple(exponents))
        )
    _plot(costs, ROOT / "docs" / "performance.png")
    return costs, rows


def _plot(costs: dict[str, dict[int, list[float]]], path: Path) -> None:
    try:
        import matplotlib as mpl
    except ImportError:
        print("  no plot: pip install -e '.[bench]' brings matplotlib")
        return
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), dpi=90)
    for what, told in costs.items():
        sizes = sorted(told)
        axes.plot(sizes, [statistics.median(told[size]) for size in sizes], marker="o", label=what)
    first = min(min(told) for told in costs.values())
    last = max(max(told) for told in costs.values())
    base = min(statistics.median(told[min(told)]) for told in costs.values())
    linear = [first, last]
    axes.plot(linear, [base * size / first for size in linear], color="grey", linestyle=":", label="linear")
    axes.set(xscale="log", yscale="log", xlabel="rows of the table", ylabel="seconds", title="Cost against size")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
