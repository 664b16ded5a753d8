"""A shuffled order that needs no table: position -> sample, computed for the positions that are asked for.

A Feistel network over the smallest power of two that holds range(n) is a keyed bijection of that power of two;
walking along its cycles until the value falls below n makes it a bijection of range(n). The power of two is less
than 2n, so a walk takes fewer than two steps on average.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsbert.data.hashing import UInt64s, hash64, mix64

# Six rounds look random where the halves are wide. Halves of a few bits mix slowly: tiny domains take more rounds.
_ROUNDS, _TINY_ROUNDS, _TINY_BITS = 6, 24, 12


def permute(positions: NDArray[Any], n: int, key: int) -> NDArray[np.int64]:
    """Where a keyed bijection of range(n) sends each position.

    Args:
        positions: integers in [0, n), any shape.
        n: size of the domain, 1 <= n < 2**62.
        key: 64-bit key; another key is another permutation.

    Returns:
        int64, in the shape of `positions`.

    Raises:
        ValueError: a position lies outside range(n), or n is out of bounds.
    """
    if not 1 <= n < 1 << 62:
        raise ValueError(f"n must be in [1, 2**62), got {n}")
    positions = np.asarray(positions)
    if positions.size and (int(positions.min()) < 0 or int(positions.max()) >= n):
        raise ValueError(f"positions must be in [0, {n}), got {positions.min()} to {positions.max()}")
    bits = max(2, (n - 1).bit_length())
    round_keys = hash64([key], np.arange(_ROUNDS if bits > _TINY_BITS else _TINY_ROUNDS))
    values = positions.reshape(-1).astype(np.uint64)
    walking = np.arange(values.size)
    while walking.size:
        values[walking] = _feistel(values[walking], bits, round_keys)
        walking = walking[values[walking] >= n]
    return values.astype(np.int64).reshape(positions.shape)


def _feistel(values: UInt64s, bits: int, round_keys: UInt64s) -> UInt64s:
    """A bijection of range(2**bits): the two halves, of bits // 2 and the rest, are changed in turn."""
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = values & low_mask, values >> low_bits
    for number, key in enumerate(round_keys):
        if number % 2 == 0:
            high = high ^ (mix64(low ^ key) & high_mask)
        else:
            low = low ^ (mix64(high ^ key) & low_mask)
    result: UInt64s = (high << low_bits) | low
    return result
