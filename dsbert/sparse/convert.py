"""Replace the linear layers of a model by block-sparse ones."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
from torch import nn

from dsbert.sparse.config import SparsityConfig
from dsbert.sparse.draw import DrawKey
from dsbert.sparse.linear import BlockSparseLinear
from dsbert.sparse.low_rank import num_low_rank_weights
from dsbert.sparse.sparsity_errors import SparsityError
from dsbert.sparse.topology import BlockTopology, block_density, grid, num_active_blocks


def sparsify_(model: nn.Module, config: SparsityConfig, *, seed: int = 0) -> dict[str, BlockSparseLinear]:
    """Replace, in place, every nn.Linear whose name fits `config.modules`; return the new layers by name.

    The pattern depends on (seed, layer name) alone, so that every rank draws the same. Each layer keeps the active
    blocks of the weight that it replaces; a low-rank term beside them begins at zero, from values that depend on
    (seed, layer name) alone as well. Build the model on the meta device to never hold a dense weight. Pattern
    "dense" keeps every block in a plain nn.Linear: nothing is replaced. Raises SparsityError if nothing fits, if the
    block size does not divide a weight, if whole blocks miss the density by more than a quarter, or if the low rank is
    more than a weight has rows or columns.
    """
    layers = {}
    for name, linear in linears_to_replace(model, config).items():
        key = DrawKey(seed, "init", 0, name)
        shape = (linear.out_features, linear.in_features)
        topology = BlockTopology.random(shape, config.block_size, config.density, key, config.balance)
        layers[name] = BlockSparseLinear.from_linear(linear, topology, kernels=config.kernels, low_rank=config.low_rank)
        word = DrawKey(seed, "low rank", 0, name).word()
        layers[name].reset_low_rank(generator=torch.Generator().manual_seed(word % 2**63))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[name])
    return layers


def linears_to_replace(model: nn.Module, config: SparsityConfig) -> dict[str, nn.Linear]:
    """What `sparsify_` would replace, by name; nothing is changed, and no topology drawn. Raises SparsityError as it
    does."""
    if config.pattern == "dense":
        return {}
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and _is_named(name, config)
    }
    if not found:
        raise SparsityError("expected linear layers that fit ", "modules", f" {list(config.modules)}, found none")
    for name, linear in found.items():
        shape = (linear.out_features, linear.in_features)
        _check_density(name, shape, config)
        _check_rank(name, shape, config)
    return found


def num_kept_weights(name: str, shape: tuple[int, int], config: SparsityConfig) -> int:
    """How many weights `sparsify_` leaves of a linear layer [out, in] of that name: those of its blocks and of the term
    beside them, or all where it stays dense."""
    if config.pattern == "dense" or not _is_named(name, config):
        return shape[0] * shape[1]
    blocks = num_active_blocks(shape, config.block_size, config.density, config.balance)
    return blocks * config.block_size**2 + num_low_rank_weights(shape, config.low_rank)


def _is_named(name: str, config: SparsityConfig) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in config.modules)


def _check_rank(name: str, shape: tuple[int, int], config: SparsityConfig) -> None:
    if config.low_rank > min(shape):
        raise SparsityError(
            "expected ",
            "low_rank",
            f" of at most {min(shape)} for {name}, {shape[0]} x {shape[1]}, found {config.low_rank}",
        )


def _check_density(name: str, shape: tuple[int, int], config: SparsityConfig) -> None:
    try:
        num_rows, num_cols = grid(shape, config.block_size)
    except ValueError as error:
        raise SparsityError("", "block_size", f" for {name}: {error}") from None
    kept = num_active_blocks(shape, config.block_size, config.density, config.balance)
    actual = block_density(shape, config.block_size, kept)
    if abs(actual / config.density - 1.0) > 0.25 + 1e-9 and not config.allow_density_error:
        raise SparsityError(
            f"expected density {config.density:.4g} in {name}, found {actual:.4g} as the nearest that "
            f"{num_rows} x {num_cols} blocks of {config.block_size} allow: use a smaller block or ",
            "allow_density_error",
            "=true",
        )
