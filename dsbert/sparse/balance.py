"""Balanced allocation: every block row keeps the same number of blocks, at least one.

The paper leaves the number of blocks of a row to chance; at density 0.1 and 12 columns of blocks (BERT-Base, B = 64) a
quarter of the rows are then empty, and the longest row decides how long a kernel that works row by row takes. Pruning
still takes the smallest blocks of the whole weight; what a row loses is regrown in the same row.
Shapes: K active blocks, R x C block rows and columns.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsbert.sparse.draw import DrawKey, hash_positions


def blocks_per_row(num_cols: int, density: float) -> int:
    """max(1, round(density C))."""
    return min(num_cols, max(1, round(density * num_cols)))


def draw_in_rows(key: DrawKey, eligible: Tensor, quotas: Tensor) -> Tensor:
    """Of each row, as many eligible positions as its quota, uniform without replacement.

    eligible: bool [R, C]; quotas: int64 [R]. Returns positions int64 [sum of quotas], ascending. Raises ValueError if
    a row has fewer.
    """
    return smallest_in_rows(hash_positions(key, torch.arange(eligible.numel())).view(eligible.shape), eligible, quotas)


def smallest_in_rows(values: Tensor, eligible: Tensor, quotas: Tensor) -> Tensor:
    """Of each row, the eligible positions of the smallest values, as many as its quota; ties go to the lower position.

    values: [R, C]; otherwise as `draw_in_rows`.
    """
    available, quota = eligible.sum(1).numpy(), quotas.numpy()
    if (quota > available).any():
        row = int(np.argmax(quota > available))
        raise ValueError(f"expected at least {quota[row]} eligible positions in row {row}, found {available[row]}")
    order = np.lexsort((values.numpy(), ~eligible.numpy()), axis=1)  # the eligible ones first, by value; stable
    chosen = np.arange(eligible.shape[1]) < quota[:, None]
    rows = np.broadcast_to(np.arange(eligible.shape[0])[:, None], order.shape)
    return torch.from_numpy(np.sort((rows * eligible.shape[1] + order)[chosen]))


def prunable(rows: Tensor, norms: Tensor, count: int, room: Tensor) -> Tensor:
    """The slots of the `count` smallest norms, leaving out what its row has no empty block to regrow in.

    rows, norms: [K]; room: int64 [R], the empty blocks of every row. Ties go to the lower slot. Returns slots,
    ascending; fewer where there is not room enough.
    """
    order: NDArray[np.int64] = np.argsort(norms.numpy(), kind="stable")
    of_row = rows.numpy()[order]
    by_row = np.argsort(of_row, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(of_row, minlength=room.numel()))[:-1]])
    rank = np.empty_like(order)
    rank[by_row] = np.arange(order.size) - starts[of_row[by_row]]
    return torch.from_numpy(np.sort(order[rank < room.numpy()[of_row]][:count]))
