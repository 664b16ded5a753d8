"""Spans: the numbered samples of a split for one sequence length.

A span is a run of consecutive sentences of ONE document, packed greedily from the document's start: as many whole
sentences as fit into seq_len - 3 tokens (room for [CLS] and two [SEP]). A longer sentence is cut into pieces of that
size. Spans of 1 token are dropped and counted, since both halves of a sample need one; the span before it cannot
take the token in, being full (that is why the token stands alone). Every other token is in exactly one span.

Span numbers depend on the data and seq_len alone, and never change.

Legend: N spans; P pieces (sentences, after cutting) of one shard; D documents; n spans asked about.
"""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsbert.data.manifest import load_manifest
from dsbert.data.shards import Shard, TokenStore
from dsbert.durable import checksum, differences, sealed, unsealed
from dsbert.errors import UserError

NUM_SPECIAL = 3
MIN_SEQ_LEN, MAX_SEQ_LEN = 8, 1 << 15
_META = "meta.json"
_FORMAT = 1


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
        if not MIN_SEQ_LEN <= seq_len <= MAX_SEQ_LEN:
            raise UserError(f"seq_len must be in [{MIN_SEQ_LEN}, {MAX_SEQ_LEN}], got {seq_len}")
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
    def open(cls, data_dir: str | Path, split: str, seq_len: int, store: TokenStore) -> "SpanIndex":
        """The spans of a split, memory-mapped from the data directory, where the first caller writes them.

        Any number of processes may call at once: each writes a directory of its own and renames it into place; the
        first rename wins, and all of them are equal. Where the directory is read-only the index stays in memory.
        """
        target = Path(data_dir) / f"spans-{split}-{seq_len}"
        meta = {"format": _FORMAT, "data": load_manifest(data_dir).digest}
        cached = _load(target, meta)
        if cached is not None:
            return cached
        index = cls.build(store, seq_len)
        try:
            _save(index, target, meta)
        except OSError:
            return index
        return _load(target, meta) or index

    def cut_counts(self, spans: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [n]: number of sentence ends strictly inside each span."""
        return np.asarray(self.first_cut[spans + 1] - self.first_cut[spans])

    def head_lengths(self, spans: NDArray[np.int64], room: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [n]: the longest start of each span that fits into `room` tokens and ends with a sentence.

        Where not even the first sentence fits, the start is cut at `room`.
        """
        length = self.length[spans].astype(np.int64)
        first = self.first_cut[spans]
        low, high = np.zeros_like(first), self.cut_counts(spans)
        # Binary search in all rows at once: `low` becomes the number of cuts that fit.
        while (searching := low < high).any():
            middle = (low + high) // 2
            fits = np.zeros_like(searching)
            fits[searching] = self.cuts[(first + middle)[searching]] <= room[searching]
            low = np.where(fits, middle + 1, low)
            high = np.where(searching & ~fits, middle, high)
        heads = np.minimum(length, room)
        shortened = (length > room) & (low > 0)
        heads[shortened] = self.cuts[(first + low - 1)[shortened]]
        return heads


def index_differences(folder: Path) -> dict[str, str]:
    """The files of an index on disk that are not what was written: name -> what is wrong."""
    try:
        return differences(folder, unsealed(json.loads((folder / _META).read_text())).get("files", {}))
    except (OSError, ValueError, AttributeError):
        return {_META: "it is not what was written"}


def _spans_of_shard(shard: Shard, first_token: int, first_document: int, capacity: int) -> SpanIndex:
    """The spans of one shard; token offsets and document numbers become global."""
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


def _arrays() -> list[str]:
    return [field.name for field in fields(SpanIndex) if field.name != "dropped_tokens"]


def _load(target: Path, meta: dict[str, Any]) -> SpanIndex | None:
    """The cached index, or None if there is none for this data."""
    try:
        found = unsealed(json.loads((target / _META).read_text()))
        dropped, _ = found.pop("dropped_tokens"), found.pop("files")
        if found != meta:
            return None
        arrays = {name: _map(target / f"{name}.npy") for name in _arrays()}
    except Exception:  # of many kinds, where a file's head is damaged
        return None
    return SpanIndex(**arrays, dropped_tokens=dropped)


def _map(path: Path) -> NDArray[Any]:
    # A plain view: indexing np.memmap pays for its subclass on every call.
    array: NDArray[Any] = np.load(path, mmap_mode="r").view(np.ndarray)
    return array


def _save(index: SpanIndex, target: Path, meta: dict[str, Any]) -> None:
    """Write the index beside its place and rename it there; whoever comes second leaves the first one's.

    Raises OSError where the directory cannot be written.
    """
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for name in _arrays():
            np.save(temporary / f"{name}.npy", getattr(index, name))
        files = {f"{name}.npy": checksum(temporary / f"{name}.npy") for name in _arrays()}
        found = sealed({**meta, "dropped_tokens": index.dropped_tokens, "files": files})
        (temporary / _META).write_text(json.dumps(found) + "\n")
        temporary.chmod(0o755)
        if target.exists() and _load(target, meta) is None:
            shutil.rmtree(target, ignore_errors=True)
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
