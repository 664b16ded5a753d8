"""Whole-word masking of a batch, by hash and without a loop over rows or tokens.

A word is a maximal run of maskable tokens whose first one does not begin with `##`. Words are taken in the order of
their hashes, each if it still fits the row's budget of max(1, round(fraction * maskable tokens)) tokens. Where every
word is longer than the budget, the first `budget` tokens of the first word in that order are taken: a row with text
never goes without a masked token, and none exceeds its budget.

Special tokens are never maskable, [UNK] among them: what could not be spelled teaches nothing.

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
    # A run of text ends where a token is that is no text, which is taken for a word as well: so each word ends where
    # the next begins, and none goes on in the next row.
    begins = vocab.word_start[input_ids]
    begins &= maskable
    begins[:, 1:] |= maskable[:, 1:] != maskable[:, :-1]
    begins[:, 0] = True
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=b * S)
    edges = np.searchsorted(starts, np.arange(b + 1) * S)
    words_in_row = np.diff(edges)
    rows = np.repeat(np.arange(b), words_in_row)
    columns = starts - rows * S
    packed = substream(np.repeat(row_keys, words_in_row), columns)
    packed &= _HASH_MASK
    columns <<= 16
    columns |= lengths
    packed |= columns.view(np.uint64)
    packed[~maskable.reshape(-1)[starts]] = _NO_WORD
    longest = max(1, int(words_in_row.max(initial=0)))
    words = np.full((b, longest), _NO_WORD)
    places = np.arange(len(rows))
    places += np.repeat(np.arange(b) * longest - edges[:-1], words_in_row)
    words.reshape(-1)[places] = packed
    words.sort(axis=1)
    return words


def _take(words: UInt64s, budgets: NDArray[np.int64], S: int) -> NDArray[np.int64]:
    """int64 [m], ascending: the flat positions of the words that fit the budgets, taken in order."""
    b = len(words)
    # Words are taken as long as all of them fit: of so many at most, since each has a token. `_NO_WORD` reads as a
    # word of 65,535 tokens, which never fits.
    head = words[:, : max(1, int(budgets.max(initial=0)))] & _LENGTH_MASK
    ends = np.cumsum(head, axis=1, dtype=np.int64)
    fitting = ends <= budgets[:, None]
    counts = np.count_nonzero(fitting, axis=1)
    remaining = budgets - np.where(counts > 0, ends[np.arange(b), counts - 1], 0)
    taken = np.zeros(words.shape, dtype=np.bool_)
    taken[:, : ends.shape[1]] = fitting
    # ... and then the next one that still does, as often as there is one: seldom more than twice.
    pending = np.flatnonzero(remaining > 0)
    after = counts[pending]
    ranks = np.arange(words.shape[1])
    lengths = (words[pending] & _LENGTH_MASK).astype(np.int64)
    while pending.size:
        fits = (lengths <= remaining[pending, None]) & (ranks >= after[:, None])
        chosen = fits.argmax(axis=1)
        rows = np.arange(len(pending))
        found = fits[rows, chosen]
        taken[pending[found], chosen[found]] = True
        remaining[pending[found]] -= lengths[rows, chosen][found]
        more = found & (remaining[pending] > 0)
        pending, after, lengths = pending[more], chosen[more] + 1, lengths[more]
    # Where no word fits at all, the first one is cut.
    cut = (remaining == budgets) & (budgets > 0)
    taken[cut, 0] = True
    flat = np.flatnonzero(taken)
    rows = flat // words.shape[1]
    packed = words.reshape(-1)[flat]
    counts = np.where(cut[rows], budgets[rows], (packed & _LENGTH_MASK).astype(np.int64))
    columns = ((packed >> _SIXTEEN) & _LENGTH_MASK).astype(np.int64)
    inside = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    positions: NDArray[np.int64] = np.repeat(rows * S + columns, counts) + inside
    positions.sort()
    return positions
