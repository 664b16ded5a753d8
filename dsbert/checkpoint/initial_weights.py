"""A model that begins with weights of another one (`init_from` in a recipe) in place of random ones.

Weights alone: moments, counters and samples begin anew. Where a layer of the source has as many blocks to give, the
layer keeps its topology; else the weight is cut to blocks by magnitude, and what comes before the run's first step is
not always-sparse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from dsbert.base.errors import UserError
from dsbert.checkpoint.weight_source import SparseWeight, WeightSource
from dsbert.config.recipe import Recipe
from dsbert.data.tokenizer import load_tokenizer, vocabulary_of
from dsbert.sparse import BlockSparseLinear
from dsbert.sparse.low_rank import PARTS
from dsbert.sparse.magnitude import keep_largest_

_POSITIONS = "position_embeddings.weight"
_WORDS = ("word_embeddings.weight", "tok_embeddings.weight")
# What a model without the head that pre-trains it lacks.
_HEADS = ("cls.", "bert.pooler.", "head.", "decoder.")
_MOST_NAMES = 3


@dataclass
class Taken:
    """What became of the layers and parameters: names of those whose topology was kept, that were cut to blocks, that
    begin anew because the source has none; positions: how many embeddings of the source there were, where more were
    made."""

    kept: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    anew: list[str] = field(default_factory=list)
    positions: int | None = None

    def lines(self, source: WeightSource, recipe: Recipe) -> Iterator[str]:
        """For people."""
        yield f"begins with the weights of {source.label}"
        if self.kept:
            yield f"init_from: {len(self.kept)} sparse weights keep their topology"
        if self.cut:
            yield (
                f"init_from: {len(self.cut)} weights are cut to blocks by {recipe.sparsity.prune_score}: what comes "
                "before the first step is not always-sparse"
            )
        if self.positions is not None:
            yield (
                f"init_from: positions from {self.positions} to {recipe.model.max_positions - 1} begin as copies of "
                f"those from 0 to {self.positions - 1}"
            )
        if self.anew:
            more = f" and {len(self.anew) - _MOST_NAMES} more" if len(self.anew) > _MOST_NAMES else ""
            yield f"init_from: not in the source, begin anew: {', '.join(self.anew[:_MOST_NAMES])}{more}"


@torch.no_grad()
def begin_with_(
    model: nn.Module, layers: dict[str, BlockSparseLinear], source: WeightSource, recipe: Recipe, tokenizer: Path
) -> Taken:
    """Give a model that was just built the source's weights, in place; the same on every rank.

    tokenizer: the directory of the one that the data is encoded with. Raises UserError, one line, for a source of
    another shape or vocabulary.
    """
    _check_shape(source, recipe, tokenizer)
    taken = Taken()
    for name, layer in layers.items():
        _fill_layer_(name, layer, source, recipe, taken)
    for name, param in model.named_parameters():
        parent, _, kind = name.rpartition(".")
        if parent in layers and (kind == "blocks" or kind in PARTS):
            continue
        value = source.weight(parent) if kind == "weight" and source.find_sparse(parent) else source.find(name)
        if value is None:
            _note_missing(name, source, taken)
        else:
            param.copy_(_fitting(name, value, param, source, taken))
    _assert_all_used(model, layers, source)
    return taken


def _check_shape(source: WeightSource, recipe: Recipe, tokenizer: Path) -> None:
    heads = source.shape.get("num_attention_heads", recipe.model.num_heads)
    if heads != recipe.model.num_heads:
        raise UserError(
            f"expected model.num_heads={heads} as in init_from, {source.label}, found {recipe.model.num_heads}"
        )
    if (activation := source.shape.get("hidden_act", "gelu")) != "gelu":
        raise UserError(f"expected a model with gelu as init_from, found {activation} in {source.label}")
    if source.tokenizer is None:
        return
    theirs, ours = (vocabulary_of(load_tokenizer(place)) for place in (source.tokenizer, tokenizer))
    if theirs != ours:
        raise UserError(
            f"expected data that is encoded with the tokenizer of init_from, {source.label} ({len(theirs)} tokens), "
            f"found another vocabulary ({len(ours)} tokens): `dsbert prepare --tokenizer {source.tokenizer}`"
        )


def _fill_layer_(name: str, layer: BlockSparseLinear, source: WeightSource, recipe: Recipe, taken: Taken) -> None:
    given = source.find_sparse(name)
    if given is not None and _gives(given, layer):
        layer.set_topology(given.topology)
        layer.blocks.copy_(given.blocks)
        if given.low_rank is not None:
            layer.low_rank_u.copy_(given.low_rank[0])
            layer.low_rank_v.copy_(given.low_rank[1])
        taken.kept.append(name)
        return
    weight = source.weight(name)
    if weight is None:
        raise UserError(f"expected {name}.weight in init_from, {source.label}, found none: give a model of this shape")
    if tuple(weight.shape) != layer.shape:
        _complain_of_shape(f"{name}.weight", weight, list(layer.shape), source)
    if layer.low_rank:
        layer.low_rank_u.zero_()  # as in a run that begins anew: what blocks hold is the whole weight
    try:
        keep_largest_(layer, weight, recipe.sparsity.prune_score, recipe.sparsity.balance)
    except ValueError as error:
        raise UserError(f"init_from: {error}: override sparsity.balance") from None
    taken.cut.append(name)


def _gives(given: SparseWeight, layer: BlockSparseLinear) -> bool:
    """Whether the layer can hold the weight as it is."""
    topology = given.topology
    low_rank = given.low_rank[0].shape[1] if given.low_rank is not None else 0
    found = (topology.shape, topology.block_size, topology.num_active, low_rank)
    return found == (layer.shape, layer.block_size, layer.num_active, layer.low_rank)


def _fitting(name: str, value: Tensor, param: Tensor, source: WeightSource, taken: Taken) -> Tensor:
    """The value in the parameter's shape."""
    if value.shape == param.shape:
        return value
    if name.endswith(_WORDS):
        raise UserError(
            f"expected data with the {value.shape[0]} tokens of init_from, {source.label}, found {param.shape[0]}: "
            "prepare it with that tokenizer"
        )
    if name.endswith(_POSITIONS) and value.shape[1] == param.shape[1]:
        if len(value) < len(param):
            taken.positions = len(value)
        # Again and again, as Longformer does (Beltagy et al. 2020): what attention knows of near positions stays true.
        return value[torch.arange(len(param)) % len(value)]
    return _complain_of_shape(name, value, list(param.shape), source)


def _complain_of_shape(name: str, value: Tensor, wanted: list[int], source: WeightSource) -> Tensor:
    raise UserError(
        f"expected {name} of shape {wanted} in init_from, {source.label}, found {list(value.shape)}: give a model of "
        "this recipe's shape"
    )


def _note_missing(name: str, source: WeightSource, taken: Taken) -> None:
    if not name.startswith(_HEADS):
        raise UserError(f"expected {name} in init_from, {source.label}, found none: give a model of this shape")
    taken.anew.append(name)


def _assert_all_used(model: nn.Module, layers: dict[str, BlockSparseLinear], source: WeightSource) -> None:
    """A source with more layers than the model would be cut short in silence."""
    modules = dict(model.named_modules())
    weights = [*source.sparse, *(name.rpartition(".")[0] for name in source.dense if name.endswith(".weight"))]
    for name in weights:
        known = name in layers or name in modules or any(other.partition(".")[2] == name for other in modules)
        if not known and ".layer" in f".{name}":
            raise UserError(
                f"expected no {name} in init_from, {source.label}, as the recipe's model has none, found it: give "
                "model.num_layers as it has"
            )
