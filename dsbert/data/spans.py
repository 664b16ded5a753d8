"""Spans: the numbered samples of a split for one sequence length.

A span is a run of consecutive sentences of ONE document, packed greedily from the document's start: as many whole
sentences as fit into seq_len - 3 tokens (room for [CLS] and two [SEP]). A longer sentence is cut into pieces of that
size. Spans of 1 token are dropped and counted, since both halves of a sample need one; the span before it cannot
take the token in, being full (that is why the token stands alone). Every other token is in exactly one span.

Span numbers depend on the data and seq_len alone, and never change.

Legend: N spans; P pieces (sentences, after cutting) of one shard; D documents; n spans asked about.
"""

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsbert.base.errors import UserError
from dsbert.data.indices import Arrays, find_or_make
from dsbert.data.manifest import load_manifest
from dsbert.data.shards import Shard, TokenStore

NUM_SPECIAL = 3
MIN_SEQ_LEN, MAX_SEQ_LEN = 8, 1 << 15
_FORMAT = 1
_ARRAYS = ("start", "length", "document", "first_cut", "cuts")


@dataclass(frozen=True)
class SpanIndex:
    """Where each span lies, and where its sentences end.

    start int64 [N]: global token offset. length int32 [N]: tokens, 2 to seq_len - 3. document int32 [N].
    cuts uint16, flat: the sentence ends strictly inside each span, ascending, counted from its start; those of span i
    are cuts[first_cut[i] : first_cut[i + 1]], first_cut int64 [N + 1].
    """

    start: NDArray[np.int64]
    length: NDArray[np.int32]
    document: NDArray[np.int32]
    first_cut: NDArray[np.int64]
    cuts: NDArray[np.uint16]
    dropped_tokens: int = 0

    def __len__(self) -> int:
        return len(self.start)

    @classmethod
    def build(cls, store: TokenStore, seq_len: int) -> "SpanIndex":
        """Cut the whole store into spans.

        Raises:
            UserError: seq_len is out of bounds.
        """
        check_length(seq_len)
        parts: list[SpanIndex] = []
        first_document = 0
        for shard, first_token in zip(store.shards, store.token_offsets, strict=False):
            parts.append(_spans_of_shard(shard, int(first_token), first_document, seq_len - NUM_SPECIAL))
            first_document += len(shard.document_offsets) - 1
        cut_counts = np.concatenate([np.zeros(1, np.int64), *(np.diff(part.first_cut) for part in parts)])
        return cls(
            start=np.concatenate([np.zeros(0, np.int64), *(part.start for part in parts)]),
            length=np.concatenate([np.zeros(0, np.int32), *(part.length for part in parts)]),
            document=np.concatenate([np.zeros(0, np.int32), *(part.document for part in parts)]),
            first_cut=np.cumsum(cut_counts),
            cuts=np.concatenate([np.zeros(0, np.uint16), *(part.cuts for part in parts)]),
            dropped_tokens=sum(part.dropped_tokens for part in parts),
        )

    @classmethod
    def open(
        cls, data_dir: str | Path, split: str, seq_len: int, store: TokenStore, suspect: Container[str] = ()
    ) -> "SpanIndex":
        """The spans of a split, from the data directory or made there. suspect: as in `find_or_make`."""
        meta = {"format": _FORMAT, "data": load_manifest(data_dir).digest}

        def make() -> tuple[Arrays, dict[str, int]]:
            index = cls.build(store, seq_len)
            return {name: getattr(index, name) for name in _ARRAYS}, {"dropped_tokens": index.dropped_tokens}

        arrays, numbers = find_or_make(Path(data_dir) / span_index_name(split, seq_len), meta, make, suspect)
        return cls(**{name: arrays[name] for name in _ARRAYS}, dropped_tokens=numbers["dropped_tokens"])


def check_length(seq_len: int) -> None:
    """Raises UserError where samples cannot be so long."""
    if not MIN_SEQ_LEN <= seq_len <= MAX_SEQ_LEN:
        raise UserError(f"seq_len must be in [{MIN_SEQ_LEN}, {MAX_SEQ_LEN}], got {seq_len}")


def span_index_name(split: str, seq_len: int) -> str:
    """Of its directory."""
    return f"spans-{split}-{seq_len}"


def _spans_of_shard(shard: Shard, first_token: int, first_document: int, capacity: int) -> SpanIndex:
    """The spans of one shard; token offsets and document numbers become global."""
    shard.check_sentences()
    piece_lengths, piece_offsets = _cut_sentences(shard, capacity)
    ends = np.cumsum(piece_lengths)
    begins = ends - piece_lengths
    last_piece = np.repeat(piece_offsets[1:], np.diff(piece_offsets))
    # next_piece[p]: the piece after the span that starts at p; no piece exceeds the capacity, so it is beyond p.
    next_piece = np.minimum(np.searchsorted(ends, begins + capacity, side="right"), last_piece)
    # All documents advance together, one span per round: as many rounds as the longest document has spans.
    rounds: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    active, stop = piece_offsets[:-1], piece_offsets[1:]
    while (unfinished := active < stop).any():
        active, stop = active[unfinished], stop[unfinished]
        rounds.append(active)
        active = next_piece[active]
    first = np.sort(np.concatenate(rounds))
    after = next_piece[first]
    length = ends[after - 1] - begins[first]
    kept = length >= 2
    dropped = int(length[~kept].sum())
    first, after, length = first[kept], after[kept], length[kept]
    counts = after - first - 1
    first_cut = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    rank = np.arange(int(first_cut[-1])) - np.repeat(first_cut[:-1], counts)
    cuts = ends[np.repeat(first, counts) + rank] - np.repeat(begins[first], counts)
    document = np.searchsorted(piece_offsets, first, side="right") - 1 + first_document
    return SpanIndex(
        start=begins[first] + first_token,
        length=length.astype(np.int32),
        document=document.astype(np.int32),
        first_cut=first_cut,
        cuts=cuts.astype(np.uint16),
        dropped_tokens=dropped,
    )


def _cut_sentences(shard: Shard, capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lengths int64 [P] of the pieces (sentences, the long ones cut), and the documents' offsets [D + 1] into them.

    All pieces of a long sentence but its last are full, so no span has two of them: the ends of pieces inside a span
    are ends of sentences.
    """
    sentences = shard.sentence_lengths.astype(np.int64)
    counts = -(-sentences // capacity)
    pieces = np.full(int(counts.sum()), capacity, dtype=np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    pieces[offsets[1:] - 1] = sentences - (counts - 1) * capacity
    return pieces, offsets[shard.sentence_offsets]
