"""A plan for people: a table for each part, a line for each figure."""

from __future__ import annotations

from collections.abc import Iterator

from dsbert.base.text_table import table
from dsbert.jobs.capacity.figures import Figure
from dsbert.jobs.capacity.run_plan import Plan

_SCALES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def plan_lines(plan: Plan) -> Iterator[str]:
    """Of the whole plan; how a figure is known stands beside it, with its formula."""
    yield plan.heading
    yield ""
    rows = [(check.about, check.verdict, check.text) for check in plan.checks]
    yield table(("check", "", "found"), rows, fold="found")
    for part in plan.parts:
        yield ""
        figures = [(figure.name, shown(figure), figure.kind, figure.how) for figure in part.figures]
        yield table((part.name, "", "", "how"), figures, fold="how")


def shown(figure: Figure) -> str:
    """The value with its unit, three or four digits of it."""
    value, unit = figure.value, figure.unit
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit == "s":
        return f"{1000 * value:,.3g} ms" if abs(value) < 1 else f"{value:,.4g} s"
    if unit in ("bytes", "FLOP", "FLOP/s", "tokens/s"):
        return _scaled(value, "B" if unit == "bytes" else unit)
    text = f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:,.4g}"
    return f"{text} {unit}".rstrip()


def _scaled(value: float, unit: str) -> str:
    for scale, letter in _SCALES:
        if value >= scale:
            return f"{value / scale:,.4g} {letter}{unit}"
    return f"{value:,.4g} {unit}"
