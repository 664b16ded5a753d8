"""Tables of an experiment: one row per arm and grid point, one per comparison, and all cells with their runs."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

from dsbert.base.errors import UserError
from dsbert.experiment.cell_results import CellResult
from dsbert.experiment.cells import Cell, Point, shown
from dsbert.experiment.paired_statistics import Estimate, estimate
from dsbert.experiment.planning import Plan


@dataclass(frozen=True)
class Table:
    """header: names of columns; rows: what stands in them, as text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def main_tables(plan: Plan) -> list[Table]:
    """The arms, and their differences where the file asks for some."""
    return [arms_table(plan), *([comparisons_table(plan)] if plan.experiment.compare else [])]


def arms_table(plan: Plan) -> Table:
    """Each arm and grid point at its best swept values. loss: held-out MLM loss at the last step, nats per token; half
    way: the step at which half of the fall of the loss is behind."""
    rows = []
    for group in plan.groups:
        arm, point = group
        best = plan.best[group]
        chosen = plan.chosen(group)
        results = [plan.results[cell.name] for cell in chosen if cell.name in plan.results]
        rows.append(
            (
                arm,
                *_values(point, _grid_keys(plan)),
                *(_values(best, _swept_keys(plan)) if best is not None else ("sweeping",) * len(_swept_keys(plan))),
                *_measured(results, len(chosen) or len(plan.experiment.seeds)),
            )
        )
    columns = ("density", "loss", "n", "half way", "FLOPs", "seconds", "dof", "removed new")
    header = ("arm", *map(_short, _grid_keys(plan)), *map(_short, _swept_keys(plan)), *columns)
    return Table("arms", header, tuple(rows))


def _measured(results: list[CellResult], wanted: int) -> tuple[str, ...]:
    if not results:
        return ("", "missing", f"0 of {wanted}", "", "", "", "", "")
    last = [result.last for result in results]
    masks = [result.masks for result in results if result.masks]
    ratios = [one.removed_new_ratio for found in masks for one in found]
    return (
        f"{results[0].density:.3g}",
        str(estimate([result.loss for result in results])),
        str(len(results)) if len(results) == wanted else f"{len(results)} of {wanted}",
        f"{_mean([result.half_step for result in results]):.0f}",
        f"{_mean([one.flops for one in last]):.3g}",
        f"{_mean([one.seconds for one in last]):.0f}",
        f"{_mean([found[-1].dof for found in masks]):.2f}" if masks else "",
        f"{_mean(ratios):.2f}" if ratios else "",
    )


@dataclass(frozen=True)
class Comparison:
    """loss of `arm` less that of `other`, at a grid point of both, paired by seed."""

    arm: str
    other: str
    point: Point
    difference: Estimate


def comparisons(plan: Plan) -> list[Comparison]:
    """As the file asks for, at every grid point of the first arm; the other arm at the same one, or at its only one."""
    found = []
    for arm, other in plan.experiment.compare:
        points = [group[1] for group in plan.groups if group[0] == arm]
        others = [group[1] for group in plan.groups if group[0] == other]
        for point in points:
            against = point if point in others else others[0] if len(others) == 1 else None
            if against is not None:
                found.append(Comparison(arm, other, point, _difference(plan, (arm, point), (other, against))))
    return found


def _difference(plan: Plan, one: tuple[str, Point], other: tuple[str, Point]) -> Estimate:
    mine, theirs = (
        {cell.seed: plan.results[cell.name].loss for cell in plan.chosen(group) if cell.name in plan.results}
        for group in (one, other)
    )
    return estimate([mine[seed] - theirs[seed] for seed in plan.experiment.seeds if seed in mine and seed in theirs])


def comparisons_table(plan: Plan) -> Table:
    """Negative: the first arm is better. A star where the interval excludes zero."""
    keys = _grid_keys(plan)
    rows = tuple(
        (
            f"{one.arm} - {one.other}",
            *_values(one.point, keys),
            str(one.difference) + (" *" if one.difference.excludes_zero else ""),
            str(one.difference.n),
        )
        for one in comparisons(plan)
    )
    return Table("differences of loss, paired by seed", ("arms", *map(_short, keys), "difference", "n"), rows)


def cells_table(plan: Plan) -> Table:
    """Every cell that is wanted, with the name of its run directory: all numbers of the other tables come from here."""
    rows = tuple((cell.label, *_state(plan, cell), f"cells/{cell.name}") for cell in plan.wanted)
    return Table("cells", ("cell", "loss", "seconds", "run"), rows)


def _state(plan: Plan, cell: Cell) -> tuple[str, str]:
    if cell.name in plan.given_up:
        return "failed twice", ""
    result = plan.results.get(cell.name)
    return (f"{result.loss:.4f}", f"{result.last.seconds:.0f}") if result else ("missing", "")


def notes(plan: Plan) -> list[str]:
    """What a reader of the tables must know: what is missing, and whether all was trained by the same versions."""
    found = []
    if plan.missing or plan.unknown:
        more = f", and {plan.unknown} more once sweeps are over" if plan.unknown else ""
        found.append(f"{len(plan.missing)} of {len(plan.wanted)} cells are missing{more}")
    results = [plan.results[cell.name] for cell in plan.wanted if cell.name in plan.results]
    revisions = sorted({result.revision or "unknown" for result in results})
    if len(revisions) > 1:
        found.append(f"trained at {len(revisions)} revisions: {', '.join(revision[:12] for revision in revisions)}")
    torches = sorted({str(result.versions.get("torch")) for result in results})
    if len(torches) > 1:
        found.append(f"trained with torch {' and '.join(torches)}")
    return found


def as_text(table: Table, form: str) -> str:
    """Markdown, LaTeX (booktabs) or CSV. Raises UserError where tabulate is missing."""
    if form == "csv":
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([table.header, *table.rows])
        return buffer.getvalue().rstrip("\n")
    try:
        from tabulate import tabulate
    except ImportError:
        raise UserError("expected tabulate for tables, found none: pip install 'dsbert[experiment]'") from None
    formats = {"markdown": "github", "latex": "latex_booktabs"}
    return str(tabulate(table.rows, headers=table.header, tablefmt=formats[form], disable_numparse=True))


def as_json(table: Table) -> list[dict[str, Any]]:
    """An object per row."""
    return [dict(zip(table.header, row, strict=True)) for row in table.rows]


def _grid_keys(plan: Plan) -> list[str]:
    return list(dict.fromkeys(key for _, point in plan.groups for key, _ in point))


def _swept_keys(plan: Plan) -> list[str]:
    return list(dict.fromkeys(key for cell in plan.cells for key, _ in cell.swept))


def _values(point: Point, keys: list[str]) -> tuple[str, ...]:
    values = dict(point)
    return tuple(shown(values[key]) if key in values else "" for key in keys)


def _short(key: str) -> str:
    return key.rpartition(".")[2]


def _mean(values: list[Any]) -> float:
    return float(sum(values) / len(values))
