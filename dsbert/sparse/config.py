"""How a model is sparse: a recipe's section `sparsity`, and what a program hands to `sparsify_` and `MaskManager`."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)
from pydantic_core import PydanticKnownError

from dsbert.base.fields import Flag, Number, Section, Whole, whole

BUILT_IN_SCORES, BUILT_IN_RULES = ("l1", "l2", "linf", "l1_by_age"), ("random", "gradient", "mixed")


def _one_of(module: str, table: str, built_in: tuple[str, ...]) -> BeforeValidator:
    """In front of a name that must stand in the table when it is read: as a Literal of the names then.

    The tables hold functions of tensors, and a recipe is read where torch is not loaded: then nobody has added to them.
    """

    def check(name: object) -> object:
        loaded = sys.modules.get(f"dsbert.sparse.{module}")
        names = tuple(getattr(loaded, table)) if loaded else built_in
        if isinstance(name, str) and name in names:
            return name
        *others, last = map(repr, names)
        raise PydanticKnownError("literal_error", {"expected": " or ".join(filter(None, [", ".join(others), last]))})

    return BeforeValidator(check)


BlockSize = Annotated[Literal[1, 4, 8, 16, 32, 64, 128], BeforeValidator(whole)]


class SparsityConfig(Section):
    """Which weights are sparse, how, and how the pattern moves (paper, algorithm 1).

    sparsity = 1 - density. modules: patterns (fnmatch) over the names of the nn.Linear modules to replace.
    group_lasso: lambda of the decoupled Group Lasso, 0 = off. balance: "rows" keeps as many blocks in every block row,
    for speed, "even" the paper's number with rows and columns about equal; the paper leaves that to chance.
    allow_density_error: accept a weight so small that whole blocks miss the density by more than a quarter. kernels:
    what computes the products, see sparse/kernels/dispatch.py.
    prune_score, regrow: names of `PRUNE_SCORES` and `REGROW_RULES`, to which a program may add its own. "l1_by_age":
    the L1 norm over the square root of a block's age in updates (8 at most), so that the young are compared fairly.

    Not the paper's, and off by default: update_every_steps in place of num_updates; update_from, update_until: the part
    of the run in which updates fall; min_age_updates: a block that an update has allocated is not pruned before so many
    intervals have passed; initial_scale: "inverse_sqrt" multiplies the initial values of sparse weights by
    1 / sqrt(density), by which outputs begin as large as a dense layer's; fresh_moments: what Adam knows of a regrown
    block: nothing ("zero", the paper), the "mean" second moment of the blocks of its weight that stay, or nothing but
    its own step "count", by which the bias of its moments is corrected (sparse/fresh_moments.py); low_rank: the rank r
    of a term U V beside the blocks of every sparse weight (sparse/low_rank.py), 0 = none. It comes on top of the
    density, which is that of the blocks; a dense weight (pattern "dense") has none.
    """

    added_later = (
        "update_every_steps", "update_from", "update_until", "min_age_updates", "initial_scale", "fresh_moments",
        "low_rank",
    )  # fmt: skip

    pattern: Literal["dense", "static", "dynamic"] = "dynamic"
    sparsity: Number = Field(0.9, ge=0, lt=1)
    block_size: BlockSize = 16
    modules: tuple[str, ...] = ("*encoder.layer.*",)
    num_updates: Whole = Field(80, gt=0)
    max_prune_ratio: Number = Field(0.5, gt=0, le=1)
    schedule: Literal["cosine", "constant"] = "cosine"
    prune_score: Annotated[str, _one_of("flat_blocks", "PRUNE_SCORES", BUILT_IN_SCORES)] = "l1"
    regrow: Annotated[str, _one_of("regrow", "REGROW_RULES", BUILT_IN_RULES)] = "random"
    group_lasso: Number = Field(0.0, ge=0)
    balance: Literal["none", "rows", "even"] = "none"
    allow_density_error: Flag = False
    update_every_steps: Whole | None = Field(None, gt=0)
    update_from: Number = Field(0.0, ge=0, lt=1)
    update_until: Number = Field(1.0, gt=0, le=1)
    min_age_updates: Whole = Field(0, ge=0)
    initial_scale: Literal["none", "inverse_sqrt"] = "none"
    fresh_moments: Literal["zero", "mean", "count"] = "zero"
    low_rank: Whole = Field(0, ge=0)
    kernels: Literal["auto", "reference", "cpu", "triton", "dense"] = "auto"

    @model_validator(mode="after")
    def _window(self) -> SparsityConfig:
        if self.update_from >= self.update_until:
            raise ValueError(
                f"expected sparsity.update_from below update_until {self.update_until:g}, found {self.update_from:g}"
            )
        if self.balance == "even" and self.regrow != "random":
            raise ValueError(f"expected sparsity.regrow random beside balance even, found {self.regrow}")
        return self

    @property
    def density(self) -> float:
        """Fraction of the blocks kept; 1 for pattern dense."""
        return density_of(self.pattern, self.sparsity)


def density_of(pattern: str, sparsity: float) -> float:
    """Fraction of the blocks that a configuration of this pattern and sparsity keeps."""
    return 1.0 if pattern == "dense" else round(1.0 - sparsity, 12)  # 0.1, not 0.0999...
