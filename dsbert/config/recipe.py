"""The recipe: frozen models in which every number has one owner.

Precedence, lowest first: defaults here < the YAML recipe < `a.b=value` on the command line. The recipe owns model,
sparsity, data, batch, steps, optimizer and learning rate; the DeepSpeed JSON owns ZeRO stage, precision, clipping and
buckets (see ds_config.py).
"""

from __future__ import annotations

import json
import math
from typing import Any

from pydantic import (
    Field,
    ValidationError,
    model_validator,
)

from dsbert.base.errors import UserError
from dsbert.base.fields import PathName, Section, Text, Whole
from dsbert.config.architectures import ARCHITECTURES
from dsbert.config.complaints import RECIPE_SYNONYMS, Key, explain, in_one_line
from dsbert.config.documents import DocumentError
from dsbert.config.overrides import keep_shares, override_value, total_steps
from dsbert.config.recipe_files import read_recipe
from dsbert.config.sections import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    EvalConfig,
    HealthConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
)
from dsbert.sparse.config import SparsityConfig
from dsbert.sparse.schedule import UpdateSchedule


class Recipe(Section):
    """A whole experiment. name: of its run directory, where none is given. init_from: a run, a checkpoint, an export or
    a transformers directory whose weights it begins with, in place of random ones."""

    added_later = ("init_from", "health")

    name: Text
    seed: Whole = Field(1, ge=0, lt=2**63)
    init_from: PathName | None = None
    model: ModelConfig
    sparsity: SparsityConfig = SparsityConfig()
    data: DataConfig
    batch: BatchConfig
    optim: OptimConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    log: LogConfig = LogConfig()
    health: HealthConfig = HealthConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    @model_validator(mode="before")
    @classmethod
    def _default_modules(cls, values: Any) -> Any:
        """Unless sparsity.modules is given, the linear layers of the architecture's encoder are sparse."""
        match values:
            case {"model": {"architecture": str(name)}} if name in ARCHITECTURES:
                sparsity = values.get("sparsity", {})
                if isinstance(sparsity, dict) and "modules" not in sparsity:
                    return values | {"sparsity": sparsity | {"modules": [ARCHITECTURES[name].encoder]}}
        return values

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        found = []
        if not self.name.isprintable() or "/" in self.name or self.name in (".", ".."):
            found.append(f"expected a name that a directory can have, found {self.name!r}")
        by_number = self.sparsity.update_every_steps is None
        if self.sparsity.pattern == "dynamic" and by_number and self.sparsity.num_updates > self.optim.total_steps:
            found.append(
                f"expected sparsity.num_updates of at most total_steps {self.optim.total_steps}, "
                f"found {self.sparsity.num_updates}"
            )
        elif self.sparsity.pattern == "dynamic":
            try:
                UpdateSchedule.of(self.sparsity, self.optim.total_steps)
            except ValueError as error:
                found.append(f"sparsity: {error} in that part of the run")
        if self.data.seq_len > self.model.max_positions:
            found.append(
                f"expected data.seq_len of at most model.max_positions {self.model.max_positions}, "
                f"found {self.data.seq_len}"
            )
        if self.data.nsp and "nsp" not in ARCHITECTURES[self.model.architecture].objectives:
            found.append(
                f"expected data.nsp=false with model.architecture={self.model.architecture}, which has no head for "
                "pairs of sentences, found true"
            )
        if found:
            raise ValueError(in_one_line(found))
        return self

    @property
    def peak_lr(self) -> float:
        """Peak learning rate: `lr`, or `dense_lr` by `lr_rule`."""
        if self.optim.lr is not None:
            return self.optim.lr
        assert self.optim.dense_lr is not None
        density = self.sparsity.density
        factors = {
            "eq3": sparse_lr_factor(1.0 - density),
            "inverse": 1 / density,
            "inverse_sqrt": 1 / math.sqrt(density),
        }
        return self.optim.dense_lr * factors[self.optim.lr_rule]

    def as_document(self) -> str:
        """The text of a recipe's file. As JSON, which is YAML: a dumper of YAML 1.1 leaves words unquoted that are
        numbers in YAML 1.2."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False)

    def identity(self) -> dict[str, Any]:
        """What must not change when a run is resumed; world size, micro-batch, logging, kernels, patience
        and what moves no bit may."""
        everything = self.model_dump(mode="json")
        kept = {key: everything[key] for key in ("model", "sparsity", "data", "seed", "optim")}
        del kept["sparsity"]["kernels"], kept["optim"]["max_skipped_steps"]
        del kept["data"]["path"], kept["data"]["stage_to"]
        kept["model"].pop("activation_checkpointing", None)  # the same bits
        if self.sparsity.balance == "none":
            del kept["sparsity"]["balance"]  # runs that began before there was a choice
        return kept | {"global_batch": self.batch.global_batch}


def sparse_lr_factor(sparsity: float) -> float:
    """lr(s) / lr(0) (paper, eq. 3)."""
    return math.exp(1.969 * sparsity**2 + 0.2905 * sparsity)


def load_recipe(recipe: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe (a name in dsbert/recipes or a YAML path) and apply `a.b=value` overrides.

    Where optim.total_steps is overridden, the recipe's own warm-up keeps its share of it, and mask updates become no
    more than there are steps, unless they are overridden as well.

    Raises UserError, one line, for an unknown recipe, and for all unknown keys (with the nearest name) and values that
    do not fit.
    """
    path, values, lines = read_recipe(recipe)
    before = total_steps(values)
    complaints: list[str] = []
    given: set[Key] = set()
    for override in overrides:
        try:
            given.add(override_value(values, override))
        except DocumentError as error:
            complaints.append(error.found)
    keep_shares(values, before, given, SparsityConfig().num_updates)

    def place(key: Key) -> str:
        overridden = any(key[: len(one)] == one for one in given)
        return f" ({path.name}, line {lines[key]})" if key in lines and not overridden else ""

    try:
        found = Recipe.model_validate({"name": path.stem} | values)
    except ValidationError as error:
        complaints += explain(error, Recipe, "recipe", RECIPE_SYNONYMS, place)
    if complaints:
        raise UserError(in_one_line(complaints))
    return found


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """Validate; UserError names all that does not fit."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(in_one_line(explain(error, Recipe, "recipe", RECIPE_SYNONYMS))) from None
