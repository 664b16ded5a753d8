"""The decision of a mask update: which blocks go and which come. Pure functions of values that all ranks share.

Shapes: K active blocks, R x C block rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsbert.sparse.balance import draw_evenly, prunable, smallest_in_rows
from dsbert.sparse.draw import DrawKey, draw_positions, hash_positions, smallest
from dsbert.sparse.topology import BlockTopology, TopologyUpdate


@dataclass(frozen=True)
class RegrowRule:
    """Which empty blocks an update fills: those of the smallest scores; ties go to the lower position.

    needs_gradient: whether a step before an update collects the dense gradient. scores(topology, key, gradient_norms):
    [R, C], of any ordered dtype, on the CPU, and the same on every rank; topology: before the update; gradient_norms:
    float32 [R, C], L1 norms of the blocks of the global batch's dense gradient, zeros unless needs_gradient.
    draw(key, eligible bool [R C], count): the same choice, int64 [count] ascending, where it is found faster than by
    scoring every block.
    """

    name: str
    needs_gradient: bool
    scores: Callable[[BlockTopology, DrawKey, Tensor], Tensor]
    draw: Callable[[DrawKey, Tensor, int], Tensor] | None = None


def _hashes(topology: BlockTopology, key: DrawKey, gradient_norms: Tensor) -> Tensor:
    """SET (paper, algorithm 1): uniform without replacement."""
    num_rows, num_cols = topology.grid
    return hash_positions(key, torch.arange(num_rows * num_cols)).view(num_rows, num_cols)


def _largest_gradients(topology: BlockTopology, key: DrawKey, gradient_norms: Tensor) -> Tensor:
    """RigL (Evci et al. 2020)."""
    return -gradient_norms


def _alternately(topology: BlockTopology, key: DrawKey, gradient_norms: Tensor) -> Tensor:
    """Of the empty blocks the one of the smallest hash, the one of the largest gradient, the next hash, and so on: half
    of what is regrown explores, half follows the loss."""
    active = topology.mask().flatten()
    ranks = []
    for scores in (_hashes(topology, key, gradient_norms), _largest_gradients(topology, key, gradient_norms)):
        order = np.lexsort((scores.flatten().numpy(), active.numpy()))  # active ones last; stable
        rank = np.empty_like(order)
        rank[order] = np.arange(order.size)
        ranks.append(torch.from_numpy(rank))
    return torch.minimum(2 * ranks[0], 2 * ranks[1] + 1).view(topology.grid)


# What `SparsityConfig.regrow` may name; a program may add rules of its own.
REGROW_RULES: dict[str, RegrowRule] = {
    "random": RegrowRule("random", False, _hashes, draw_positions),
    "gradient": RegrowRule("gradient", True, _largest_gradients),
    "mixed": RegrowRule("mixed", True, _alternately),
}


def prune_and_regrow(
    topology: BlockTopology,
    norms: Tensor,
    num_pruned: int,
    key: DrawKey,
    rule: str = "random",
    gradient_norms: Tensor | None = None,
    balance: str = "none",
    may_prune: Tensor | None = None,
) -> TopologyUpdate:
    """Prune the `num_pruned` blocks of smallest norm and regrow as many by `rule` (paper, algorithm 1).

    norms: [K], any ordered dtype, on the CPU; ties go to the lower slot. rule: a name of `REGROW_RULES`.
    gradient_norms: [R, C], for rules that need them.
    A block is eligible for regrowth if it was empty BEFORE the update, so a pruned one cannot come straight back; the
    number pruned is capped by the number of empty blocks. Freed slots and new positions are paired in ascending order;
    with balance "rows" every row regrows what it lost, with "even" rows and columns that have fewest grow, whatever
    the rule. may_prune: bool [K], slots that may go; all if None. Raises ValueError for norms of another number, or no
    gradient norms where the rule needs them.
    """
    if norms.numel() != topology.num_active:
        raise ValueError(f"expected {topology.num_active} block norms, found {norms.numel()}")
    how = REGROW_RULES[rule]
    if gradient_norms is None:
        if how.needs_gradient:
            raise ValueError(f"expected gradient norms for regrowth by {rule}, found none")
        gradient_norms = torch.zeros(()).expand(topology.grid)
    num_rows, num_cols = topology.grid
    eligible = topology.mask().logical_not_()
    old = torch.arange(topology.num_active) if may_prune is None else may_prune.nonzero().flatten()
    if balance == "rows":
        slots = old[prunable(topology.rows[old], norms.flatten()[old], num_pruned, eligible.sum(1))]
        quotas = torch.bincount(topology.rows[slots].long(), minlength=num_rows)
        positions = smallest_in_rows(how.scores(topology, key, gradient_norms), eligible, quotas)
    else:
        count = min(num_pruned, old.numel(), eligible.numel() - topology.num_active)
        slots = old[smallest(norms.flatten()[old], count)]
        if balance == "even":
            stay = topology.mask().flatten()
            stay[topology.positions()[slots]] = False
            positions = draw_evenly(key, eligible, stay.view(topology.grid), count)
        elif how.draw is not None:
            positions = how.draw(key, eligible.flatten(), count)
        else:
            empty = eligible.flatten().nonzero().flatten()
            scores = how.scores(topology, key, gradient_norms).flatten()
            positions = empty[smallest(scores[empty], count)]
    return TopologyUpdate(slots, (positions // num_cols).int(), (positions % num_cols).int())
