"""Where the blocks of a run stood before its first update: what a replay of masks.jsonl begins with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dsbert.base.durable import open_regular
from dsbert.checkpoint.state import LayerRecord
from dsbert.config.recipe import Recipe
from dsbert.sparse import BlockTopology, DrawKey
from dsbert.training.run_directory import INITIAL_TOPOLOGY


def first_topologies(run: Path, recipe: Recipe, layers: Mapping[str, LayerRecord]) -> dict[str, BlockTopology]:
    """Of every sparse weight: as the seed draws it, or, of a run with init_from, as it was written down.

    Raises ValueError where that is not there, or is something else.
    """
    sparse = {name: layer for name, layer in layers.items() if layer.block_size is not None}
    return _drawn(recipe, sparse) if recipe.init_from is None else _kept(run / INITIAL_TOPOLOGY, sparse)


def _drawn(recipe: Recipe, layers: Mapping[str, LayerRecord]) -> dict[str, BlockTopology]:
    found = {}
    for name, layer in layers.items():
        key, density = DrawKey(recipe.seed, "init", 0, name), recipe.sparsity.density
        found[name] = BlockTopology.random(layer.out_in, layer.block_size or 1, density, key, recipe.sparsity.balance)
    return found


def _kept(path: Path, layers: Mapping[str, LayerRecord]) -> dict[str, BlockTopology]:
    from safetensors.torch import load_file

    try:
        open_regular(path).close()
        tensors = load_file(path)
        return {
            name: BlockTopology(layer.out_in, layer.block_size or 1, tensors[f"{name}.rows"], tensors[f"{name}.cols"])
            for name, layer in layers.items()
        }
    except Exception as error:  # safetensors raises its own type
        raise ValueError(f"expected {path}, found: {' '.join(str(error).split())}") from None
