"""Token shards: Arrow stream files written once and memory-mapped by every rank.

A shard holds whole documents, one row each: `tokens` (list of uint16, or int32 for more than 65,536 ids) and
`sentence_lengths` (list of int32, which sum to the row's tokens). `datasets.Dataset.from_file` opens it as well.

Over the shards of a split the tokens have global offsets, and the documents global numbers, in shard order.

Legend: T tokens, D documents and E sentences of one shard; n pieces of text.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dsbert.data.manifest import SPLITS, ShardEntry, SplitEntry, load_manifest
from dsbert.errors import UserError

if TYPE_CHECKING:
    import pyarrow

DEFAULT_SHARD_TOKENS = 64 * 1024 * 1024
_READ_BYTES = 1 << 20


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest type that the shards store V ids in."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


@dataclass(frozen=True)
class Shard:
    """One shard's content as flat arrays, in memory or mapped.

    tokens [T]; document_offsets int64 [D + 1] into tokens; sentence_offsets int64 [D + 1] into sentence_lengths;
    sentence_lengths int32 [E].
    """

    tokens: NDArray[Any]
    document_offsets: NDArray[np.int64]
    sentence_offsets: NDArray[np.int64]
    sentence_lengths: NDArray[np.int32]

    @classmethod
    def from_documents(cls, documents: Iterable[list[list[int]]], dtype: np.dtype[Any]) -> "Shard":
        """Pack documents, each a list of sentences, each a non-empty list of token ids."""
        tokens: list[int] = []
        lengths: list[int] = []
        token_offsets, sentence_offsets = [0], [0]
        for document in documents:
            for sentence in document:
                tokens.extend(sentence)
            lengths.extend(map(len, document))
            token_offsets.append(len(tokens))
            sentence_offsets.append(len(lengths))
        return cls(
            np.array(tokens, dtype=dtype),
            np.array(token_offsets, dtype=np.int64),
            np.array(sentence_offsets, dtype=np.int64),
            np.array(lengths, dtype=np.int32),
        )

    @classmethod
    def open(cls, path: Path, expected_bytes: int) -> "Shard":
        """Map a shard file into memory; the tokens are not copied.

        Raises:
            UserError: the file is missing, has another size than the manifest says, or is not such a shard.
        """
        import pyarrow as pa

        found = path.stat().st_size if path.is_file() else 0
        if found != expected_bytes:
            raise UserError(f"{path} should have {expected_bytes} bytes, found {found}; prepare the data again")
        try:
            with pa.memory_map(str(path)) as source:
                (batch,) = pa.ipc.open_stream(source)
            tokens, sentences = batch.column("tokens"), batch.column("sentence_lengths")
        except (pa.ArrowInvalid, OSError, KeyError, ValueError) as error:
            raise UserError(f"{path} is not a token shard ({error}); prepare the data again") from error
        return cls(
            _view(tokens.values),
            _view(tokens.offsets).astype(np.int64),
            _view(sentences.offsets).astype(np.int64),
            _view(sentences.values),
        )

    def write(self, path: Path) -> ShardEntry:
        """Write the shard as an Arrow stream of one record batch, so that each column is one array when mapped."""
        import pyarrow as pa

        columns = {
            "tokens": _list_array(pa, self.document_offsets, self.tokens),
            "sentence_lengths": _list_array(pa, self.sentence_offsets, self.sentence_lengths),
        }
        batch = pa.RecordBatch.from_pydict(columns)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        size = path.stat().st_size
        return ShardEntry(path.name, len(self.document_offsets) - 1, len(self.tokens), size, checksum(path))


class ShardWriter:
    """Writes the documents of one split into as few shards of at most `shard_tokens` tokens as their order allows.

    A document is never cut: one that is larger than a shard gets a shard of its own.
    """

    def __init__(self, directory: Path, split: str, vocab_size: int, shard_tokens: int = DEFAULT_SHARD_TOKENS) -> None:
        self._directory = directory
        self._split = split
        self._dtype = token_dtype(vocab_size)
        self._shard_tokens = shard_tokens
        self._pending: list[list[list[int]]] = []
        self._pending_tokens = 0
        self._sentences = 0
        self._entries: list[ShardEntry] = []
        self.counts = np.zeros(vocab_size, dtype=np.int64)
        """int64 [V]: how often each id was written, complete after `close`."""

    def add(self, document: list[list[int]]) -> None:
        """Add one document: a non-empty list of sentences, each a non-empty list of ids."""
        tokens = sum(map(len, document))
        if self._pending and self._pending_tokens + tokens > self._shard_tokens:
            self._flush()
        self._pending.append(document)
        self._pending_tokens += tokens
        self._sentences += len(document)

    def close(self) -> SplitEntry:
        """Write what is pending and return the split's part of the manifest."""
        if self._pending:
            self._flush()
        documents = sum(entry.documents for entry in self._entries)
        tokens = sum(entry.tokens for entry in self._entries)
        return SplitEntry(documents, self._sentences, tokens, tuple(self._entries))

    def _flush(self) -> None:
        shard = Shard.from_documents(self._pending, self._dtype)
        self.counts += np.bincount(shard.tokens, minlength=len(self.counts))
        self._entries.append(shard.write(self._directory / f"{self._split}-{len(self._entries):05d}.arrow"))
        self._pending, self._pending_tokens = [], 0


