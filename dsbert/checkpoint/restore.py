"""A model out of a checkpoint, without DeepSpeed: for evaluation and export, in one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from dsbert.checkpoint.loading import fragment_reader, read_topology, resolve_checkpoint
from dsbert.checkpoint.state import CheckpointState, read_state
from dsbert.config.recipe import Recipe, recipe_from_dict
from dsbert.data.manifest import TOKENIZER
from dsbert.data.tokenizer import load_tokenizer
from dsbert.models.construction import build_model
from dsbert.sparse import BlockSparseLinear, BlockTopology

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, eq=False)
class Restored:
    """path: the checkpoint's directory; model: its fp32 master weights; layers: the sparse ones by name."""

    path: Path
    state: CheckpointState
    recipe: Recipe
    model: nn.Module
    layers: dict[str, BlockSparseLinear]


def restore_tokenizer(path: Path) -> Tokenizer:
    """That of a checkpoint, or of the newest valid one of a run. Raises UserError or CheckpointError."""
    return load_tokenizer(resolve_checkpoint(path) / TOKENIZER)


@torch.no_grad()
def restore_model(path: Path, device: torch.device | str = "cpu") -> Restored:
    """Load a checkpoint, or the newest valid one of a run. Raises UserError or CheckpointError."""
    path = resolve_checkpoint(path)
    state = read_state(path)
    recipe = recipe_from_dict(state.recipe.whole)
    model, layers = build_model(recipe, state.vocab_size)
    topology = read_topology(path)
    for name, layer in layers.items():
        rows, cols = topology[f"{name}.rows"], topology[f"{name}.cols"]
        layer.set_topology(BlockTopology(layer.shape, layer.block_size, rows, cols))
    reader = fragment_reader(path)
    for name, param in model.named_parameters():
        param.copy_(torch.from_numpy(reader.read(name, "master", 0, param.numel())).view(param.shape))
    return Restored(path, state, recipe, model.to(device), layers)
