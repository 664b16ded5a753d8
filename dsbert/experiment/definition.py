"""What an experiment's file declares.

name: block-size
base: demo                                    # a recipe, by its name or as a file beside this one
data: {source: sotu, vocab_size: 2048}        # prepared once, below DIR; or the base recipe's data.path
overrides: {optim.total_steps: 400}           # of every cell
seeds: [1, 2, 3]
grid: {sparsity.block_size: [4, 16]}          # every arm at every point; an arm may have a grid of its own
sweep: {values: {optim.lr: [1.0e-3, 2.0e-3]}} # per arm and point: trained with the first seed, the best with all
arms:
  static: {overrides: {sparsity.pattern: static}}
  dynamic: {overrides: {sparsity.pattern: dynamic}}
compare: [[dynamic, static]]                  # differences paired by seed
sizes:                                        # what differs in each; `--size`, by default the first
  cpu: {base: short-tiny}
  paper: {base: bert-medium, seeds: [1]}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from dsbert.base.errors import UserError
from dsbert.base.fields import Section, Text, Whole
from dsbert.config.complaints import Key, explain, in_one_line, shown
from dsbert.config.documents import read_mapping

Value = str | int | float | bool | list[str] | None
Settings = dict[str, Value]
Choices = dict[str, Annotated[list[Value], Field(min_length=1)]]
Seed = Annotated[Whole, Field(ge=0, lt=2**63)]
ArmName = Annotated[str, Field(pattern=r"^[\w.+ -]{1,60}$")]


class DataSource(Section):
    """What `dsbert prepare` is given, once for all experiments of a directory."""

    source: Text | list[Text]
    vocab_size: Whole = Field(gt=0)
    validation: float = Field(0.05, gt=0, lt=1)

    @property
    def sources(self) -> list[str]:
        return [self.source] if isinstance(self.source, str) else self.source


class Sweep(Section):
    """values: all combinations are tried, with `seeds` (default: the first of the experiment), in every arm and grid
    point. The one of the lowest mean held-out MLM loss at the last step is trained with all seeds."""

    values: Choices
    seeds: list[Seed] = Field(default_factory=list)


class Arm(Section):
    """overrides on top of the experiment's. grid, sweep: instead of the experiment's; {} is none."""

    overrides: Settings = Field(default_factory=dict)
    grid: Choices | None = None
    sweep: Choices | None = None


class Experiment(Section):
    """A whole file. title, note: for tables and pages."""

    name: Annotated[str, Field(pattern=r"^[\w-][\w.-]{0,60}$")]
    title: str = ""
    note: str = ""
    base: Text
    data: DataSource | None = None
    overrides: Settings = Field(default_factory=dict)
    seeds: Annotated[list[Seed], Field(min_length=1)]
    grid: Choices = Field(default_factory=dict)
    sweep: Sweep | None = None
    arms: Annotated[dict[ArmName, Arm], Field(min_length=1)]
    compare: list[tuple[str, str]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        found = [f"seed {seed} twice" for seed in sorted(set(self.seeds)) if self.seeds.count(seed) > 1]
        found += [
            f"expected arms to compare, found {arm!r}: there are {', '.join(self.arms)}"
            for pair in self.compare
            for arm in pair
            if arm not in self.arms
        ]
        if self.sweep and set(self.sweep.seeds) - set(self.seeds):
            found.append(f"expected the sweep's seeds among {self.seeds}, found {self.sweep.seeds}")
        if found:
            raise ValueError(in_one_line(found))
        return self

    def grid_of(self, arm: str) -> Choices:
        """The grid that the arm is trained on."""
        own = self.arms[arm].grid
        return self.grid if own is None else own

    def sweep_of(self, arm: str) -> Choices:
        """What is swept in the arm; {} if nothing is."""
        own = self.arms[arm].sweep
        return (self.sweep.values if self.sweep else {}) if own is None else own

    @property
    def sweep_seeds(self) -> list[int]:
        """With which each value of a sweep is tried."""
        return (self.sweep.seeds if self.sweep else []) or self.seeds[:1]


def load_experiment(path: Path, size: str | None = None) -> Experiment:
    """Read a file, in one of its sizes. Raises UserError, in one line, for all that does not fit."""
    try:
        values, lines = read_mapping(path, "an experiment")
    except FileNotFoundError:
        raise UserError(f"expected an experiment's YAML file at {path}, found none") from None

    values = _sized(values, size, path)

    def place(key: Key) -> str:
        return f" ({path.name}, line {lines[key]})" if key in lines else ""

    try:
        found = Experiment.model_validate({"name": path.stem, **_named(values)})
    except ValidationError as error:
        raise UserError(in_one_line(explain(error, Experiment, "experiment", {}, place))) from None
    beside = path.parent / found.base
    return found.model_copy(update={"base": str(beside)}) if beside.is_file() else found


def _sized(values: dict[str, Any], size: str | None, path: Path) -> dict[str, Any]:
    """With what the size says in place of, or among overrides and arms beside, what stands there for all sizes."""
    sizes = values.get("sizes")
    if sizes is None:
        if size:
            raise UserError(f"expected sizes in {path} with --size, found none")
        return values
    if not isinstance(sizes, dict) or not all(isinstance(one, dict) for one in sizes.values()) or not sizes:
        raise UserError(f"expected a mapping of keys for each of the sizes in {path}, found {shown(sizes)}")
    chosen = size or next(iter(sizes))
    if chosen not in sizes:
        raise UserError(f"expected --size {' or '.join(sizes)}, which {path} has, found {chosen}")
    own = {key: value for key, value in values.items() if key != "sizes"}
    return _merged(own | {"name": f"{values.get('name', path.stem)}-{chosen}"}, sizes[chosen])


def _merged(values: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    found = dict(values)
    for key, value in part.items():
        before = found.get(key)
        both = isinstance(before, dict) and isinstance(value, dict)
        found[key] = _merged(before or {}, value) if both and key not in ("grid", "sweep", "data") else value
    return found


def _named(values: dict[str, Any]) -> dict[str, Any]:
    """An arm without overrides may stand there as a name alone."""
    arms = values.get("arms")
    if not isinstance(arms, dict):
        return values
    return values | {"arms": {name: {} if arm is None else arm for name, arm in arms.items()}}
