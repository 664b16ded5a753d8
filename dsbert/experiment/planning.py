"""Which cells an experiment wants, which are there, and which come next.

Of each arm and grid point, every value of the sweep is tried with the sweep's seeds. Once all of these are there, the
value of the lowest mean held-out loss is the arm's, and is trained with all seeds. A cell that failed twice counts as
one that no loss was low enough for.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dsbert.experiment.cell_results import CellResult, load_records, read_result
from dsbert.experiment.cells import Cell, Point, all_cells
from dsbert.experiment.definition import Experiment
from dsbert.training.provenance import NUMERICS

Group = tuple[str, Point]


def run_directory(directory: Path, cell: Cell) -> Path:
    """Where the cell is trained."""
    return directory / "cells" / cell.name


@dataclass(frozen=True)
class Plan:
    """cells: all that could be wanted; results: of those that are done; given_up: names of those that failed twice."""

    experiment: Experiment
    cells: tuple[Cell, ...]
    results: Mapping[str, CellResult]
    given_up: frozenset[str] = frozenset()

    @cached_property
    def groups(self) -> dict[Group, list[Cell]]:
        """Cells by arm and grid point, in the order of the file."""
        found: dict[Group, list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(cell.group, []).append(cell)
        return found

    @cached_property
    def best(self) -> dict[Group, Point | None]:
        """The swept values that each arm and grid point is judged by; None while the sweep is not over."""
        return {group: self._best(cells) for group, cells in self.groups.items()}

    def _best(self, cells: list[Cell]) -> Point | None:
        by_value: dict[Point, list[float]] = {}
        values = list(dict.fromkeys(cell.swept for cell in cells))
        if len(values) == 1:
            return values[0]
        for cell in cells:
            if cell.seed in self.experiment.sweep_seeds:
                if not self._is_over(cell):
                    return None
                result = self.results.get(cell.name)
                loss = result.loss if result and math.isfinite(result.loss) else math.inf
                by_value.setdefault(cell.swept, []).append(loss)
        return min(by_value, key=lambda value: statistics.fmean(by_value[value]))

    def _is_over(self, cell: Cell) -> bool:
        return cell.name in self.results or cell.name in self.given_up

    @cached_property
    def wanted(self) -> list[Cell]:
        """All that is wanted as far as it is known: sweeps first, and of each name once."""
        sweeps, chosen = [], []
        for group, cells in self.groups.items():
            best = self.best[group]
            if len({cell.swept for cell in cells}) > 1:
                sweeps += [cell for cell in cells if cell.seed in self.experiment.sweep_seeds]
            chosen += [cell for cell in cells if cell.swept == best]
        # One seed of everything before the second: arms can be compared early.
        chosen.sort(key=lambda cell: self.experiment.seeds.index(cell.seed))
        return list({cell.name: cell for cell in (*sweeps, *chosen)}.values())

    @cached_property
    def missing(self) -> list[Cell]:
        """Those wanted that are neither done nor given up."""
        return [cell for cell in self.wanted if not self._is_over(cell)]

    @cached_property
    def unknown(self) -> int:
        """How many more will be wanted once sweeps are over, which one is not known yet."""
        repeated = len(self.experiment.seeds) - len(self.experiment.sweep_seeds)
        return sum(repeated for best in self.best.values() if best is None)

    def chosen(self, group: Group) -> list[Cell]:
        """The cells, one per seed, that an arm at a grid point is judged by; [] while its sweep is not over."""
        best = self.best[group]
        return [] if best is None else [cell for cell in self.groups[group] if cell.swept == best]

    @property
    def is_complete(self) -> bool:
        return not self.missing and not self.unknown


def make_plan(experiment: Experiment, directory: Path, records: Path | None = None, numerics: int = NUMERICS) -> Plan:
    """What the directory holds, and `records` beside it; numerics: of that arithmetic, an older one for what is kept of
    it. Raises UserError."""
    results = load_records(records) if records else {}
    return refreshed(Plan(experiment, tuple(all_cells(experiment, directory, numerics)), results), directory)


def refreshed(plan: Plan, directory: Path, given_up: frozenset[str] = frozenset()) -> Plan:
    """With what has been trained meanwhile, by whomever. given_up: cells that are not to be tried again."""
    names = {cell.name for cell in plan.cells}
    results = {name: result for name, result in plan.results.items() if name in names}
    for cell in plan.cells:
        if cell.name not in results:
            found = read_result(run_directory(directory, cell), cell.name, cell.identity)
            if found:
                results[cell.name] = found
    return Plan(plan.experiment, plan.cells, results, given_up)
