"""Pictures of an experiment, as SVG text: loss against FLOPs and seconds, loss curves, what the masks explored."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

from dsbert.base.errors import UserError
from dsbert.experiment.cell_results import CellResult, Measurement
from dsbert.experiment.cells import words
from dsbert.experiment.planning import Group, Plan
from dsbert.reports.drawing import Picture, make_logarithmic, new_figure

_STYLES = ("-", "--", "-.", ":")
_LOSS = "held-out MLM loss, nats per masked token"


def pictures(plan: Plan) -> dict[str, str]:
    """By title: SVG. Raises UserError where matplotlib is missing, or nothing is there to be drawn."""
    if not any(_results(plan, group) for group in plan.groups):
        raise UserError("expected cells that are trained and whose sweep is over, found none: train them first")
    found = {
        "Loss and FLOPs": _pareto(plan, lambda last: last.flops, "training FLOPs"),
        "Loss and seconds": _pareto(
            plan, lambda last: last.seconds, "seconds of training, without evaluation and saves"
        ),
        "Loss over the run": _curves(plan),
    }
    if any(result.masks for group in plan.groups for result in _results(plan, group)):
        found["What the masks explored"] = _masks(plan)
    return found


def file_name(title: str) -> str:
    """Of a picture."""
    return f"{title.lower().replace(' ', '-')}.svg"


def _pareto(plan: Plan, cost: Callable[[Measurement], float], label: str) -> str:
    """Arms as lines over their grid points; a dense arm is the curve that the others are judged by."""
    figure, (axes,) = new_figure()
    for arm, color in _colors(plan).items():
        points = sorted(
            (statistics.fmean(cost(result.last) for result in results), results)
            for group in plan.groups
            if group[0] == arm and (results := _results(plan, group))
        )
        if points:
            losses = [statistics.fmean(result.loss for result in results) for _, results in points]
            style = "--" if _is_dense(plan, arm) else "-"
            axes.plot([x for x, _ in points], losses, style, marker="o", color=color, label=arm)
            for _, results in points:
                seeds = [(cost(result.last), result.loss) for result in results]
                axes.plot(*zip(*seeds, strict=True), ".", color=color, alpha=0.5, markersize=4)
    axes.set(xlabel=label, ylabel=_LOSS)
    make_logarithmic(axes.xaxis)
    axes.legend(frameon=False, fontsize="small")
    return Picture(figure).svg()


def _curves(plan: Plan) -> str:
    """A color for each arm, a style of line for each grid point; a line for each seed."""
    figure, (axes,) = new_figure()
    colors = _colors(plan)
    styles = dict(zip(dict.fromkeys(point for _, point in plan.groups), itertools.cycle(_STYLES), strict=False))
    for group in plan.groups:
        for number, result in enumerate(_results(plan, group)):
            axes.plot(
                [one.step for one in result.measurements], [one.loss for one in result.measurements],
                styles[group[1]], color=colors[group[0]], alpha=0.7, label=None if number else _label(group),
            )  # fmt: skip
    axes.set(xlabel="step", ylabel=_LOSS)
    axes.legend(frameon=False, fontsize="small")
    return Picture(figure).svg()


def _masks(plan: Plan) -> str:
    figure, (left, right) = new_figure(2)
    colors = _colors(plan)
    for group in plan.groups:
        for number, result in enumerate(one for one in _results(plan, group) if one.masks):
            steps = [one.step for one in result.masks]
            label = _label(group) if number == 0 else None
            left.plot(steps, [one.dof for one in result.masks], color=colors[group[0]], alpha=0.7, label=label)
            right.plot(steps, [one.removed_new_ratio for one in result.masks], color=colors[group[0]], alpha=0.7)
    left.set(xlabel="step", ylabel="share of positions explored", ylim=(0, 1.02))
    right.set(xlabel="step", ylabel="share of pruned blocks that were new", ylim=(0, 1.02))
    left.legend(frameon=False, fontsize="small")
    return Picture(figure).svg()


def _results(plan: Plan, group: Group) -> list[CellResult]:
    return [plan.results[cell.name] for cell in plan.chosen(group) if cell.name in plan.results]


def _is_dense(plan: Plan, arm: str) -> bool:
    return any(cell.recipe.sparsity.pattern == "dense" for cell in plan.cells if cell.arm == arm)


def _label(group: Group) -> str:
    arm, point = group
    return " ".join([arm, *words(point)])


def _colors(plan: Plan) -> dict[str, str]:
    return {arm: f"C{number % 10}" for number, arm in enumerate(plan.experiment.arms)}
