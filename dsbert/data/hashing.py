"""Randomness without state: 64-bit hashes of integers, the same on every platform and version.

Whoever needs a random number hashes who asks and what for: `hash64(seed, SAMPLE, epoch, sample)`. Any rank can
then compute any number at any time, and there is no generator state to save, restore or lose.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsbert.base.splitmix64 import GOLDEN, WORD, finalize_, finalize_int

UInt64s = NDArray[np.uint64]

# First parts of keys, so that no two uses share their numbers.
ORDER, SAMPLE, CHUNKS, WINDOWS, CUTS, PAIRS, SIDES = 1, 2, 3, 4, 5, 6, 7


def mix64(values: UInt64s) -> UInt64s:
    """The finalizer of splitmix64, a bijection of the 64-bit integers; arithmetic wraps around."""
    return _mix64_(values.copy())


def _mix64_(values: UInt64s) -> UInt64s:
    """`mix64` in place: half the time, where arrays are long."""
    finalize_(values)
    return values


def hash_int(*parts: int) -> int:
    """Hash integers in order: what `hash64` gives for arrays of one element, without the cost of arrays."""
    state = 0
    for part in parts:
        state = finalize_int(((state ^ (part & WORD)) + GOLDEN) & WORD)
    return state


def hash64(key: Sequence[int], *parts: NDArray[Any]) -> UInt64s:
    """Hash the key's integers and then the arrays' elements, in order.

    Args:
        key: integers common to all elements.
        parts: integer arrays, at least 1-d (numpy warns of wrap-around for scalars), which broadcast.

    Returns:
        uint64, in the parts' broadcast shape.
    """
    state = np.full(1, hash_int(*key), dtype=np.uint64)
    for part in parts:
        state = _mix64_((state ^ part.astype(np.uint64, copy=False)) + np.uint64(GOLDEN))
    return state


def substream(keys: UInt64s, number: int | NDArray[Any]) -> UInt64s:
    """One hash per (key, number), broadcast: element `number` >= 0 of the splitmix64 stream that starts at the key.

    It serves as a random number, or as the key of further substreams. `keys` must be at least 1-d.
    """
    if isinstance(number, int):
        return _mix64_(keys + np.uint64((number + 1) * GOLDEN & WORD))
    return _mix64_(keys + (number.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN))


def unit_interval(hashes: UInt64s) -> NDArray[np.float64]:
    """Hashes as numbers in [0, 1), from their 53 highest bits."""
    numbers: NDArray[np.float64] = (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def below(hashes: UInt64s, limit: int | NDArray[Any]) -> NDArray[np.int64]:
    """Hashes as integers in [0, limit). The bias of the remainder is limit / 2**64: nothing."""
    return (hashes % np.asarray(limit, dtype=np.uint64)).astype(np.int64)
