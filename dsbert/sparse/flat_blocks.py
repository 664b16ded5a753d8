"""Blocks inside a flat slice of a parameter.

ZeRO gives a rank the elements [offset, offset + n) of a flattened [K, B, B] parameter; its edges cut blocks. Here is
the arithmetic of which blocks such a slice covers, without a loop over slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class PruneScore:
    """A block's score, exact under any sharding: integer terms (fp32 [...] -> int64 [...]), combined by sum or max over
    a block and over ranks. A term is `scale` times what it stands for.

    by_age(scores int64 [K], ages int64 [K]): what is compared in place of the combined scores: [K], of any ordered
    dtype, on the CPU, by arithmetic that is the same on every machine. ages: see `MaskManager`. squared: the score is
    the square of a norm.
    """

    terms: Callable[[Tensor], Tensor]
    combine: Literal["sum", "max"]
    scale: float
    by_age: Callable[[Tensor, Tensor], Tensor] | None = None
    squared: bool = False

    def norms(self, scores: NDArray[np.int64]) -> NDArray[np.float64]:
        """What combined scores stand for, in units of the weights."""
        values: NDArray[np.float64] = scores / self.scale
        return np.sqrt(values) if self.squared else values


# Fixed point. Integer sums do not depend on the order or on where shards are cut, so equal weights give equal scores
# at any world size. Scaling fp32 by a power of two is exact. Headroom for B = 128 (2^14 terms): l1 2^13 * 2^36 * 2^14,
# l2 2^8 * 2^40 * 2^14, both within int64; larger weights saturate. Resolution: 1.5e-11 (l1), 9e-13 of w^2 (l2).
_L1_SCALE, _L1_MAX = 2.0**36, 2.0**13 - 1
_L2_SCALE, _L2_MAX = 2.0**40, 2.0**8 - 1


def _absolute(w: Tensor) -> Tensor:
    return w.abs().clamp_(max=_L1_MAX).mul_(_L1_SCALE).long()


def _squared(w: Tensor) -> Tensor:
    return w.square().clamp_(max=_L2_MAX).mul_(_L2_SCALE).long()


# A tenth of the paper's 80 updates: from then on a block is judged by what it is, not by the time that it had.
_GROWN_UPDATES = 8


def _per_root_of_age(scores: Tensor, ages: Tensor) -> Tensor:
    """What a block has grown beyond what chance makes of one of its age: float64 [K].

    A regrown block begins at zero, and Adam moves each of its weights by about the learning rate in every step,
    whatever the size of the gradient. Where gradients are noise alone the signs of these steps are those of a coin,
    and |w| grows as the square root of their number; where they agree it grows as the number itself. So norm /
    sqrt(age) is the same at every age for a block that nothing but noise moves, which gains nothing by being young,
    and for one that is of use it rises with the age. Dividing by the age itself would keep what is new and noise before
    what is old and of use. The blocks of the start did not begin at zero: they are compared as they are, as those are
    that have had `_GROWN_UPDATES` intervals, since weight decay and a falling rate end what was linear.
    """
    # Multiplication, division and square root of doubles are rounded alike everywhere.
    return scores.double() * (_GROWN_UPDATES / ages.clamp(max=_GROWN_UPDATES).double()).sqrt()


# What `SparsityConfig.prune_score` may name; a program may add scores of its own. l2 is the norm's square.
PRUNE_SCORES: dict[str, PruneScore] = {
    "l1": PruneScore(_absolute, "sum", _L1_SCALE),
    "l2": PruneScore(_squared, "sum", _L2_SCALE, squared=True),
    "linf": PruneScore(_absolute, "max", _L1_SCALE),
    "l1_by_age": PruneScore(_absolute, "sum", _L1_SCALE, _per_root_of_age),
}


def _whole_blocks(offset: int, numel: int, block_numel: int) -> tuple[int, int]:
    """First and one past the last block that lie wholly in the slice; first > last if it is inside one block."""
    return -(-offset // block_numel), (offset + numel) // block_numel


def runs(offset: int, numel: int, block_numel: int) -> Iterator[tuple[slice, int, int]]:
    """Of the slice [offset, offset + numel): (which of its elements, first block, number of blocks), for the rest of a
    block that begins before it, whole blocks, and the part of one that ends behind it; none is empty.

    Such elements, seen as [blocks, -1], have a row for each block.
    """
    if numel == 0:
        return
    first, last = _whole_blocks(offset, numel, block_numel)
    if first > last:
        yield slice(0, numel), last, 1
        return
    head, tail = first * block_numel - offset, offset + numel - last * block_numel
    for start, stop, block, blocks in (
        (0, head, first - 1, 1), (head, numel - tail, first, last - first), (numel - tail, numel, last, 1),
    ):  # fmt: skip
        if start < stop:
            yield slice(start, stop), block, blocks


def partial_scores(flat: Tensor, offset: int, num_blocks: int, block_numel: int, score: PruneScore) -> Tensor:
    """What the slice contributes to the scores of all blocks: int64 [num_blocks], zero where it covers nothing.

    flat: fp32 [n], the elements from `offset` on. Combine over slices by `score.combine`.
    """
    out = torch.zeros(num_blocks, dtype=torch.int64, device=flat.device)
    numel = flat.numel()
    if numel == 0:
        return out
    reduce = torch.amax if score.combine == "max" else torch.sum
    first, last = _whole_blocks(offset, numel, block_numel)
    terms = score.terms(flat)
    if first > last:
        out[last] = reduce(terms, 0)
        return out
    head, tail = first * block_numel - offset, offset + numel - last * block_numel
    if head:
        out[first - 1] = reduce(terms[:head], 0)
    if last > first:
        out[first:last] = reduce(terms[head : numel - tail].view(-1, block_numel), 1)
    if tail:
        out[last] = reduce(terms[numel - tail :], 0)
    return out


def fill_blocks_(flat: Tensor, offset: int, block_numel: int, slots: Tensor, value: float = 0.0) -> None:
    """Set to `value`, in the slice, whatever belongs to the blocks `slots` (int64 [n], ascending)."""
    numel = flat.numel()
    if numel == 0 or slots.numel() == 0:
        return
    first, last = _whole_blocks(offset, numel, block_numel)
    if first < last:
        inside = slots[(slots >= first) & (slots < last)] - first
        start = first * block_numel - offset
        flat.narrow(0, start, (last - first) * block_numel).view(-1, block_numel).index_fill_(0, inside, value)
    for block in {offset // block_numel, (offset + numel - 1) // block_numel}:
        if not first <= block < last and bool((slots == block).any()):
            start = max(block * block_numel - offset, 0)
            flat[start : (block + 1) * block_numel - offset].fill_(value)
