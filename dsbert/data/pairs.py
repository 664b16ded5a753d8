"""Pairs: A and B for next-sentence prediction, such that only who reads can tell whether B follows A.

Every span is CUT once and for all: at one of its sentence ends, or, if it is one sentence, at the word start nearest
its middle. Spans of different documents whose Bs are alike from outside (as many tokens, first and last token of the
same kinds, after a sentence end or within a sentence) and hold about the same punctuation are PARTNERS, two by two, and
in every second epoch they EXCHANGE their Bs: partners on one side in even epochs, those on the other side, who look the
same from outside, in odd ones. So every A and every B stands in true and in false pairs equally often, a false pair has
the outside and the style of the true one whose place it takes, half of each epoch's pairs are false, and every token is
still read once an epoch. Who has no partner keeps its B and is not asked.

Cuts, partners and sides depend on data, seq_len and vocabulary alone; which side begins is a hash of the seed.

Legend: N spans; n spans asked about.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsbert.data.hashing import PAIRS, hash64
from dsbert.data.indices import Arrays, find_or_make
from dsbert.data.manifest import load_manifest
from dsbert.data.matching import matched
from dsbert.data.profiles import Cuts
from dsbert.data.shards import TokenStore
from dsbert.data.spans import SpanIndex
from dsbert.data.tokenizer import Vocabulary

Int64s = NDArray[np.int64]

_FORMAT = 3
_ARRAYS = ("a_length", "partner")
_BLOCK = 1 << 18  # spans among which partners are looked for: what memory that takes does not grow with the data


@dataclass(frozen=True)
class Pairs:
    """Where each span is cut, and who may exchange B with whom.

    a_length uint16 [N]: tokens of A. partner int32 or int64 [N]: the span's partner, itself where there is none; for
    those on one side the complement of that number (~), which is negative.
    """

    a_length: NDArray[np.uint16]
    partner: NDArray[Any]

    @classmethod
    def build(cls, store: TokenStore, index: SpanIndex, vocab: Vocabulary) -> Pairs:
        """Cut and match all spans. `index` was built from `store`."""
        spans = len(index)
        a_length = np.empty(spans, dtype=np.uint16)
        partner = np.empty(spans, dtype=np.int32 if spans <= 1 << 31 else np.int64)
        blocks = max(1, -(-spans // _BLOCK))
        edges = [spans * block // blocks for block in range(blocks + 1)]
        for first, last in pairwise(edges):
            if first == last:
                continue
            cuts = Cuts.of(first, last, store, index, vocab)
            a_length[cuts.span[cuts.distance == 0]] = cuts.a_length[cuts.distance == 0]
            found, cut, side = matched(cuts, index.document[first:last].astype(np.int64), first)
            partner[first:last] = np.where(side, ~found, found)
            a_length[first:last] = np.where(cut > 0, cut, a_length[first:last])
        return cls(a_length, partner)

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
        """The partner of each span, int64 [n], itself where it has none; and whether they exchange Bs, bool [n].

        In one of two epochs Bs are exchanged. So whoever remembers A and B from the epoch before has not seen the two
        together.
        """
        found = self.partner[spans].astype(np.int64)
        side = found < 0
        begins = hash64([seed, PAIRS], np.zeros(1, np.int64)) >> np.uint64(63)
        return np.where(side, ~found, found), (side ^ ((epochs & 1) == 1)) ^ (begins == 1)


def pair_index_name(split: str, seq_len: int) -> str:
    """Of its directory."""
    return f"pairs-{split}-{seq_len}"
