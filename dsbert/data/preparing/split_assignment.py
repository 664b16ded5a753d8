"""Which split each document is assigned to: trained on, held out, or none as a copy of another. It follows from texts
and their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsbert.base.errors import UserError
from dsbert.data.preparing.near_duplicates import near_copies
from dsbert.data.preparing.spool import FACTS_HIGH, FACTS_LOW, FACTS_SPLIT, load_facts

DROPPED, TRAIN, VALIDATION = range(3)
# Documents whose hashes are looked at in one go: 24 bytes of facts each, and as much again to sort them.
_AT_ONCE = 1 << 22
_HASH_RANGE = 1 << 64


@dataclass(frozen=True)
class SplitAssignment:
    """splits uint8 [D] (DROPPED, TRAIN or VALIDATION) over all documents, in the order of pieces; offsets int64
    [pieces + 1] into it."""

    splits: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    duplicates: int
    near_duplicates: int


def assign_splits(pieces: Sequence[Path], counts: Sequence[int], validation: float, near: bool) -> SplitAssignment:
    """Look at the facts of spooled pieces, a bounded number of documents at a time.

    Of equal documents the first stays. Each split that is wanted gets at least one document.

    Raises:
        UserError: a validation split is wanted of a single document.
    """
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array(counts, dtype=np.int64))])
    splits = np.full(int(offsets[-1]), TRAIN, dtype=np.uint8)
    duplicates = _drop_copies(splits, pieces, offsets)
    near_duplicates = _drop_near_copies(splits, pieces) if near else 0
    if validation:
        _hold_out(splits, pieces, offsets, validation)
    return SplitAssignment(splits, offsets, duplicates, near_duplicates)


def _drop_copies(splits: NDArray[np.uint8], pieces: Sequence[Path], offsets: NDArray[np.int64]) -> int:
    """By parts of the range of the hash, so that no part holds too many documents."""
    parts = -(-len(splits) // _AT_ONCE)
    dropped = 0
    for part in range(parts):
        numbers, highs, lows = [], [], []
        for path, offset in zip(pieces, offsets.tolist(), strict=False):
            facts = load_facts(path)
            here = np.flatnonzero(facts[:, FACTS_HIGH] % np.uint64(parts) == np.uint64(part))
            numbers.append(here + offset)
            highs.append(facts[here, FACTS_HIGH])
            lows.append(facts[here, FACTS_LOW])
        number, high, low = np.concatenate(numbers), np.concatenate(highs), np.concatenate(lows)
        order = np.lexsort((number, low, high))
        same = (np.diff(high[order]) == 0) & (np.diff(low[order]) == 0)
        copies = number[order[1:][same]]
        splits[copies] = DROPPED
        dropped += len(copies)
    return dropped


def _drop_near_copies(splits: NDArray[np.uint8], pieces: Sequence[Path]) -> int:
    kept = np.flatnonzero(splits != DROPPED)

    def band(number: int) -> NDArray[np.uint64]:
        columns = [np.load(path.with_name(f"{path.name}.near.npy"), mmap_mode="r")[:, number] for path in pieces]
        hashes: NDArray[np.uint64] = np.concatenate(columns)[kept]
        return hashes

    copies = near_copies(kept, band)
    splits[copies] = DROPPED
    return len(copies)


def _hold_out(splits: NDArray[np.uint8], pieces: Sequence[Path], offsets: NDArray[np.int64], fraction: float) -> None:
    # By the text alone: no order, seed or other document moves a document to the other side. Texts that fold to the
    # same letters and digits (folding.py) are on one side, so that none leaks into the other.
    limit = np.uint64(int(fraction * _HASH_RANGE))
    lowest: tuple[int, int] | None = None
    highest: tuple[int, int] | None = None
    kept = int(np.count_nonzero(splits))
    if kept < 2:
        raise UserError(
            f"the corpus has {'one document' if kept else 'no document'}, which cannot be split into train and "
            "validation; separate documents by an empty line, or set the validation fraction to 0"
        )
    for path, offset in zip(pieces, offsets.tolist(), strict=False):
        hashes = load_facts(path)[:, FACTS_SPLIT]
        here = np.flatnonzero(splits[offset : offset + len(hashes)])
        if len(here):
            splits[offset + here[hashes[here] < limit]] = VALIDATION
            low, high = here[np.argmin(hashes[here])], here[np.argmax(hashes[here])]
            lowest = min(lowest or (int(hashes[low]), offset + int(low)), (int(hashes[low]), offset + int(low)))
            found = (int(hashes[high]), -offset - int(high))
            highest = max(highest or found, found)
    assert lowest is not None
    assert highest is not None
    held = int(np.count_nonzero(splits == VALIDATION))
    if not held:
        splits[lowest[1]] = VALIDATION
    elif held == kept:
        splits[-highest[1]] = TRAIN
