"""Balanced allocation: every block row keeps the same number of blocks, or rows and columns about equal ones.

The paper leaves the number of blocks of a row to chance; at density 0.1 and 12 columns of blocks (BERT-Base, B = 64) a
quarter of the rows are then empty, and the longest row decides how long a kernel that works row by row takes. With
"rows" pruning still takes the smallest blocks of the whole weight; what a row loses is regrown in the same row.

An empty row is B outputs that are constant, an empty column B inputs that nobody reads: capacity that is paid for by
whoever reads those outputs. With "even" the number of blocks is the paper's, and each new block goes where the row has
fewest, and in it to the column that has fewest.
Shapes: K active blocks, R x C block rows and columns.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsbert.sparse.draw import DrawKey, hash_positions

Int64s = NDArray[np.int64]


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


def draw_evenly(key: DrawKey, eligible: Tensor, active: Tensor, count: int) -> Tensor:
    """`count` eligible positions, each in a row of fewest blocks and there in a column of fewest; ties are drawn.

    eligible, active: bool [R, C], disjoint; active: the blocks that stay. Returns positions int64 [count], ascending.
    Raises ValueError if fewer are eligible. Rows of equal number are served together: one column each, of those that
    are next to be filled, at random; only who cannot have the one drawn for it chooses alone.
    """
    free: NDArray[np.bool_] = eligible.numpy().copy()
    available = int(np.count_nonzero(free))
    if count > available:
        raise ValueError(f"expected at least {count} eligible positions, found {available}")
    num_rows, num_cols = free.shape
    in_row, in_col = (active.numpy().sum(axis, dtype=np.int64) for axis in (1, 0))
    left, drawn = count, 0
    while left:
        of_rows, of_cols = _drawn_orders(key, drawn, num_rows, num_cols)
        drawn += 1
        has_room: NDArray[np.bool_] = np.logical_or.reduce(free, axis=1)
        rows = of_rows[has_room[of_rows] & (in_row[of_rows] == in_row[has_room].min())][:left]
        cols = _next_filled(in_col, of_cols, len(rows))
        fits = free[rows, cols]
        free[rows[fits], cols[fits]] = False
        np.add.at(in_col, cols[fits], 1)
        for row in rows[~fits].tolist():
            open_cols = of_cols[np.flatnonzero(free[row, of_cols])]
            col = int(open_cols[np.argmin(in_col[open_cols])])
            free[row, col] = False
            in_col[col] += 1
        in_row[rows] += 1
        left -= len(rows)
    return torch.from_numpy(np.flatnonzero(eligible.numpy() & ~free))


def _drawn_orders(key: DrawKey, number: int, num_rows: int, num_cols: int) -> tuple[Int64s, Int64s]:
    """Rows and columns in an order of their own for every round."""
    size = num_rows + num_cols
    hashes = hash_positions(key, torch.arange(number * size, (number + 1) * size)).numpy()
    return np.argsort(hashes[:num_rows], kind="stable"), np.argsort(hashes[num_rows:], kind="stable")


def _next_filled(in_col: Int64s, order: Int64s, count: int) -> Int64s:
    """The columns that `count` blocks go to, one after the other into a column of fewest: int64 [count], as drawn."""
    levels = np.arange(-(-count // len(in_col)) + int(in_col.max() - in_col.min()) + 1)
    height = in_col[order][None, :] + levels[:, None]
    return order[np.argsort(height, axis=None, kind="stable")[:count] % len(order)]
