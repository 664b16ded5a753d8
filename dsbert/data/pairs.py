"""Pairs: A and B for next-sentence prediction, such that only who reads can tell whether B follows A.

Every span is CUT once and for all: at one of its sentence ends, or, if it is one sentence, at the word start nearest
its middle. Spans whose Bs are alike from outside (as many tokens and sentences, first and last token of the same kinds,
after a sentence end or within a sentence) form GROUPS. In every epoch the spans of a group meet two by two, each with
one of another document, and one coin for the two decides whether they EXCHANGE their Bs. So every A and every B stands
in true and in false pairs equally often, a false pair has the outside of the true one whose place it takes, and every
token is still read once an epoch. Who meets nobody keeps its B and is not asked.

Cuts and groups depend on data, seq_len and vocabulary alone; who meets whom is a hash of (seed, epoch, group).

Legend: N spans; G groups; n spans asked about.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsbert.data.hashing import CUTS, PAIRS, UInt64s, below, hash64, substream
from dsbert.data.indices import Arrays, find_or_make
from dsbert.data.manifest import load_manifest
from dsbert.data.shards import Shard, TokenStore
from dsbert.data.spans import SpanIndex
from dsbert.data.token_kinds import INSIDE, KIND_BITS
from dsbert.data.tokenizer import Vocabulary

Int64s = NDArray[np.int64]

_FORMAT = 1
_ARRAYS = ("a_length", "order", "place", "bounds")
_GROUP = 64  # spans of a group, where there are so many that are alike
_FEW = 32  # where fewer spans have a B of one length, they take the length that most of them could have
_SHIFT, _COIN = range(2)  # what a group's key is asked for
# How an outside is packed above a span's number: length of B, after a sentence end, first and last kind, sentences.
_SENTENCE_BITS = 4
_SPAN_BITS = 64 - (15 + 1 + 2 * KIND_BITS + _SENTENCE_BITS)
_SPAN_MASK = np.uint64((1 << _SPAN_BITS) - 1)
_ALONE = (1 << (64 - _SPAN_BITS)) - 1


@dataclass(frozen=True)
class Pairs:
    """Where each span is cut, and who may exchange B with whom.

    a_length uint16 [N]: tokens of A. order int32 or int64 [N]: all spans, group by group, each group's by document;
    place [N]: where each span stands there. bounds int64 [G + 1]: where each group begins, and N. A span that can never
    be asked about is a group of its own.
    """

    a_length: NDArray[np.uint16]
    order: NDArray[Any]
    place: NDArray[Any]
    bounds: Int64s

    @classmethod
    def build(cls, store: TokenStore, index: SpanIndex, vocab: Vocabulary) -> Pairs:
        """Cut and group all spans. `index` was built from `store`."""
        a_length = _sentence_cuts(index)
        outside = _cut_within_and_describe_(a_length, store, index, vocab)
        numbers = np.arange(len(index), dtype=np.uint64)
        ranked = _sorted_by(outside, numbers)
        bounds = _bounds(ranked >> np.uint64(_SPAN_BITS))
        groups = np.repeat(np.arange(len(bounds) - 1, dtype=np.uint64), np.diff(bounds))
        order = (_sorted_by(groups, ranked & _SPAN_MASK) & _SPAN_MASK).astype(
            np.int32 if len(index) <= 1 << 31 else np.int64
        )
        place = np.empty_like(order)
        place[order] = numbers
        return cls(a_length.astype(np.uint16), order, place, bounds)

    @classmethod
    def open(
        cls,
        data_dir: str | Path,
        split: str,
        seq_len: int,
        store: TokenStore,
        index: SpanIndex,
        vocab: Vocabulary,
        suspect: Container[str] = (),
    ) -> Pairs:
        """Those of a split, from the data directory or made there. suspect: as in `find_or_make`."""
        meta = {"format": _FORMAT, "data": load_manifest(data_dir).digest}

        def make() -> tuple[Arrays, dict[str, int]]:
            pairs = cls.build(store, index, vocab)
            return {name: getattr(pairs, name) for name in _ARRAYS}, {}

        arrays, _ = find_or_make(Path(data_dir) / pair_index_name(split, seq_len), meta, make, suspect)
        return cls(**{name: arrays[name] for name in _ARRAYS})

    def meet(self, spans: Int64s, epochs: Int64s, seed: int) -> tuple[Int64s, NDArray[np.bool_]]:
        """Whom each span meets in its epoch, int64 [n], itself where nobody; and whether they exchange Bs, bool [n].

        The spans of a group sit down by document, one half opposite the other; then those of one half move on by so
        many seats. So spans of one document meet only where it sits on both sides.
        """
        place = self.place[spans].astype(np.int64)
        group = np.searchsorted(self.bounds, place, side="right") - 1
        first, size = self.bounds[group], self.bounds[group + 1] - self.bounds[group]
        keys = hash64([seed, PAIRS], epochs, group)
        half = size // 2
        wide = np.maximum(half, 1)
        shift = below(substream(keys, _SHIFT), wide)
        seat = place - first
        opposite = np.where(seat < half, half + (seat + shift) % wide, (seat - half - shift) % wide)
        opposite = np.where(seat < 2 * half, opposite, seat)  # of an odd group one is left over
        partners = self.order[first + opposite].astype(np.int64)
        coins = substream(substream(keys, _COIN), np.minimum(seat, opposite))
        return partners, coins >> np.uint64(63) == 1


def pair_index_name(split: str, seq_len: int) -> str:
    """Of its directory."""
    return f"pairs-{split}-{seq_len}"


def _sentence_cuts(index: SpanIndex) -> Int64s:
    """int64 [N]: one of the sentence ends inside each span, by a hash of its number; 0 where there is none.

    Where few spans have a B of that length (few spans, or long ones), a span is cut where the length of B is the one
    that most spans could have: else nobody would be like it.
    """
    length, counts = index.length.astype(np.int64), np.diff(index.first_cut)
    a_length = np.zeros(len(index), dtype=np.int64)
    several = np.flatnonzero(counts)
    choice = below(hash64([CUTS], several), counts[several])
    a_length[several] = index.cuts[index.first_cut[several] + choice]
    b_length = length[several] - a_length[several]
    few = several[np.bincount(b_length)[b_length] < _FEW] if several.size else several
    if few.size:
        firsts = np.cumsum(counts[few]) - counts[few]
        cuts = np.repeat(index.first_cut[few] - firsts, counts[few]) + np.arange(int(counts[few].sum()))
        possible = np.repeat(length[few], counts[few]) - index.cuts[cuts]
        by_frequency = np.argsort(np.bincount(possible), kind="stable")
        rank = np.empty_like(by_frequency)
        rank[by_frequency] = np.arange(len(rank))
        a_length[few] = length[few] - by_frequency[np.maximum.reduceat(rank[possible], firsts)]
    return a_length


def _cut_within_and_describe_(a_length: Int64s, store: TokenStore, index: SpanIndex, vocab: Vocabulary) -> UInt64s:
    """Fill in `a_length` where a span is one sentence; returns how each B looks from outside, uint64 [N]."""
    outside = np.empty(len(index), dtype=np.uint64)
    edges = np.searchsorted(index.start, store.token_offsets).tolist()
    for number, shard in enumerate(store.shards):
        here = slice(edges[number], edges[number + 1])
        start = index.start[here] - store.token_offsets[number]
        length, a = index.length[here].astype(np.int64), a_length[here]
        first_cut = index.first_cut[edges[number] : edges[number + 1] + 1]
        counts = np.diff(first_cut)
        in_b = index.cuts[first_cut[0] : first_cut[-1]] > np.repeat(a, counts)
        sentences = np.diff(np.concatenate([np.zeros(1, np.int64), np.cumsum(in_b)])[first_cut - first_cut[0]])
        sentences = np.minimum(sentences, (1 << _SENTENCE_BITS) - 1)
        after_sentence = counts > 0
        _cut_within_(a, np.flatnonzero(~after_sentence), start, length, shard, vocab)
        first, last = vocab.kinds[shard.tokens[start + a]], vocab.kinds[shard.tokens[start + length - 1]]
        described = length - a
        for part, bits in ((after_sentence, 1), (first, KIND_BITS), (last, KIND_BITS), (sentences, _SENTENCE_BITS)):
            described = described << bits | part
        described[first == INSIDE] = _ALONE  # a piece of a word can only follow the rest of it
        outside[here] = described
    return outside


def _cut_within_(
    a_length: Int64s, pending: Int64s, start: Int64s, length: Int64s, shard: Shard, vocab: Vocabulary
) -> None:
    """Cut the `pending` spans at the word start nearest their middle; in the middle, where there is none.

    a_length, start (in the shard), length: of all spans of the shard.
    """
    a_length[pending] = length[pending] // 2
    distance = 0
    while pending.size:
        middle, found = length[pending] // 2, np.zeros(len(pending), dtype=np.bool_)
        for at in (middle - distance, middle + distance):
            inside = np.clip(at, 1, length[pending] - 1)
            begins = vocab.word_start[shard.tokens[start[pending] + inside]] & (inside == at) & ~found
            a_length[pending[begins]] = at[begins]
            found |= begins
        distance += 1
        pending = pending[~found & (distance <= middle)]


def _sorted_by(keys: UInt64s, spans: UInt64s) -> UInt64s:
    """Key and span packed into one number each, ascending: several times as fast as to sort numbers by keys."""
    packed: UInt64s = keys << np.uint64(_SPAN_BITS) | spans
    packed.sort()
    return packed


def _bounds(outside: UInt64s) -> Int64s:
    """int64 [G + 1]: where groups begin in the sorted outsides. Of many that are alike `_GROUP` are one.

    The number of sentences only sorts those that are otherwise alike: so they meet others with about as many.
    """
    alike = outside >> np.uint64(_SENTENCE_BITS)
    begins = np.flatnonzero((np.diff(alike) != 0) | (outside[1:] == _ALONE)) + 1
    edges = np.concatenate([np.zeros(1, np.int64), begins, np.full(1, len(outside))])
    parts = np.maximum(1, np.diff(edges) // _GROUP)
    nth = np.arange(int(parts.sum())) - np.repeat(np.cumsum(parts) - parts, parts)
    return np.append(np.repeat(edges[:-1], parts) + nth * _GROUP, len(outside))
