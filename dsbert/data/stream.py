"""The stream of training batches: a pure function of (data, seed, position).

`position` counts samples over the whole job. Epoch position // N shuffles the N spans by a keyed permutation; the
sample at a position is laid out as [CLS] A [SEP] B [SEP] with whole words masked. Every choice is a hash of (seed,
purpose, epoch, sample), so any rank computes any batch at any time, and where the batches are cut changes nothing.

Legend: b samples in a batch, S sequence length, m masked tokens, N spans.
"""

import threading
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsbert.base.errors import DataError, UserError
from dsbert.data.hashing import SAMPLE, hash64, substream
from dsbert.data.manifest import TOKENIZER, load_manifest
from dsbert.data.masking import mask_words_
from dsbert.data.order import Order
from dsbert.data.pairs import Pairs
from dsbert.data.shards import INDEX_LEAVES_DATA, TokenStore
from dsbert.data.spans import NUM_SPECIAL, SpanIndex
from dsbert.data.tokenizer import Vocabulary, load_tokenizer, tokenizer_digest

IGNORE = -100
# Runs whose samples were made in another way cannot go on: raise this with every change of what a batch holds.
SAMPLES = 4
_MASK = 3  # what a sample's key is asked for

Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """b rows of S tokens, and what the model is asked about them.

    input_ids, token_type_ids and attention_mask (1 real, 0 padding): int64 [b, S]. mlm_positions int64 [m]: flat
    index row * S + column, ascending; mlm_labels int64 [m]. nsp_labels int64 [b]: 0 = B follows A, 1 = B is other
    text, -100 = not asked (there is no partner, or NSP is off). num_tokens: without padding.
    """

    input_ids: Int64s
    token_type_ids: Int64s
    attention_mask: Int64s
    mlm_positions: Int64s
    mlm_labels: Int64s
    nsp_labels: Int64s
    num_tokens: int

    @property
    def num_samples(self) -> int:
        """b, which may be 0."""
        return len(self.input_ids)


def joined(batches: Sequence[Batch]) -> Batch:
    """The rows of all batches, at least one of them, below each other."""
    seq_len = batches[0].input_ids.shape[1]
    first_rows = np.cumsum([0, *(len(batch.input_ids) for batch in batches)])
    positions = [batch.mlm_positions + first * seq_len for batch, first in zip(batches, first_rows, strict=False)]
    return Batch(
        input_ids=np.concatenate([batch.input_ids for batch in batches]),
        token_type_ids=np.concatenate([batch.token_type_ids for batch in batches]),
        attention_mask=np.concatenate([batch.attention_mask for batch in batches]),
        mlm_positions=np.concatenate(positions),
        mlm_labels=np.concatenate([batch.mlm_labels for batch in batches]),
        nsp_labels=np.concatenate([batch.nsp_labels for batch in batches]),
        num_tokens=sum(batch.num_tokens for batch in batches),
    )


def check_range(position: int, count: int) -> None:
    """Raises ValueError for a negative position or count."""
    if position < 0 or count < 0:
        raise ValueError(f"expected position >= 0 and count >= 0, got {position}, {count}")


def assert_samples(identity: Mapping[str, Any], run_dir: Path) -> None:
    """Raise UserError if the samples of a run of this identity were made in another way than ours are."""
    if (made := identity.get("samples", 1)) != SAMPLES:
        raise UserError(
            f"expected a run of samples as this dsbert makes them (version {SAMPLES}) in {run_dir}, found version "
            f"{made!r}: start anew in another --run-dir, or go on with the dsbert that began it"
        )


def index_samples(data_dir: str | Path, seq_len: int) -> None:
    """Make the indices of all splits, which the first run would make while its other ranks wait. Raises UserError and
    DataError as `SampleStream.open`."""
    for split, entry in load_manifest(data_dir).splits.items():
        if entry.tokens > 1:
            SampleStream.open(data_dir, split, seq_len, seed=0)


@dataclass(frozen=True)
class _Texts:
    """What stands in each row, all int64 [b]: the tokens of A and B as (global start, length), and the NSP label."""

    a_start: Int64s
    a_length: Int64s
    b_start: Int64s
    b_length: Int64s
    nsp: Int64s


