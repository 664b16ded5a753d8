"""How the mask manager reaches weights and optimizer state, which it must not know the layout of."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dsbert.sparse.flat_blocks import PruneScore, partial_scores
from dsbert.sparse.fresh_moments import NUM_WORDS, correct_bias_, exact_sum
from dsbert.sparse.linear import BlockSparseLinear


class BlockEditor(Protocol):
    """Implemented by TrainEngine for DeepSpeed's shards, by TorchBlockEditor for a plain optimizer."""

    def block_scores(self, layer: BlockSparseLinear, score: PruneScore) -> Tensor:
        """int64 [K]: this rank's part of the scores of the fp32 master weights. The parts of all ranks, combined by
        `score.combine`, are the scores."""

    def zero_blocks(self, layer: BlockSparseLinear, slots: Tensor, second_moment: float = 0.0) -> None:
        """Zero the blocks `slots` in master weights, optimizer moments and every copy, locally. second_moment: what
        Adam's second one becomes."""

    def gradient_divisor(self) -> float:
        """What the sum over ranks of the dense gradients seen in backward must be divided by."""

    def second_moment_sum(self, layer: BlockSparseLinear, kept: Tensor) -> Tensor:
        """int64 [3]: this rank's part of the `exact_sum` of Adam's second moments over the blocks `kept` (bool [K]);
        zeros before Adam's first step. Raises ValueError for another optimizer."""

    def step_counts(self, layers: dict[str, BlockSparseLinear]) -> dict[str, int]:
        """Adam's step count of each layer's blocks, the same on all ranks."""

    def count_own_steps(self, layers: dict[str, BlockSparseLinear], births: dict[str, Tensor]) -> None:
        """From now on correct, in every step of the optimizer, the bias of each block's moments by its own count.

        births: by layer int32 [K], on the CPU, the step count when each block was regrown; read anew at every step.
        Of several calls the last one counts. Raises ValueError for another optimizer than Adam.
        """


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
        self._counting: RemovableHandle | None = None
        self._rank = dist.get_rank(group) if dist.is_initialized() else 0
        self._world_size = dist.get_world_size(group) if dist.is_initialized() else 1

    @torch.no_grad()
    def block_scores(self, layer: BlockSparseLinear, score: PruneScore) -> Tensor:
        flat = layer.blocks.detach().reshape(-1)
        offset, length = even_share(flat.numel(), self._rank, self._world_size)
        share = flat.narrow(0, offset, length).float()
        return partial_scores(share, offset, layer.num_active, layer.block_size**2, score)

    @torch.no_grad()
    def zero_blocks(self, layer: BlockSparseLinear, slots: Tensor, second_moment: float = 0.0) -> None:
        state = self._optimizer.state.get(layer.blocks, {})
        tensors = {"weights": layer.blocks, "gradient": layer.blocks.grad, **state}
        for name, tensor in tensors.items():
            if torch.is_tensor(tensor) and tensor.shape == layer.blocks.shape:
                tensor.index_fill_(0, slots.to(tensor.device), second_moment if name == "exp_avg_sq" else 0)

    def gradient_divisor(self) -> float:
        return float(self._world_size)

    def second_moment_sum(self, layer: BlockSparseLinear, kept: Tensor) -> Tensor:
        state = self._optimizer.state.get(layer.blocks, {})
        if not state:
            return torch.zeros(NUM_WORDS, dtype=torch.int64, device=layer.blocks.device)
        self._assert_adam()
        offset, length = even_share(layer.blocks.numel(), self._rank, self._world_size)
        share = state["exp_avg_sq"].view(-1).narrow(0, offset, length)
        return exact_sum(share, offset, layer.block_size**2, kept)

    def step_counts(self, layers: dict[str, BlockSparseLinear]) -> dict[str, int]:
        state = self._optimizer.state
        return {name: int(state.get(layer.blocks, {}).get("step", 0)) for name, layer in layers.items()}

    def count_own_steps(self, layers: dict[str, BlockSparseLinear], births: dict[str, Tensor]) -> None:
        self._assert_adam()

        def correct(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            moved = {param: group for group in optimizer.param_groups for param in group["params"]}
            for name, layer in layers.items():
                blocks = layer.blocks
                if blocks.grad is not None and blocks in moved:
                    state = optimizer.state[blocks]
                    correct_bias_(
                        blocks.data.view(-1), (state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)), 0,
                        layer.block_size**2, births=births[name], step=int(state["step"]), group=moved[blocks],
                    )  # fmt: skip

        if self._counting is not None:
            self._counting.remove()
        self._counting = self._optimizer.register_step_post_hook(correct)

    def _assert_adam(self) -> None:
        if not isinstance(self._optimizer, torch.optim.Adam) or self._optimizer.defaults["amsgrad"]:
            raise ValueError(
                f"expected Adam or AdamW without amsgrad for fresh_moments other than zero, found {self._optimizer}"
            )
