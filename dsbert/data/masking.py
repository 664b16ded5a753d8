"""Whole-word masking of a batch, by hash and without a loop over rows or tokens.

A word is a maximal run of maskable tokens whose first one does not begin with `##`. Words are taken in the order of
their hashes, each if it still fits the row's budget of max(1, round(fraction * maskable tokens)) tokens. Where every
word is longer than the budget, the first `budget` tokens of the first word in that order are taken: a row with text
never goes without a masked token, and none exceeds its budget.

Of the chosen tokens 80 % become [MASK], 10 % a random ordinary token, 10 % stay; each token on its own, as in BERT.

Legend: b rows, S columns, W words of the longest row, m masked tokens.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsbert.data.hashing import UInt64s, below, substream, unit_interval
from dsbert.data.tokenizer import Vocabulary

_MASK_SHARE, _RANDOM_SHARE = 0.8, 0.1
_WORD_ORDER, _KIND, _REPLACEMENT = range(3)  # what a row's key is asked for
_NO_WORD = np.uint64((1 << 64) - 1)
_LENGTH_MASK = np.uint64(0xFFFF)
_SIXTEEN = np.uint64(16)
_HASH_MASK = np.uint64(0xFFFFFFFF00000000)


class Masked(NamedTuple):
    """positions int64 [m]: flat index row * S + column, ascending; labels int64 [m]: the ids that stood there."""

    positions: NDArray[np.int64]
    labels: NDArray[np.int64]


def mask_words_(
    input_ids: NDArray[np.int64],
    maskable: NDArray[np.bool_],
    row_keys: UInt64s,
    vocab: Vocabulary,
    ordinary_ids: NDArray[np.int64],
    fraction: float,
) -> Masked:
    """Choose words, and change `input_ids` in place.

    Args:
        input_ids: int64 [b, S], contiguous, S < 2**16.
        maskable: bool [b, S], False on special tokens and padding; column 0 is never maskable.
        row_keys: uint64 [b], a hash of the row's (seed, epoch, sample).
        vocab: gives the word starts and the id of [MASK].
        ordinary_ids: int64, what a random replacement is drawn from (`vocab.ordinary_ids`).
        fraction: of a row's maskable tokens.
    """
    words = _ordered_words(input_ids, maskable, substream(row_keys, _WORD_ORDER), vocab)
    maskable_lengths = maskable.sum(axis=1)
    budgets = np.where(maskable_lengths > 0, np.maximum(1, np.rint(fraction * maskable_lengths)), 0).astype(np.int64)
    positions = _take(words, budgets, input_ids.shape[1])

    flat = input_ids.reshape(-1)
    labels = flat[positions]
    rows, columns = np.divmod(positions, input_ids.shape[1])
    kind = unit_interval(substream(substream(row_keys, _KIND)[rows], columns))
    flat[positions[kind < _MASK_SHARE]] = vocab.mask
    random = (kind >= _MASK_SHARE) & (kind < _MASK_SHARE + _RANDOM_SHARE)
    draws = substream(substream(row_keys, _REPLACEMENT)[rows[random]], columns[random])
    flat[positions[random]] = ordinary_ids[below(draws, len(ordinary_ids))]
    return Masked(positions, labels)


def _ordered_words(
    input_ids: NDArray[np.int64], maskable: NDArray[np.bool_], row_keys: UInt64s, vocab: Vocabulary
) -> UInt64s:
    """uint64 [b, W]: the words of each row in the order of their hashes, then `_NO_WORD`.

    A word is packed as (hash 32 bits, column 16 bits, length 16 bits): one plain sort orders words and carries
    their places along, and equal hashes are ordered by column.
    """
    b, S = input_ids.shape
    # Every unmaskable token is a "word" of its own, so that each word ends where the next begins.
    starts = np.flatnonzero(vocab.word_start[input_ids] | ~maskable | ~np.roll(maskable, 1, axis=1))
    lengths = np.diff(starts, append=b * S)
    real = maskable.reshape(-1)[starts]
    starts, lengths = starts[real], lengths[real]
    rows, columns = np.divmod(starts, S)
    packed = substream(row_keys[rows], columns) & _HASH_MASK
    packed |= columns.astype(np.uint64) << _SIXTEEN
    packed |= lengths.astype(np.uint64)
    words_in_row = np.bincount(rows, minlength=b)
    rank = np.arange(len(rows)) - np.repeat(np.cumsum(words_in_row) - words_in_row, words_in_row)
    words = np.full((b, max(1, int(words_in_row.max(initial=0)))), _NO_WORD)
    words[rows, rank] = packed
    words.sort(axis=1)
    return words


def _take(words: UInt64s, budgets: NDArray[np.int64], S: int) -> NDArray[np.int64]:
    """int64 [m], ascending: the flat positions of the words that fit the budgets, taken in order."""
    lengths = np.ascontiguousarray((words & _LENGTH_MASK).astype(np.int64).T)
    taken = np.zeros_like(lengths)
    remaining = budgets.copy()
    for rank, length in enumerate(lengths):
        # `_NO_WORD` reads as a word of 65,535 tokens, which never fits.
        np.multiply(length, length <= remaining, out=taken[rank])
        remaining -= taken[rank]
        if not remaining.any():
            break
    taken[0] += np.where(remaining == budgets, budgets, 0)
    ranks, rows = np.nonzero(taken)
    counts = taken[ranks, rows]
    columns = ((words[rows, ranks] >> _SIXTEEN) & _LENGTH_MASK).astype(np.int64)
    inside = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    positions: NDArray[np.int64] = np.repeat(rows * S + columns, counts) + inside
    positions.sort()
    return positions
