"""How the mask manager reaches weights and optimizer state, which it must not know the layout of."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dsbert.sparse.flat_blocks import PruneScore, partial_scores
from dsbert.sparse.linear import BlockSparseLinear


class BlockEditor(Protocol):
    """Implemented by TrainEngine for DeepSpeed's shards, by TorchBlockEditor for a plain optimizer."""

    def block_scores(self, layer: BlockSparseLinear, score: PruneScore) -> Tensor:
        """int64 [K]: this rank's part of the scores of the fp32 master weights. The parts of all ranks, combined by
        `score.combine`, are the scores."""

    def zero_blocks(self, layer: BlockSparseLinear, slots: Tensor) -> None:
        """Zero the blocks `slots` in master weights, optimizer moments and every copy, locally."""

    def gradient_divisor(self) -> float:
        """What the sum over ranks of the dense gradients seen in backward must be divided by."""


def even_share(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """(offset, length) of this rank's part of `numel` replicated elements."""
    start, stop = numel * rank // world_size, numel * (rank + 1) // world_size
    return start, stop - start


class TorchBlockEditor:
    """For a plain torch optimizer, alone or under data parallelism with replicated weights.

    Each rank scores an even share, so that the decision is collective here as well.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, group: dist.ProcessGroup | None = None) -> None:
        self._optimizer = optimizer
        self._rank = dist.get_rank(group) if dist.is_initialized() else 0
        self._world_size = dist.get_world_size(group) if dist.is_initialized() else 1

    @torch.no_grad()
    def block_scores(self, layer: BlockSparseLinear, score: PruneScore) -> Tensor:
        flat = layer.blocks.detach().reshape(-1)
        offset, length = even_share(flat.numel(), self._rank, self._world_size)
        share = flat.narrow(0, offset, length).float()
        return partial_scores(share, offset, layer.num_active, layer.block_size**2, score)

    @torch.no_grad()
    def zero_blocks(self, layer: BlockSparseLinear, slots: Tensor) -> None:
        state = self._optimizer.state.get(layer.blocks, {})
        for tensor in (layer.blocks, layer.blocks.grad, *state.values()):
            if torch.is_tensor(tensor) and tensor.shape == layer.blocks.shape:
                tensor.index_fill_(0, slots.to(tensor.device), 0)

    def gradient_divisor(self) -> float:
        return float(self._world_size)
