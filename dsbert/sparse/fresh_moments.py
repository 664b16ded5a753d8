"""What Adam knows of a block that was just regrown: `SparsityConfig.fresh_moments`.

Both moments of a regrown block are zero, while Adam corrects their bias as if they had been averaged since the start
of the run (1 - beta^t of the whole optimizer). With beta2 = 0.999 the first step of such a weight is 3.2 times the
learning rate in place of 1, and under a steady gradient steps grow to 6.6 times before they fall. Two ways out, beside
the paper's, which leaves it at that:

    mean    the second moment begins as the mean of those that stay: the usual step for a gradient of the usual size
    count   the block's bias is corrected by its own step count

Shapes: K blocks of B x B; a slice is elements [offset, offset + n) of the flattened [K, B, B], as ZeRO cuts it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dsbert.sparse.flat_blocks import runs

# Fixed point in three words of 36 bits, from 2^20 down to 2^-88: integer sums depend neither on their order nor on
# where shards are cut, as those of scores. One word, as there, would lose second moments, which are squares of small
# numbers. Larger ones saturate; a weight may have 2^27 elements.
_SCALES, _MOST = (2.0**16, 2.0**52, 2.0**88), 2.0**20 - 1
NUM_WORDS = len(_SCALES)


def exact_sum(exp_avg_sq: Tensor, offset: int, block_numel: int, kept: Tensor) -> Tensor:
    """What a slice adds to the sum of second moments over the blocks `kept` (bool [K]): int64 [3].

    exp_avg_sq: [n]. The sums of slices and ranks, added up, are what `exact_mean` takes.
    """
    total = torch.zeros(NUM_WORDS, dtype=torch.int64, device=exp_avg_sq.device)
    for part, first, blocks in runs(offset, exp_avg_sq.numel(), block_numel):
        rows = kept[first : first + blocks].nonzero().flatten().to(exp_avg_sq.device)
        rest = exp_avg_sq[part].view(blocks, -1)[rows].float().clamp_(max=_MOST)
        for number, scale in enumerate(_SCALES):
            # Exact: a power of two scales, and what is left after rounding down is the end of the same mantissa.
            word = (rest * scale).floor_()
            total[number] += word.long().sum()
            rest -= word.div_(scale)
    return total


def exact_mean(words: Tensor, count: int) -> float:
    """The mean of `count` second moments from their sum, int64 [3]; 0 if there are none."""
    total = sum(word * round(_SCALES[-1] / scale) for word, scale in zip(words.tolist(), _SCALES, strict=True))
    return total / (count * round(_SCALES[-1])) if count else 0.0


@torch.no_grad()
def correct_bias_(
    weights: Tensor,
    moments: tuple[Tensor, Tensor],
    offset: int,
    block_numel: int,
    *,
    births: Tensor,
    step: int,
    group: dict[str, Any],
) -> None:
    """Right after Adam's step `step`: make it, in a slice, the step that each block's own count asks for.

    weights, moments (exp_avg, exp_avg_sq): [n], as the step has left them. births: int32 [K], on the CPU, Adam's step
    count when each block was regrown, 0 for those of the start. group: torch's, with lr, betas and eps.

    A step is w -= lr m c1(t) / (sqrt(v) c2(t) + eps), c1(t) = 1 / (1 - beta1^t), c2(t) = 1 / sqrt(1 - beta2^t) (Kingma
    & Ba 2015, algorithm 1). The count t is in c1 and c2 alone: moments that begin at zero are the same whatever it is.
    So the step of count t is taken back and that of count t - birth taken, in one addition, and no moment is touched.
    Blocks so old that nothing is left to correct are left alone: with beta2 = 0.999 those of 17,320 steps.
    """
    lr, betas, eps = float(group["lr"]), group["betas"], float(group["eps"])
    counts = step - births.long()
    young = (births > 0) & (counts < _grown(max(betas)))
    if not bool(young.any()):
        return
    corrections = torch.ones(2, births.numel())
    corrections[:, young] = _corrections(betas, counts[young])
    common = _corrections(betas, torch.tensor([step])).flatten().tolist()
    for part, first, blocks in runs(offset, weights.numel(), block_numel):
        rows = young[first : first + blocks].nonzero().flatten()
        own = corrections[:, first + rows, None].to(weights.device)
        rows = rows.to(weights.device)
        w, m, v = (tensor[part].view(blocks, -1) for tensor in (weights, *moments))
        momentum, root = m[rows].float(), v[rows].float().sqrt_()
        taken = (root * common[1]).add_(eps).reciprocal_().mul_(momentum).mul_(lr * common[0])
        taken -= root.mul_(own[1]).add_(eps).reciprocal_().mul_(momentum).mul_(lr * own[0])
        w.index_add_(0, rows, taken.to(w.dtype))


def _corrections(betas: tuple[float, float], counts: Tensor) -> Tensor:
    """c1 and c2 of step counts (int64 [n]): fp32 [2, n]."""
    t = counts.double()
    return torch.stack([1 / (1 - betas[0] ** t), (1 - betas[1] ** t).rsqrt()]).float()


def _grown(beta: float) -> float:
    """The step count from which on 1 - beta^t is 1 in fp32, so that no correction is left."""
    return 25 * math.log(2) / -math.log(beta) if beta else 1.0