class SampleStream:
    """Batches of masked samples at any position, without state."""

    def __init__(
        self,
        store: TokenStore,
        index: SpanIndex,
        *,
        vocab: Vocabulary,
        seq_len: int,
        seed: int,
        nsp: bool = True,
        mask_fraction: float = 0.15,
        window: int = 0,
        pairs: Pairs | None = None,
    ) -> None:
        """Args: `index` was built from `store` with `seq_len`, and `pairs` from both, which is done here where they are
        not given. Raises UserError if there is no span."""
        if not len(index):
            raise UserError("the corpus is empty: the split has no sample of two tokens; add documents to the sources")
        self.num_samples = len(index)
        self.seq_len = seq_len
        self.vocab = vocab
        self._store = store
        self._index = index
        self._seed = seed
        self._nsp = nsp
        self._mask_fraction = mask_fraction
        self._order = Order(len(index), seed, window)
        self._ordinary_ids, self._is_text = vocab.ordinary_ids, vocab.is_text
        self._asked = threading.Lock()  # what is kept of the order is not for two threads at once
        self._pairs = (pairs or Pairs.build(store, index, vocab)) if nsp else None

    @classmethod
    def open(
        cls,
        data_dir: str | Path,
        split: str,
        seq_len: int,
        seed: int,
        nsp: bool = True,
        mask_fraction: float = 0.15,
        window: int = 0,
        suspect: Container[str] = (),
    ) -> "SampleStream":
        """The stream over one split ("train" or "validation") of a prepared data directory.

        window: as in `Order`. suspect: names of indices that are used only if they are what was written.

        Raises:
            UserError: there is no prepared data, its tokenizer is not the one of its shards, or the split is empty.
            DataError: a shard is missing or damaged.
        """
        store = TokenStore.open(data_dir, split)
        tokenizer = load_tokenizer(Path(data_dir) / TOKENIZER)
        expected, found = load_manifest(data_dir).tokenizer.digest, tokenizer_digest(tokenizer)
        if found != expected:
            raise UserError(
                f"expected the tokenizer {expected} in {data_dir}, with which its shards were encoded, found {found}: "
                "put the tokenizer back, or prepare the data again"
            )
        index = SpanIndex.open(data_dir, split, seq_len, store, suspect)
        vocab = Vocabulary.of(tokenizer)
        pairs = Pairs.open(data_dir, split, seq_len, store, index, vocab, suspect) if nsp else None
        return cls(
            store, index, vocab=vocab, seq_len=seq_len, seed=seed, nsp=nsp, mask_fraction=mask_fraction, window=window,
            pairs=pairs,
        )  # fmt: skip

    def batch(self, position: int, count: int) -> Batch:
        """The samples at positions [position, position + count), which may cross the end of an epoch. Any thread may
        ask.

        Args:
            position: first sample, counted over the whole job, >= 0.
            count: number of samples, >= 0.

        Raises:
            ValueError: a negative position or count.
        """
        check_range(position, count)
        with self._asked:
            return self._made(position, count)

    def _made(self, position: int, count: int) -> Batch:
        epochs, samples = self._order.at(position, count)
        keys = hash64([self._seed, SAMPLE], epochs, samples)
        texts = self._pair(samples, epochs) if self._nsp else self._single(samples)
        if count and not self._fit(texts):
            raise DataError(INDEX_LEAVES_DATA)
        input_ids, token_type_ids, attention, maskable = self._lay_out(texts)
        row_keys = substream(keys, _MASK)
        masked = mask_words_(input_ids, maskable, row_keys, self.vocab, self._ordinary_ids, self._mask_fraction)
        return Batch(
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            attention_mask=attention.astype(np.int64),
            mlm_positions=masked.positions,
            mlm_labels=masked.labels,
            nsp_labels=texts.nsp,
            num_tokens=int(attention.sum()),
        )

    def _single(self, samples: Int64s) -> _Texts:
        """The whole span as A; no B."""
        nothing = np.zeros_like(samples)
        length = self._index.length[samples].astype(np.int64)
        return _Texts(self._index.start[samples], length, nothing, nothing, np.full_like(samples, IGNORE))

    def _pair(self, samples: Int64s, epochs: Int64s) -> _Texts:
        """Each span's A, with its own B or with that of the span that it meets in this epoch."""
        assert self._pairs is not None
        index, a_lengths = self._index, self._pairs.a_length
        partners, exchange = self._pairs.meet(samples, epochs, self._seed)
        asked = index.document[samples] != index.document[partners]
        exchange &= asked
        owners = np.where(exchange, partners, samples)  # of the Bs
        cut = a_lengths[owners].astype(np.int64)
        return _Texts(
            a_start=index.start[samples],
            a_length=a_lengths[samples].astype(np.int64),
            b_start=index.start[owners] + cut,
            b_length=index.length[owners] - cut,
            nsp=np.where(asked, exchange, IGNORE).astype(np.int64),
        )

    def _fit(self, texts: _Texts) -> bool:
        """Whether the index gives each row what it has room for."""
        room = self.seq_len - (NUM_SPECIAL if self._nsp else NUM_SPECIAL - 1)
        least = min(int(texts.a_length.min()) - 1, int(texts.b_length.min()) - int(self._nsp))
        return least >= 0 and int((texts.a_length + texts.b_length).max()) <= room

    def _lay_out(self, texts: _Texts) -> tuple[Int64s, Int64s, NDArray[np.bool_], NDArray[np.bool_]]:
        """input_ids and token_type_ids int64 [b, S], and bool [b, S] which columns are real, and which are text."""
        vocab, b = self.vocab, len(texts.nsp)
        a_end = texts.a_length + 1
        end = a_end + 1  # where the row ends: after A's [SEP], or after B's
        if self._nsp:
            end += texts.b_length + 1

        columns = np.arange(self.seq_len)
        attention = columns < end[:, None]
        token_type_ids = ((columns > a_end[:, None]) & attention).astype(np.int64)
        input_ids = np.full((b, self.seq_len), vocab.pad, dtype=np.int64)
        input_ids[:, 0] = vocab.cls
        self._store.gather(texts.a_start, texts.a_length, input_ids, np.ones_like(texts.nsp))
        if self._nsp:
            self._store.gather(texts.b_start, texts.b_length, input_ids, a_end + 1)
        every = np.arange(b)
        for separator in (a_end, end - 1):
            input_ids[every, separator] = vocab.sep
        if b and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocab.size:
            raise DataError(f"expected ids below {vocab.size} in the shards, found others: prepare the data again")
        # Special tokens are no text wherever they stand: an older dsbert encoded "[MASK]" in a text as one.
        return input_ids, token_type_ids, attention, self._is_text[input_ids]
