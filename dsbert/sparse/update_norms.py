"""How large the blocks are that an update keeps, and those that it drops: a few numbers a weight, for the journal.

They follow from the scores that all ranks share after the all-reduce, so every rank has the same, at any ZeRO stage,
and nothing is sent for them.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dsbert.sparse.flat_blocks import PruneScore

# Of a group of blocks: the mean of their norms, and the norms that a tenth, a half and nine tenths of them do not
# exceed; these of every n-th slot where there are more than _SAMPLE.
SUMMARY = ("mean", "p10", "p50", "p90")
_SHARES = (0.1, 0.5, 0.9)
_SAMPLE = 8192
_DIGITS = 6  # a journal is to stay small

NormSummary = dict[str, tuple[float, ...]]


def norm_summary(scores: Tensor, score: PruneScore, dropped: Tensor, new: Tensor) -> NormSummary:
    """By group of blocks its `SUMMARY`; a group without blocks is left out.

    scores: int64 [K], combined over ranks, before they are set against ages. dropped: slots, int64 [n]. new: bool [K],
    those that the update before has allocated. Groups: "kept" and "dropped", which are all blocks, and "new", which are
    part of either.
    """
    values, goes = scores.numpy(), np.zeros(scores.numel(), dtype=np.bool_)
    goes[dropped.numpy()] = True
    groups = {"kept": values[~goes], "dropped": values[goes], "new": values[new.numpy()]}
    return {name: _summary(group, score) for name, group in groups.items() if group.size}


def _summary(scores: NDArray[np.int64], score: PruneScore) -> tuple[float, ...]:
    """Order is that of whole numbers, so that only the mean is rounded before the end."""
    sample = scores[:: -(-scores.size // _SAMPLE)]
    ranks = [round(share * (sample.size - 1)) for share in _SHARES]
    quantiles = score.norms(np.partition(sample, ranks)[ranks])
    return tuple(_rounded(value) for value in (float(score.norms(scores).mean()), *quantiles.tolist()))


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else 0.0
