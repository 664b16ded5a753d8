"""Token shards: Arrow stream files written once and memory-mapped by every rank.

A shard holds whole documents, one row each: `tokens` (list of uint16, or int32 for more than 65,536 ids) and
`sentence_lengths` (list of int32, which sum to the row's tokens); its schema names the digest of the tokenizer.
`datasets.Dataset.from_file` opens it as well.

Over the shards of a split the tokens have global offsets, and the documents global numbers, in shard order.

Legend: T tokens, D documents and E sentences of one shard; n pieces of text.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from dsbert.base.durable import checksum, publish
from dsbert.base.errors import DataError, UserError
from dsbert.data.manifest import ShardEntry, load_manifest

if TYPE_CHECKING:
    import pyarrow

DEFAULT_SHARD_TOKENS = 64 * 1024 * 1024
_TOKENIZER_KEY = b"dsbert.tokenizer"
INDEX_LEAVES_DATA = (
    "expected samples inside the data, found an index that leaves it: remove the spans-* and pairs-* folders of the "
    "data, they are made again"
)


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
    def joined(cls, parts: "Sequence[Shard]", dtype: np.dtype[Any]) -> "Shard":
        """The documents of all parts, in order."""
        return cls(
            np.concatenate([np.zeros(0, dtype), *(part.tokens for part in parts)], dtype=dtype),
            _joined_offsets([part.document_offsets for part in parts]),
            _joined_offsets([part.sentence_offsets for part in parts]),
            np.concatenate([np.zeros(0, np.int32), *(part.sentence_lengths for part in parts)]),
        )

    def documents(self, first: int, last: int) -> "Shard":
        """The documents [first, last), as views."""
        tokens = self.document_offsets[first : last + 1]
        sentences = self.sentence_offsets[first : last + 1]
        return Shard(
            self.tokens[tokens[0] : tokens[-1]],
            tokens - tokens[0],
            sentences - sentences[0],
            self.sentence_lengths[sentences[0] : sentences[-1]],
        )

    @classmethod
    def open(cls, path: Path, expected_bytes: int | None = None, tokenizer: str | None = None) -> "Shard":
        """Map a shard file into memory; the tokens are not copied.

        Args:
            path: the file.
            expected_bytes: its size; None: any.
            tokenizer: digest of the tokenizer that it must have been encoded with; None: any.

        Raises:
            DataError: the file is missing, has another size than the manifest says, or is not such a shard.
            UserError: it was encoded with another tokenizer.
        """
        import pyarrow as pa

        found = path.stat().st_size if path.is_file() else 0
        if expected_bytes is not None and found != expected_bytes:
            raise DataError(f"{path} should have {expected_bytes} bytes, found {found}; prepare the data again")
        try:
            with pa.memory_map(str(path)) as source:
                (batch,) = pa.ipc.open_stream(source)
            batch.validate(full=True)
            tokens, sentences = batch.column("tokens"), batch.column("sentence_lengths")
            if tokens.type not in (pa.list_(pa.uint16()), pa.list_(pa.int32())) or sentences.type != pa.list_(
                pa.int32()
            ):
                raise ValueError(f"found columns of {tokens.type} and {sentences.type}")
            if tokens.values.null_count or sentences.values.null_count or tokens.null_count or sentences.null_count:
                raise ValueError("found gaps")
        except (pa.ArrowException, OSError, KeyError, ValueError, MemoryError) as error:
            text = " ".join(str(error).split())
            raise DataError(f"{path} is not a token shard ({text}); prepare the data again") from error
        held = (batch.schema.metadata or {}).get(_TOKENIZER_KEY, b"").decode("utf-8", "replace")
        if tokenizer is not None and held != tokenizer:
            raise UserError(
                f"expected {path} to be encoded with the tokenizer {tokenizer}, as its manifest says, found "
                f"{held or 'none named'}: shards of two preparations were mixed; prepare the data again"
            )
        shard = cls(
            _view(tokens.values),
            _view(tokens.offsets).astype(np.int64),
            _view(sentences.offsets).astype(np.int64),
            _view(sentences.values),
        )
        for offsets, values in (
            (shard.document_offsets, shard.tokens),
            (shard.sentence_offsets, shard.sentence_lengths),
        ):
            if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(values):
                raise DataError(f"{path} is not a token shard (documents do not fill it); prepare the data again")
        return shard

    def check_sentences(self) -> None:
        """Raise DataError unless the sentences of each document make up its tokens."""
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.sentence_lengths, dtype=np.int64)])
        if (len(ends) > 1 and int(self.sentence_lengths.min()) < 1) or not np.array_equal(
            ends[self.sentence_offsets], self.document_offsets
        ):
            raise DataError("expected sentences that make up their documents, found others: prepare the data again")

    def write(self, path: Path, tokenizer: str, durable: bool = True) -> ShardEntry:
        """Write the shard, whole or not at all, as an Arrow stream of one record batch: so each column is one array
        when mapped.

        tokenizer: its digest. durable: whether it must survive a power cut from now on. Raises OSError.
        """
        import pyarrow as pa

        columns = {
            "tokens": _list_array(pa, self.document_offsets, self.tokens),
            "sentence_lengths": _list_array(pa, self.sentence_offsets, self.sentence_lengths),
        }
        batch = pa.RecordBatch.from_pydict(columns).replace_schema_metadata({_TOKENIZER_KEY: tokenizer})
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
                writer.write_batch(batch)
            size, digest = temporary.stat().st_size, shard_checksum(temporary)
            if durable:
                publish(temporary, path)
            else:
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return ShardEntry(path.name, len(self.document_offsets) - 1, len(self.tokens), size, digest)


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
            UserError: there is no prepared data, or a shard was encoded with another tokenizer than the manifest names.
            DataError: a shard is missing or damaged.
        """
        manifest = load_manifest(data_dir)
        opened: dict[str, Shard] = {}
        for entry in manifest.splits[split].shards:
            if entry.file not in opened:
                shard = Shard.open(Path(data_dir) / entry.file, entry.bytes, manifest.tokenizer.digest)
                if (len(shard.document_offsets) - 1, len(shard.tokens)) != (entry.documents, entry.tokens):
                    raise DataError(
                        f"expected {entry.documents} documents and {entry.tokens} tokens in "
                        f"{Path(data_dir) / entry.file}, found {len(shard.document_offsets) - 1} and "
                        f"{len(shard.tokens)}: prepare the data again"
                    )
                opened[entry.file] = shard
        store = cls([opened[entry.file] for entry in manifest.splits[split].shards])
        expected = manifest.splits[split]
        if (store.num_documents, store.num_tokens) != (expected.documents, expected.tokens):
            raise DataError(
                f"expected {expected.documents} documents and {expected.tokens} tokens in {split} of {data_dir}, found "
                f"{store.num_documents} and {store.num_tokens} in its shards: prepare the data again"
            )
        return store

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
        room = np.diff(self.token_offsets)[np.minimum(owners, len(self.shards) - 1)] - local
        if starts.size and (int(starts.min()) < 0 or int(lengths.min()) < 0 or (lengths > room).any()):
            raise DataError(INDEX_LEAVES_DATA)
        # A slice per row is a plain memory copy, which an index array over [n, L] is not.
        pieces = zip(out, owners.tolist(), local.tolist(), lengths.tolist(), columns.tolist(), strict=True)
        for row, owner, start, length, column in pieces:
            row[column : column + length] = self.shards[owner].tokens[start : start + length]


def shard_checksum(path: Path, count: Callable[[int], object] = lambda nbytes: None) -> str:
    """As `durable.checksum`, but with half the bits: `ShardEntry.xxh3`, of which the digest of all data is made."""
    return checksum(path, count, xxhash.xxh3_64)


def _view(array: Any) -> NDArray[Any]:
    """An Arrow array without nulls as numpy, not copied. (Its own `to_numpy` imports pandas, for most of a second.)"""
    flat = np.frombuffer(array.buffers()[1], dtype=array.type.to_pandas_dtype())
    return flat[array.offset : array.offset + len(array)]


def _joined_offsets(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Offsets of parts, each from 0 to its size, as offsets into the whole."""
    offsets = [np.zeros(1, dtype=np.int64)]
    for part in parts:
        offsets.append(part[1:] + offsets[-1][-1])
    return np.concatenate(offsets)


def _list_array(pa: "type[pyarrow]", offsets: NDArray[np.int64], values: NDArray[Any]) -> Any:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))
