"""How large a recipe's model is: every parameter and sparse layer, from shapes alone. Nothing is drawn or allocated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dsbert.config.recipe import Recipe
from dsbert.config.sparsity_keys import named_as_in_recipes
from dsbert.models.construction import encoder_linears
from dsbert.models.spec import ModelSpec, model_spec
from dsbert.sparse.convert import linears_to_replace, num_kept_weights
from dsbert.sparse.kernels.index import order_size
from dsbert.sparse.low_rank import PARTS
from dsbert.sparse.mask_manager import state_parts
from dsbert.sparse.topology import num_active_blocks


@dataclass(frozen=True)
class SparseLayer:
    """A weight [out, in] of K = num_active blocks of B x B."""

    shape: tuple[int, int]
    block_size: int
    num_active: int
    low_rank: int

    @property
    def positions(self) -> int:
        """R C: where a block may stand."""
        return self.shape[0] * self.shape[1] // self.block_size**2

    @property
    def index_bytes(self) -> int:
        """Of rows, cols and order, int32, as the kernels read them (sparse/kernels/index.py), and once more rows and
        cols, as the mask manager's record."""
        order = order_size(*self.shape, self.block_size, self.num_active)
        return 4 * (4 * self.num_active + order)

    def state_bytes(self, fresh_moments: str) -> int:
        """Of what a checkpoint holds of the topology (sparse/mask_manager.py): int32 [K] each, and a bit per
        position."""
        arrays = len(state_parts(fresh_moments)) - 1
        return 4 * arrays * self.num_active + -(-self.positions // 8)


@dataclass(frozen=True)
class ModelSize:
    """parameters: the shape of each, by name, in the model's order. layers: the sparse ones by name. linears: (out, in,
    kept weights) of every fully connected weight of the encoder. vocab_size: V."""

    recipe: Recipe
    parameters: dict[str, tuple[int, ...]]
    layers: dict[str, SparseLayer]
    linears: dict[str, tuple[int, int, int]]
    vocab_size: int
    spec: ModelSpec

    @classmethod
    def of(cls, recipe: Recipe, vocab_size: int) -> ModelSize:
        """Raises UserError for a pattern that the model's shapes do not allow."""
        spec, config = model_spec(recipe.model), recipe.sparsity
        with torch.device("meta"):
            model = spec.build(recipe.model, vocab_size, 0)
        with named_as_in_recipes():
            replaced = linears_to_replace(model, config)
        layers = {name: _sparse(linear, config) for name, linear in replaced.items()}
        linears = {}
        for name, module in encoder_linears(model, spec).items():
            assert isinstance(module, nn.Linear)
            shape = (module.out_features, module.in_features)
            linears[name] = (*shape, num_kept_weights(name, shape, config))
        return cls(recipe, dict(_parameters(model, layers)), layers, linears, vocab_size, spec)

    @property
    def numel(self) -> int:
        """N: elements of all parameters."""
        return sum(map(math.prod, self.parameters.values()))

    @property
    def num_blocks(self) -> int:
        """Active blocks of all layers."""
        return sum(layer.num_active for layer in self.layers.values())

    @property
    def kept(self) -> int:
        """Weights of the encoder that a token is multiplied with."""
        return sum(kept for _, _, kept in self.linears.values())

    def groups(self) -> tuple[list[int], list[int]]:
        """Elements of each parameter in the optimizer's two groups: with weight decay, which matrices have, and without
        (engine/ds_engine.py)."""
        shapes = self.parameters.values()
        return [math.prod(s) for s in shapes if len(s) > 1], [math.prod(s) for s in shapes if len(s) < 2]


def _sparse(linear: nn.Linear, config: Any) -> SparseLayer:
    shape = (linear.out_features, linear.in_features)
    count = num_active_blocks(shape, config.block_size, config.density, config.balance)
    return SparseLayer(shape, config.block_size, count, config.low_rank)


def _parameters(model: nn.Module, layers: dict[str, SparseLayer]) -> Any:
    """(name, shape) as `build_model` leaves them: tied ones once, blocks and low-rank terms in the place of weights."""
    for name, parameter in model.named_parameters():
        layer = layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if layer is None:
            yield name, tuple(parameter.shape)
            continue
        prefix = name.removesuffix("weight")
        yield f"{prefix}blocks", (layer.num_active, layer.block_size, layer.block_size)
        if layer.low_rank:
            yield f"{prefix}{PARTS[0]}", (layer.shape[0], layer.low_rank)
            yield f"{prefix}{PARTS[1]}", (layer.low_rank, layer.shape[1])
