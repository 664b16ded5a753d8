"""The decision of a mask update: which blocks go and which come. Pure functions of values that all ranks share."""

from __future__ import annotations

import torch
from torch import Tensor

from dsbert.sparse.balance import draw_in_rows, prunable, smallest_in_rows
from dsbert.sparse.draw import DrawKey, draw_positions, smallest
from dsbert.sparse.topology import BlockTopology, TopologyUpdate

# random: the smallest hashes of positions win (SET; paper, algorithm 1). gradient: the largest norms of the dense
# gradient (RigL); ties go to the lower position.
REGROW_RULES = ("random", "gradient")


def regrow(rule: str, eligible: Tensor, count: int, key: DrawKey, gradient_norms: Tensor | None) -> Tensor:
    """`count` of the eligible positions (bool [R, C]) by the rule: int64 [count], ascending."""
    flat = eligible.flatten()
    if rule == "random":
        return draw_positions(key, flat, count)
    positions = flat.nonzero().flatten()
    return positions[smallest(-_needed(gradient_norms).flatten()[positions], count)]


def regrow_in_rows(rule: str, eligible: Tensor, quotas: Tensor, key: DrawKey, gradient_norms: Tensor | None) -> Tensor:
    """The same with as many in every row as its quota (int64 [R])."""
    if rule == "random":
        return draw_in_rows(key, eligible, quotas)
    return smallest_in_rows(-_needed(gradient_norms), eligible, quotas)


def prune_and_regrow(
    topology: BlockTopology,
    norms: Tensor,
    num_pruned: int,
    key: DrawKey,
    rule: str = "random",
    gradient_norms: Tensor | None = None,
    balance: str = "none",
) -> TopologyUpdate:
    """Prune the `num_pruned` blocks of smallest norm and regrow as many by `rule` (paper, algorithm 1).

    norms: [K], any ordered dtype, on the CPU; ties go to the lower slot. gradient_norms: [R, C], for rule "gradient".
    A block is eligible for regrowth if it was empty BEFORE the update, so a pruned one cannot come straight back; the
    number pruned is capped by the number of empty blocks. Freed slots and new positions are paired in ascending order;
    with balance "rows" every row regrows what it lost. Raises ValueError for norms of another number, or none where the
    rule needs them.
    """
    if norms.numel() != topology.num_active:
        raise ValueError(f"expected {topology.num_active} block norms, found {norms.numel()}")
    num_rows, num_cols = topology.grid
    eligible = topology.mask().logical_not_()
    if balance == "rows":
        slots = prunable(topology.rows, norms.flatten(), num_pruned, eligible.sum(1))
        quotas = torch.bincount(topology.rows[slots].long(), minlength=num_rows)
        positions = regrow_in_rows(rule, eligible, quotas, key, gradient_norms)
    else:
        count = min(num_pruned, topology.num_active, eligible.numel() - topology.num_active)
        slots = smallest(norms.flatten(), count)
        positions = regrow(rule, eligible, count, key, gradient_norms) if count else torch.empty(0, dtype=torch.int64)
    return TopologyUpdate(slots, (positions // num_cols).int(), (positions % num_cols).int())


def _needed(gradient_norms: Tensor | None) -> Tensor:
    if gradient_norms is None:
        raise ValueError("expected gradient norms for regrowth by gradient, found none")
    return gradient_norms
