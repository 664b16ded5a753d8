"""splitmix64 (Steele, Lea, Flood 2014): 64-bit integers to 64-bit hashes, the same on every platform and version.

Element `index` of the stream that starts at `key` is the finalizer of key + (index + 1) GOLDEN, modulo 2^64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15
WORD = (1 << 64) - 1
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def finalize_(x: NDArray[np.uint64], spare: NDArray[np.uint64] | None = None) -> None:
    """The finalizer, in place: a bijection of the 64-bit integers. spare: room of the same shape, or it is made."""
    spare = np.right_shift(x, np.uint64(30), out=spare)
    x ^= spare
    x *= np.uint64(_MIX_1)
    np.right_shift(x, np.uint64(27), out=spare)
    x ^= spare
    x *= np.uint64(_MIX_2)
    np.right_shift(x, np.uint64(31), out=spare)
    x ^= spare


def finalize_int(x: int) -> int:
    """The same of one integer in 0..2^64 - 1, without the cost of arrays."""
    x = ((x ^ (x >> 30)) * _MIX_1) & WORD
    x = ((x ^ (x >> 27)) * _MIX_2) & WORD
    return x ^ (x >> 31)
