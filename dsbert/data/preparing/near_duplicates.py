"""Documents that are nearly the same, by MinHash (library `rensa`) over runs of five words.

Two documents are taken for near duplicates if all rows of one of the bands agree: with a share J of their five-word
runs in common that happens with probability 1 - (1 - J^10)^12, which is 1 % at J = 0.5, 29 % at 0.7, 75 % at 0.8, 99
% at 0.9. Of what hangs together, over any number of steps, the first document in the order of the sources stays.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xxhash
from numpy.typing import NDArray

from dsbert.base.errors import UserError

BANDS, ROWS = 12, 10
_RUN_WORDS = 5
_SEED = 1


def algorithm() -> str:
    """What the hashes depend on. Raises UserError where the library is missing."""
    try:
        from rensa import RMinHash
    except ModuleNotFoundError as error:
        raise UserError(
            "near duplicates need a package that is not installed; run: pip install 'dsbert[near]'"
        ) from error
    return f"rensa {RMinHash.ALGORITHM_VERSION} {BANDS}x{ROWS} {_RUN_WORDS} {_SEED}"


def band_hashes(text: str) -> NDArray[np.uint64]:
    """uint64 [BANDS] of one document."""
    from rensa import RMinHash

    words = text.lower().split()
    runs = [" ".join(words[at : at + _RUN_WORDS]) for at in range(max(1, len(words) - _RUN_WORDS + 1))]
    minhash = RMinHash(num_perm=BANDS * ROWS, seed=_SEED)
    minhash.update(runs)
    rows = np.array(minhash.digest(), dtype=np.uint32).reshape(BANDS, ROWS)
    return np.array([xxhash.xxh3_64_intdigest(row.tobytes()) for row in rows], dtype=np.uint64)


def near_copies(documents: NDArray[np.int64], band: Callable[[int], NDArray[np.uint64]]) -> NDArray[np.int64]:
    """Which of the documents resemble an earlier one.

    Args:
        documents: int64 [n], ascending numbers of the documents that are still kept.
        band: the hashes of one band, uint64 [n]; only one band is held in memory at a time.
    """
    first = np.arange(len(documents))  # the earliest document that each hangs together with, so far
    while True:
        before = first.copy()
        for number in range(BANDS):
            order = np.argsort(hashes := band(number), kind="stable")
            begins = np.flatnonzero(np.append(True, np.diff(hashes[order]) != 0)) if len(order) else order
            earliest = np.minimum.reduceat(first[order], begins) if len(order) else order
            sizes = np.diff(np.append(begins, len(order)))
            first[order] = np.repeat(earliest, sizes)
            first = first[first]  # what an earlier one hangs together with
        if np.array_equal(first, before):
            return documents[first < np.arange(len(documents))]
