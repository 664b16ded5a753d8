"""The mask manager's hands on DeepSpeed's shards, at every ZeRO stage (sparse/block_editor.py).

K blocks of B x B; slots and counts as there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dsbert.cluster.process_group import World
from dsbert.engine.zero_shards import adam_step, inner_optimizer, loss_scale, param_shard, zero_blocks
from dsbert.sparse import BlockSparseLinear
from dsbert.sparse.flat_blocks import PruneScore, partial_scores
from dsbert.sparse.fresh_moments import NUM_WORDS, correct_bias_, exact_sum


class ShardEditor:
    """A BlockEditor. engine: DeepSpeed's, over AdamW."""

    def __init__(self, engine: Any, world: World) -> None:
        self._engine, self.world = engine, world
        self._counting: RemovableHandle | None = None

    @torch.no_grad()
    def block_scores(self, layer: BlockSparseLinear, score: PruneScore) -> Tensor:
        shard = param_shard(self._engine, layer.blocks).owned(self.world.rank, self.world.world_size)
        return partial_scores(shard.master, shard.offset, layer.num_active, layer.block_size**2, score)

    def zero_blocks(self, layer: BlockSparseLinear, slots: Tensor, second_moment: float = 0.0) -> None:
        zero_blocks(self._engine, layer.blocks, slots, second_moment)

    def gradient_divisor(self) -> float:
        return self.world.world_size * loss_scale(self._engine)

    @torch.no_grad()
    def second_moment_sum(self, layer: BlockSparseLinear, kept: Tensor) -> Tensor:
        shard = param_shard(self._engine, layer.blocks).owned(self.world.rank, self.world.world_size)
        if not shard.moments:
            return torch.zeros(NUM_WORDS, dtype=torch.int64, device=shard.master.device)
        return exact_sum(shard.moments["exp_avg_sq"], shard.offset, layer.block_size**2, kept)

    def step_counts(self, layers: dict[str, BlockSparseLinear]) -> dict[str, int]:
        return dict.fromkeys(layers, adam_step(self._engine))

    def count_own_steps(self, layers: dict[str, BlockSparseLinear], births: dict[str, Tensor]) -> None:
        """Masters are corrected between the step of the inner optimizer and DeepSpeed's copies of what it has made, so
        that every copy is of the corrected ones. DeepSpeed may step a group of parameters at a time."""

        def correct(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            groups = [(param, group) for group in optimizer.param_groups for param in group["params"]]
            moved = {id(param): group for param, group in groups if param.grad is not None}  # else it was held still
            for name, layer in layers.items() if moved else ():
                shard = param_shard(self._engine, layer.blocks)
                if shard.numel and shard.owner is not None and id(shard.owner) in moved:
                    correct_bias_(
                        shard.master, (shard.moments["exp_avg"], shard.moments["exp_avg_sq"]), shard.offset,
                        layer.block_size**2, births=births[name], step=int(optimizer.state[shard.owner]["step"]),
                        group=moved[id(shard.owner)],
                    )  # fmt: skip

        if self._counting is not None:
            self._counting.remove()
        self._counting = inner_optimizer(self._engine).register_step_post_hook(correct)
