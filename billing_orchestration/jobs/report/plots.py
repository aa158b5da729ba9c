"""The report's plots, as PNG in data URIs. The only module of the jobs that imports a plotting library.

They have no background, and grey text: legible on a light page and on a dark one.
"""

import base64
import io
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from billing_orchestration.jobs.report.composing import Counted

# About as far from white as from black.
_INK = "#7d7d7d"
_COLOURS = ("#3b82c4", "#d9792b", "#8f62c9", "#3a9a68")
_MARKS = ("o", "s", "^", "D")
_DAYS_AFTER = (0, 1, 2, 3)


def plots(of: Counted) -> dict[str, str]:
    """Data URIs by name: charges, dunning, revenue. What has nothing to show is left out."""
    images: dict[str, str] = {}
    if of.charges:
        days = [f"{line.day:%d.%m}" for line in of.charges]
        lines = {name: [getattr(line, name) for line in of.charges] for name in ("charged", "declined")}
        images["charges"] = _image(days, lines, "charges")
    if of.dunning:
        lines = {
            line[0]: [0.0, *(100 * n / line.declined for n in (line.after_1, line.after_2, line.after_3))]
            for line in of.dunning
        }
        images["dunning"] = _image([f"day {day}" for day in _DAYS_AFTER], lines, "paid after a decline, %")
    if of.revenue:
        all_days = sorted({line.day for line in of.revenue})
        by = {(line.day, line.currency): line.paid for line in of.revenue}
        currencies = sorted({line.currency for line in of.revenue})
        lines = {name: [float(by.get((day, name), Decimal(0))) for day in all_days] for name in currencies}
        images["revenue"] = _image([f"{day:%d.%m}" for day in all_days], lines, "paid")
    return images


def _image(xs: Sequence[str], lines: dict[str, list[Any]], what: str) -> str:
    figure = Figure(figsize=(8, 2.8), dpi=90, layout="constrained")
    axes: Axes = figure.subplots()
    # By mark and by colour: nobody has to tell colours apart.
    for number, (name, values) in enumerate(lines.items()):
        axes.plot(xs, values, label=name, color=_COLOURS[number % len(_COLOURS)], marker=_MARKS[number % len(_MARKS)])
    axes.set_ylabel(what, color=_INK)
    axes.set_ylim(bottom=0)
    axes.tick_params(colors=_INK)
    step = max(1, len(xs) // 10)
    axes.set_xticks(range(0, len(xs), step), xs[::step])
    for spine in axes.spines.values():
        spine.set_color(_INK)
    axes.legend(frameon=False, labelcolor=_INK)
    with io.BytesIO() as png:
        figure.savefig(png, format="png", transparent=True, metadata={"Software": None})
        return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
