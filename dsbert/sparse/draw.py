"""Random choices without a random generator.

Every position of a weight gets a 64-bit hash of (seed, purpose, update, layer, position); the smallest hashes win.
No generator state exists, so none can be lost, saved wrongly or advance differently on two ranks. Integer arithmetic
only: the same on CPU, GPU and every release. Golden vectors stand in tests/sparse/test_draw.py.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from dsbert.base.splitmix64 import GOLDEN, WORD, finalize_

_SIGN = np.uint64(1 << 63)
# A chunk and its temporary stay in a core's L2 cache; a whole BERT-Base weight at B = 1 does not. The work is numpy's,
# whose 64-bit multiplication, selection and search are three to thirty times as fast as torch's on a CPU.
_CHUNK = 1 << 15
_STEPS = np.arange(_CHUNK, dtype=np.uint64) * np.uint64(GOLDEN)


@dataclass(frozen=True)
class DrawKey:
    """What a draw depends on, apart from the position. Two draws that differ in any field are independent."""

    seed: int
    purpose: str
    update: int
    layer: str

    def word(self) -> int:
        """The key as one 64-bit integer."""
        return xxhash.xxh3_64_intdigest(f"{self.seed}\0{self.purpose}\0{self.update}\0{self.layer}".encode())


def hash_positions(key: DrawKey, positions: Tensor) -> Tensor:
    """Hashes of `positions` (int64, any shape) under `key`, as int64 whose SIGNED order is the order of the hashes."""
    x = positions.numpy().astype(np.uint64) * np.uint64(GOLDEN)
    x += np.uint64((key.word() + GOLDEN) & WORD)
    finalize_(x)
    return torch.from_numpy((x ^ _SIGN).view(np.int64))


def smallest(values: Tensor, count: int) -> Tensor:
    """Indices (int64 [count], ascending) of the `count` smallest of the 1-D `values`; ties go to the lower index."""
    return torch.from_numpy(_smallest(values.numpy(), count))


def draw_positions(key: DrawKey, eligible: Tensor, count: int) -> Tensor:
    """The `count` eligible positions with the smallest hashes.

    eligible: bool [N]. Returns int64 [count], ascending. Raises ValueError if fewer than `count` are eligible.
    """
    mask: NDArray[np.bool_] = eligible.numpy()
    available = int(np.count_nonzero(mask))
    if count > available:
        raise ValueError(f"expected at least {count} eligible positions, found {available}")
    if count == available:
        return torch.from_numpy(np.flatnonzero(mask))
    # Only hashes below a threshold that `count` positions pass almost surely are kept, so that nothing of size N is
    # ordered. The threshold never changes the answer: when too few pass, it is raised and the scan repeated.
    fraction = count / available
    fraction += 6 * math.sqrt(fraction / available) + 16 / available
    while True:
        positions, hashes = _candidates(key, mask, fraction)
        if positions.size >= count:
            return torch.from_numpy(positions[_smallest(hashes, count)])
        fraction *= 2


def _candidates(
    key: DrawKey, eligible: NDArray[np.bool_], fraction: float
) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Eligible positions, ascending, whose hash lies in the lowest `fraction` of all hashes, and those hashes."""
    threshold = np.uint64(min(int(fraction * 2.0**64), WORD))
    chunk = min(_CHUNK, eligible.size)
    hashes, spare, keep = np.empty(chunk, np.uint64), np.empty(chunk, np.uint64), np.empty(chunk, np.bool_)
    found, values = [], []
    for start in range(0, eligible.size, chunk):
        size = min(chunk, eligible.size - start)
        x = hashes[:size]
        np.add(_STEPS[:size], np.uint64((key.word() + (start + 1) * GOLDEN) & WORD), out=x)
        finalize_(x, spare[:size])
        np.less_equal(x, threshold, out=keep[:size])
        keep[:size] &= eligible[start : start + size]
        kept = np.flatnonzero(keep[:size])
        found.append(kept + start)
        values.append(x[kept])
    return np.concatenate(found), np.concatenate(values)


def _smallest(values: NDArray[np.generic], count: int) -> NDArray[np.int64]:
    if count == 0:
        return np.empty(0, dtype=np.int64)
    threshold = np.partition(values, count - 1)[count - 1]
    chosen = values < threshold
    ties = np.flatnonzero(values == threshold)
    chosen[ties[: count - int(np.count_nonzero(chosen))]] = True
    return np.flatnonzero(chosen)
