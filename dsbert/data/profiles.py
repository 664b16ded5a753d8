"""Profiles: how the Bs that a span could be cut into look to whoever does not read them.

A text has a style, and A and its own B share it. So a B may stand for another one only if it also holds about as much
punctuation; how much, kind by kind, is its PROFILE. Counts enter by their roots: whoever counts sees that one bracket
is more than none, but hardly that 21 commas are more than 20.

Legend: C cuts; K kinds of punctuation; W words of 64 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsbert.data.hashing import CUTS, UInt64s, below, hash64
from dsbert.data.shards import Shard, TokenStore
from dsbert.data.spans import SpanIndex
from dsbert.data.token_kinds import (
    CLOSING,
    COLON,
    COMMA,
    DASH,
    INSIDE,
    KIND_BITS,
    OPENING,
    QUOTE,
    SENTENCE_END,
)
from dsbert.data.tokenizer import Vocabulary

Int64s = NDArray[np.int64]

LENGTH_BITS = 15
OUTSIDE_BITS = LENGTH_BITS + 1 + 2 * KIND_BITS
UNIT = 16  # what a count of 1 lies above one of 0: 10 of it, 4 above 3: 4
MOST_CUTS = 8  # of a span, those nearest the one that a hash chooses: else all would be cut where Bs are short
_COUNTED = (COMMA, SENTENCE_END, COLON, QUOTE, DASH, OPENING, CLOSING)
_CHUNK = 1 << 13  # spans whose tokens are looked at at a time


@dataclass(frozen=True)
class Cuts:
    """Where spans may be cut, and the Bs that this gives; all [C], by span.

    span int64; a_length int64; outside uint64: length of B, whether it follows a sentence end, kinds of its first and
    last token; distance int64: cuts between this one and the span's own, which is the one of distance 0; fits bool:
    whether B begins with a word (a piece of one can only follow the rest); counts uint64 [W, C]: those of the kinds of
    punctuation, `bits` for each and as many in each word as it has room for.
    """

    span: Int64s
    a_length: Int64s
    outside: UInt64s
    distance: Int64s
    fits: NDArray[np.bool_]
    counts: UInt64s
    bits: int

    @classmethod
    def of(cls, first: int, last: int, store: TokenStore, index: SpanIndex, vocab: Vocabulary) -> Cuts:
        """Those of the spans [first, last), at least one."""
        bits = int(index.length[first:last].max()).bit_length()
        chunks = _chunks(first, last, store, index)
        parts = [_cuts(shard, offset, here, index, vocab, bits) for shard, offset, here in chunks]
        span, a_length, outside, distance, fits, counts = (
            np.concatenate(column, axis=-1) for column in zip(*parts, strict=True)
        )
        return cls(span, a_length, outside, distance, fits, counts, bits)

    def only(self, chosen: Int64s) -> Cuts:
        """Those `chosen`."""
        span, a_length, outside = self.span[chosen], self.a_length[chosen], self.outside[chosen]
        return Cuts(
            span, a_length, outside, self.distance[chosen], self.fits[chosen], self.counts[:, chosen], self.bits
        )

    def profile(self) -> NDArray[np.int16]:
        """int16 [K, C]."""
        roots = np.floor(UNIT * np.sqrt(np.arange(1 << self.bits) + 0.25)).astype(np.int16)
        at_once, mask = 64 // self.bits, np.uint64((1 << self.bits) - 1)
        words = [divmod(number, at_once) for number in range(len(_COUNTED))]
        return np.stack([roots[self.counts[word] >> np.uint64(nth * self.bits) & mask] for word, nth in words])


def _chunks(first: int, last: int, store: TokenStore, index: SpanIndex) -> Iterator[tuple[Shard, int, slice]]:
    """Runs of spans of one shard, with its first token."""
    edges = np.searchsorted(index.start, store.token_offsets).tolist()
    for number, shard in enumerate(store.shards):
        stop = min(last, edges[number + 1])
        for begin in range(max(first, edges[number]), stop, _CHUNK):
            yield shard, int(store.token_offsets[number]), slice(begin, min(stop, begin + _CHUNK))


def _cuts(
    shard: Shard, offset: int, here: slice, index: SpanIndex, vocab: Vocabulary, bits: int
) -> tuple[NDArray[Any], ...]:
    """The fields of `Cuts`, of a run of spans."""
    start, length = index.start[here] - offset, index.length[here].astype(np.int64)
    spans = np.arange(here.start, here.stop)
    first_cut = index.first_cut[here.start : here.stop + 1]
    ends = index.cuts[first_cut[0] : first_cut[-1]].astype(np.int64)
    counts, firsts = np.diff(first_cut), first_cut[:-1] - first_cut[0]
    inner = np.flatnonzero(counts == 0)  # of one sentence: they have one cut, within it
    several = np.flatnonzero(counts)
    own = np.zeros(len(spans), dtype=np.int64)
    own[several] = below(hash64([CUTS], spans[several]), counts[several])
    of = np.repeat(np.arange(len(spans)), counts)
    distance = np.arange(len(ends)) - (firsts + own)[of]
    lowest = np.clip(own - MOST_CUTS // 2, 0, np.maximum(counts - MOST_CUTS, 0)) - own
    near = np.flatnonzero((distance >= lowest[of]) & (distance < (lowest + MOST_CUTS)[of]))

    place = np.concatenate([near + of[near], inner + firsts[inner]]) if len(inner) else near + of[near]
    order = np.argsort(place, kind="stable")  # by span: where it would stand if each span had one end more
    of = np.concatenate([of[near], inner])[order]
    a_length = np.concatenate([ends[near], _middles(inner, start, length, shard, vocab)])[order]
    distance = np.concatenate([np.abs(distance[near]), np.zeros(len(inner), np.int64)])[order]
    begin, end = start[of] + a_length, (start + length)[of]
    first_kind, last_kind = vocab.kinds[shard.tokens[begin]], vocab.kinds[shard.tokens[end - 1]]
    outside = length[of] - a_length
    for part, width in ((counts[of] > 0, 1), (first_kind, KIND_BITS), (last_kind, KIND_BITS)):
        outside = outside << width | part
    counted = _counts(begin, end, of, shard, vocab, bits)
    return spans[of], a_length, outside.astype(np.uint64), distance, first_kind != INSIDE, counted


def _counts(begin: Int64s, end: Int64s, of: Int64s, shard: Shard, vocab: Vocabulary, bits: int) -> UInt64s:
    """uint64 [W, C]: of the tokens [begin, end) of the shard. of: whose they are, ascending.

    One pass over the tokens: each is a one in the bits of its kind, and sums of them are counts of several kinds.
    """
    parts = of[1:] != of[:-1]
    nth = np.concatenate([np.zeros(1, np.int64), np.cumsum(parts)])
    lasts = np.append(np.flatnonzero(parts), len(of) - 1)
    cut_at = np.arange(len(of)) + nth  # in the ascending bounds: each cut, and behind its last one the end of a span
    end_at = lasts + np.arange(1, len(lasts) + 1)
    bounds = np.empty(len(of) + len(lasts), dtype=np.int64)
    bounds[cut_at], bounds[end_at] = begin, end[lasts]
    first = int(bounds[0])
    tokens, bounds = shard.tokens[first : int(bounds[-1])], bounds - first
    seen, before = np.zeros(len(tokens) + 1, dtype=np.uint64), np.zeros(len(bounds) + 1, dtype=np.uint64)
    words, at_once = [], 64 // bits
    for first_kind in range(0, len(_COUNTED), at_once):
        kinds = _COUNTED[first_kind : first_kind + at_once]
        ones = np.zeros(1 << KIND_BITS, dtype=np.uint64)
        ones[list(kinds)] = np.uint64(1) << np.arange(0, bits * len(kinds), bits, dtype=np.uint64)
        seen[:-1] = ones[vocab.kinds][tokens]
        np.cumsum(np.add.reduceat(seen, bounds), out=before[1:])
        words.append(before[end_at][nth] - before[cut_at])
    return np.stack(words)


def _middles(spans: Int64s, start: Int64s, length: Int64s, shard: Shard, vocab: Vocabulary) -> Int64s:
    """Where the `spans` are cut: at the word start nearest their middle; in the middle, where there is none.

    start (in the shard), length: of all spans of the run.
    """
    start, length = start[spans], length[spans]
    middles = length // 2
    cut: Int64s = middles.copy()
    pending, distance = np.arange(len(spans)), 0
    while pending.size:
        found = np.zeros(len(pending), dtype=np.bool_)
        for at in (middles[pending] - distance, middles[pending] + distance):
            inside = np.clip(at, 1, length[pending] - 1)
            begins = vocab.word_start[shard.tokens[start[pending] + inside]] & (inside == at) & ~found
            cut[pending[begins]] = at[begins]
            found |= begins
        distance += 1
        pending = pending[~found & (distance <= middles[pending])]
    return cut
