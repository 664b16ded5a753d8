"""Replace the linear layers of a model by block-sparse ones."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from dsbert.sparse.config import SparsityConfig
from dsbert.sparse.draw import DrawKey
from dsbert.sparse.linear import BlockSparseLinear
from dsbert.sparse.sparsity_errors import SparsityError
from dsbert.sparse.topology import BlockTopology, block_density, grid, num_active_blocks


def sparsify_(model: nn.Module, config: SparsityConfig, *, seed: int = 0) -> dict[str, BlockSparseLinear]:
    """Replace, in place, every nn.Linear whose name fits `config.modules`; return the new layers by name.

    The pattern depends on (seed, layer name) alone, so that every rank draws the same. Each layer keeps the active
    blocks of the weight that it replaces. Build the model on the meta device to never hold a dense weight. Pattern
    "dense" keeps every block in a plain nn.Linear: nothing is replaced. Raises SparsityError if nothing fits, if the
    block size does not divide a weight, or if whole blocks miss the density by more than a quarter.
    """
    if config.pattern == "dense":
        return {}
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(fnmatchcase(name, pattern) for pattern in config.modules)
    }
    if not found:
        raise SparsityError("expected linear layers that fit ", "modules", f" {list(config.modules)}, found none")
    for name, linear in found.items():
        _check_density(name, (linear.out_features, linear.in_features), config)
    layers = {}
    for name, linear in found.items():
        key = DrawKey(seed, "init", 0, name)
        shape = (linear.out_features, linear.in_features)
        topology = BlockTopology.random(shape, config.block_size, config.density, key, config.balance)
        layers[name] = BlockSparseLinear.from_linear(linear, topology, kernels=config.kernels)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[name])
    return layers


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
