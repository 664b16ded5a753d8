"""The blocks of a dense weight that are worth most: how a sparse layer is cut out of one."""

from __future__ import annotations

import torch
from torch import Tensor

from dsbert.sparse.draw import smallest
from dsbert.sparse.flat_blocks import PRUNE_SCORES
from dsbert.sparse.linear import BlockSparseLinear
from dsbert.sparse.topology import BlockTopology, grid


@torch.no_grad()
def keep_largest_(layer: BlockSparseLinear, weight: Tensor, prune_score: str = "l1", balance: str = "none") -> None:
    """Have the layer hold the K blocks of `weight` [out, in] with the largest scores; ties go to the lower position.

    prune_score: a name of `PRUNE_SCORES`, without ages. balance: "none" or "rows", where every block row keeps as many.
    Its low-rank term stays as it is. Raises ValueError for another shape or balance.
    """
    if tuple(weight.shape) != layer.shape:
        raise ValueError(f"expected a weight of shape {list(layer.shape)}, found {list(weight.shape)}")
    if balance not in ("none", "rows"):
        raise ValueError(f"expected balance none or rows where a dense weight is cut to blocks, found {balance}")
    (num_rows, num_cols), size = grid(layer.shape, layer.block_size), layer.block_size
    blocks = weight.detach().cpu().float().view(num_rows, size, num_cols, size).transpose(1, 2)
    score = PRUNE_SCORES[prune_score]
    terms = score.terms(blocks.flatten(2))
    scores = terms.sum(-1) if score.combine == "sum" else terms.amax(-1)
    if balance == "rows":
        kept = layer.num_active // num_rows
        cols = torch.stack([smallest(-row, kept) for row in scores])
        positions = (cols + torch.arange(num_rows)[:, None] * num_cols).flatten()
    else:
        positions = smallest(-scores.flatten(), layer.num_active)
    rows, cols = positions // num_cols, positions % num_cols
    layer.set_topology(BlockTopology(layer.shape, size, rows.int(), cols.int()))
    layer.blocks.copy_(blocks[rows, cols])
