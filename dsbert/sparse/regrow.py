"""The decision of a mask update: which blocks go and which come. Pure functions of values that all ranks share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsbert.sparse.draw import DrawKey, draw_positions, smallest
from dsbert.sparse.topology import BlockTopology, TopologyUpdate

# (eligible bool [R*C], count, key, gradient norms [R*C] or None) -> positions int64 [count], ascending.
RegrowRule = Callable[[Tensor, int, DrawKey, Tensor | None], Tensor]


def regrow_random(eligible: Tensor, count: int, key: DrawKey, gradient_norms: Tensor | None) -> Tensor:
    """Uniform among the eligible blocks (paper, algorithm 1; SET)."""
    return draw_positions(key, eligible, count)


def regrow_gradient(eligible: Tensor, count: int, key: DrawKey, gradient_norms: Tensor | None) -> Tensor:
    """The eligible blocks with the largest norm of the dense gradient (RigL). Ties go to the lower position."""
    if gradient_norms is None:
        raise ValueError("expected gradient norms for regrowth by gradient, found none")
    positions = eligible.nonzero().flatten()
    return positions[smallest(-gradient_norms.flatten()[positions], count)]


REGROW_RULES: dict[str, RegrowRule] = {"random": regrow_random, "gradient": regrow_gradient}


def prune_and_regrow(
    topology: BlockTopology,
    norms: Tensor,
    num_pruned: int,
    key: DrawKey,
    rule: RegrowRule = regrow_random,
    gradient_norms: Tensor | None = None,
) -> TopologyUpdate:
    """Prune the `num_pruned` blocks of smallest norm and regrow as many by `rule` (paper, algorithm 1).

    norms: [K], any ordered dtype, on the CPU; ties go to the lower slot. gradient_norms: [R, C] or None.
    A block is eligible for regrowth if it was empty BEFORE the update, so a pruned one cannot come straight back; the
    number pruned is capped by the number of empty blocks. Freed slots and new positions are paired in ascending order.
    """
    if norms.numel() != topology.num_active:
        raise ValueError(f"expected {topology.num_active} block norms, found {norms.numel()}")
    eligible = topology.mask().logical_not_().flatten()
    count = min(num_pruned, topology.num_active, eligible.numel() - topology.num_active)
    slots = smallest(norms.flatten(), count)
    positions = rule(eligible, count, key, gradient_norms) if count else torch.empty(0, dtype=torch.int64)
    num_cols = topology.grid[1]
    return TopologyUpdate(slots, (positions // num_cols).int(), (positions % num_cols).int())
