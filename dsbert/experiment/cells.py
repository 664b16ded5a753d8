"""The runs of an experiment: a cell is one recipe with one run directory, named by the hash of what moves its result.

So an experiment that grows keeps what is there, two experiments share what they have in common, and a cell that was
trained by other arithmetic (`provenance.NUMERICS`) is another one.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from dsbert.config.recipe import Recipe, load_recipe
from dsbert.data.manifest import load_manifest
from dsbert.data.stream import SAMPLES
from dsbert.experiment.definition import Choices, Experiment, Value
from dsbert.training.preflight import frozen
from dsbert.training.provenance import NUMERICS

Point = tuple[tuple[str, Value], ...]


@dataclass(frozen=True)
class Cell:
    """point: of the grid; swept: the values of the sweep; both as (key, value). data: what text it is trained on.
    numerics: by which arithmetic."""

    arm: str
    point: Point
    swept: Point
    seed: int
    recipe: Recipe
    data: str
    numerics: int = NUMERICS

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that its result follows from, up to rounding: neither the number of ranks nor kernels."""
        return self.recipe.identity() | {
            "data": self.data,
            "samples": SAMPLES,
            "eval": self.recipe.eval.model_dump(mode="json"),
            "deepspeed": frozen(self.recipe).deepspeed.config,
            "numerics": self.numerics,
        }

    @cached_property
    def name(self) -> str:
        """Sixteen hexadecimal digits."""
        return xxhash.xxh3_64_hexdigest(json.dumps(self.identity, sort_keys=True).encode())

    @property
    def flops(self) -> int:
        """Of the whole training if its samples filled all positions of seq_len, as the paper counts them: the most that
        `flops_total` of the last step can be."""
        from dsbert.jobs.capacity.workload import most_flops

        return most_flops(self.recipe)

    @property
    def group(self) -> tuple[str, Point]:
        """What a sweep picks the best of: arm and grid point."""
        return self.arm, self.point

    @property
    def label(self) -> str:
        """For people: arm, grid point and swept values; the seed last."""
        return _label(self.arm, (*self.point, *self.swept), self.seed)


def _label(arm: str, values: Point, seed: int) -> str:
    return " ".join([arm, *words(values), f"seed={seed}"])


def words(point: Point) -> list[str]:
    """A grid point or swept values for people: the last part of each key, with its value."""
    return [f"{key.rpartition('.')[2]}={shown(value)}" for key, value in point]


def shown(value: Value) -> str:
    """A value of a grid or sweep, as short as it can be said."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def data_directory(experiment: Experiment, directory: Path) -> Path | None:
    """Where the experiment's own data is prepared; None where the base recipe names some."""
    if experiment.data is None:
        return None
    return directory / "data" / xxhash.xxh3_64_hexdigest(experiment.data.model_dump_json().encode())


def all_cells(experiment: Experiment, directory: Path, numerics: int = NUMERICS) -> list[Cell]:
    """Every cell that could be wanted: all arms, grid points, swept values and seeds; numerics: of that arithmetic.
    Raises UserError."""
    data = data_directory(experiment, directory)
    return [
        replace(_cell(experiment, arm, point, swept, seed, data), numerics=numerics)
        for arm in experiment.arms
        for point in _points(experiment.grid_of(arm))
        for swept in _points(experiment.sweep_of(arm))
        for seed in experiment.seeds
    ]


def _cell(experiment: Experiment, arm: str, point: Point, swept: Point, seed: int, data: Path | None) -> Cell:
    settings: dict[str, Value] = {"log.wandb": False, "log.wandb_group": experiment.name}
    settings["log.wandb_name"] = _label(arm, (*point, *swept), seed)  # its directory is called after a hash
    settings |= {**experiment.overrides, **experiment.arms[arm].overrides}
    settings |= dict(point) | dict(swept) | {"seed": seed, "name": experiment.name}
    if data:
        settings["data.path"] = str(data)
    recipe = load_recipe(experiment.base, overrides(settings))
    source = experiment.data.model_dump_json() if experiment.data else load_manifest(recipe.data.path).digest
    return Cell(arm, point, swept, seed, recipe, source)


def overrides(settings: Mapping[str, Value]) -> list[str]:
    """As on a command line; values as JSON, which is YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def _points(choices: Choices) -> Iterator[Point]:
    for values in itertools.product(*choices.values()):
        yield tuple(zip(choices, values, strict=True))