class TokenStore:
    """Read access to the tokens of one split by global token offset."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = tuple(shards)
        self.token_offsets = np.cumsum([0, *(len(shard.tokens) for shard in self.shards)], dtype=np.int64)
        """int64 [shards + 1]: the global offset of each shard's first token."""
        self.num_documents = sum(len(shard.document_offsets) - 1 for shard in self.shards)
        self.num_sentences = sum(len(shard.sentence_lengths) for shard in self.shards)
        self.num_tokens = int(self.token_offsets[-1])

    @classmethod
    def open(cls, data_dir: str | Path, split: str) -> "TokenStore":
        """Map the shards of a split ("train" or "validation").

        Raises:
            UserError: there is no prepared data, or a shard is missing or damaged.
        """
        entries = load_manifest(data_dir).splits[split].shards
        return cls([Shard.open(Path(data_dir) / entry.file, entry.bytes) for entry in entries])

    @classmethod
    def from_documents(cls, documents: list[list[list[int]]]) -> "TokenStore":
        """A store in memory: documents of sentences of token ids. Empty sentences and documents are left out."""
        kept = [[sentence for sentence in document if sentence] for document in documents]
        return cls([Shard.from_documents([document for document in kept if document], np.dtype(np.int32))])

    def gather(
        self, starts: NDArray[np.int64], lengths: NDArray[Any], out: NDArray[np.int64], columns: NDArray[np.int64]
    ) -> None:
        """Copy n pieces of text into the rows of `out`: row i from column `columns[i]` on.

        Args:
            starts: int64 [n], global token offsets; a piece must not leave its shard.
            lengths: integers [n], tokens of each piece.
            out: int64 [n, L], changed in place.
            columns: int64 [n], where each piece goes.
        """
        owners = np.searchsorted(self.token_offsets, starts, side="right") - 1
        local = starts - self.token_offsets[owners]
        # A slice per row is a plain memory copy, which an index array over [n, L] is not.
        pieces = zip(out, owners.tolist(), local.tolist(), lengths.tolist(), columns.tolist(), strict=True)
        for row, owner, start, length, column in pieces:
            row[column : column + length] = self.shards[owner].tokens[start : start + length]


def verify_shards(data_dir: str | Path, share: tuple[int, int] = (0, 1)) -> None:
    """Read shards and compare them with the manifest. share = (k, n): every n-th shard from the k-th on.

    Raises:
        UserError: a shard is not what was prepared.
    """
    splits = load_manifest(data_dir).splits
    entries = [entry for split in SPLITS for entry in splits[split].shards]
    for entry in entries[share[0] :: share[1]]:
        path = Path(data_dir) / entry.file
        if not path.is_file() or checksum(path) != entry.xxh3:
            raise UserError(f"expected {path} as it was prepared, found it missing or changed: prepare the data again")


def checksum(path: Path) -> str:
    """Hex xxh3_64 of a file's bytes."""
    import xxhash

    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _view(array: Any) -> NDArray[Any]:
    """An Arrow array without nulls as numpy, not copied. (Its own `to_numpy` imports pandas, for most of a second.)"""
    flat = np.frombuffer(array.buffers()[1], dtype=array.type.to_pandas_dtype())
    return flat[array.offset : array.offset + len(array)]


def _list_array(pa: "type[pyarrow]", offsets: NDArray[np.int64], values: NDArray[Any]) -> Any:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))
