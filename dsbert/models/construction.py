"""A recipe's model, made without its dense weights: built on the meta device, made sparse there, then given memory."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from dsbert.base.errors import UserError
from dsbert.config.recipe import Recipe
from dsbert.config.sparsity_keys import named_as_in_recipes
from dsbert.models.activation_checkpointing import checkpoint_activations_
from dsbert.models.spec import ModelSpec, model_spec
from dsbert.sparse import BlockSparseLinear, sparsify_
from dsbert.sparse.convert import num_kept_weights
from dsbert.sparse.flops import sequence_flops
from dsbert.sparse.low_rank import PARTS


def build_model(
    recipe: Recipe, vocab_size: int, device: torch.device | str = "cpu", pad_token_id: int = 0
) -> tuple[nn.Module, dict[str, BlockSparseLinear]]:
    """The initialised model and its sparse layers by name: the same on every rank, a function of the seed alone.

    Built on the meta device, so that no dense encoder weight ever exists. Raises UserError for a pattern that the
    model's shapes do not allow.
    """
    spec = model_spec(recipe.model)
    with torch.device("meta"):
        model = spec.build(recipe.model, vocab_size, pad_token_id)
    with named_as_in_recipes():
        layers = sparsify_(model, recipe.sparsity, seed=recipe.seed)
    outside = [name for name in layers if not fnmatchcase(name, spec.architecture.encoder)]
    if outside:
        raise UserError(f"expected sparsity.modules to match linear layers of the encoder only, found {outside[0]}")
    spec.fuse_activations(model)
    if recipe.model.activation_checkpointing:
        checkpoint_activations_(model)
    _materialize_(model, spec, recipe, torch.device(device))
    return model, layers


def encoder_linears(model: nn.Module, spec: ModelSpec) -> dict[str, nn.Module]:
    """The fully connected weights of the encoder, dense or sparse, by name: what the paper's FLOPs count."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | BlockSparseLinear) and fnmatchcase(name, spec.architecture.encoder)
    }


def recipe_flops(recipe: Recipe) -> int:
    """FLOPs (sparse/flops.py) of a sequence of seq_len tokens in training by a recipe, from shapes alone: no topology
    is drawn."""
    spec, seq_len = model_spec(recipe.model), recipe.data.seq_len
    with torch.device("meta"):
        model = spec.build(recipe.model, 1, 0)
    shapes = {name: entry["shape"] for name, entry in layer_shapes(model, spec).items()}
    kept = (num_kept_weights(name, (shape[0], shape[1]), recipe.sparsity) for name, shape in shapes.items())
    return sequence_flops(seq_len, recipe.model.hidden_size, spec.attention_pairs(recipe.model, [seq_len]), kept)


def layer_shapes(model: nn.Module, spec: ModelSpec) -> dict[str, dict[str, Any]]:
    """Shape [out, in], block size (None where dense) and kept weights of every fully connected encoder weight, those of
    a low-rank term among them."""
    shapes: dict[str, dict[str, Any]] = {}
    for name, module in encoder_linears(model, spec).items():
        if isinstance(module, BlockSparseLinear):
            shapes[name] = {"shape": list(module.shape), "block_size": module.block_size, "kept": module.num_weights}
        else:
            assert isinstance(module, torch.nn.Linear)
            shape = [module.out_features, module.in_features]
            shapes[name] = {"shape": shape, "block_size": None, "kept": shape[0] * shape[1]}
    return shapes


def _materialize_(model: nn.Module, spec: ModelSpec, recipe: Recipe, device: torch.device) -> None:
    """Give every meta parameter and buffer memory and its initial value, keeping ties.

    Matrices: normal truncated at two std (paper: 0.02; Glorot and variance-preserving scaling were not better), each
    from a generator of its own, keyed by (seed, name). LayerNorm 1, biases 0. The embedding of [PAD] 0. A low-rank term
    as `reset_low_rank_` says.
    """
    made: dict[Tensor, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, meta in list(module.named_parameters(recurse=False)):
            if meta not in made:
                full = f"{prefix}.{name}"
                std = _std(full, module, spec, recipe)
                value = _initial(full, module, meta, std, recipe.seed)
                made[meta] = nn.Parameter(value.to(device))
            module.register_parameter(name, made[meta])
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.device.type != "meta":
                module._buffers[name] = buffer.to(device)
    spec.fill_buffers(model, device)


def _std(name: str, module: nn.Module, spec: ModelSpec, recipe: Recipe) -> float:
    if name.endswith(PARTS):  # no part of what blocks make up for, and what is read is not what is written
        return recipe.model.initializer_std
    std = spec.initial_std(name, recipe.model)
    if isinstance(module, BlockSparseLinear) and recipe.sparsity.initial_scale == "inverse_sqrt":
        std /= math.sqrt(recipe.sparsity.density)
    return std


def _initial(name: str, module: nn.Module, meta: Tensor, std: float, seed: int) -> Tensor:
    value = torch.empty(meta.shape, dtype=meta.dtype)
    if isinstance(module, nn.LayerNorm):
        value.fill_(1.0 if name.endswith("weight") else 0.0)
    elif meta.dim() == 1 or name.endswith(PARTS[0]):
        value.zero_()
    else:
        word = xxhash.xxh3_64_intdigest(f"{seed}\0init\0{name}".encode())
        generator = torch.Generator().manual_seed(word % 2**63)
        nn.init.trunc_normal_(value, std=std, a=-2 * std, b=2 * std, generator=generator)
    return value
