"""Samples of texts that were not prepared: of a few, for `dsbert evaluate --text`, or of sources as they are read.

It stands with the preparation because it is one, in memory: sources, pieces, sentences and the encoder are those that
`dsbert prepare` has.

`StreamingSamples` is for programs; `dsbert pretrain` wants prepared data. Its guarantees are those that a source
without an index allows. As long as its rows are what they were: the sample at a position is always the same, on any
rank of any world size, and each span of an epoch comes once. The order is the source's own, shuffled in windows; every
rank reads all of the text, and one that begins at a later position reads up to it first. Nothing is cleaned, held out
or verified, and how many samples an epoch has is known only when it has passed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dsbert.base.errors import UserError
from dsbert.data.preparing.corpus import TEXT_COLUMN
from dsbert.data.preparing.encoding import Encoder
from dsbert.data.preparing.merging import pack_texts
from dsbert.data.preparing.pieces import cut, read
from dsbert.data.preparing.sentences import split_sentences
from dsbert.data.preparing.sources import resolve
from dsbert.data.shards import TokenStore
from dsbert.data.spans import SpanIndex
from dsbert.data.stream import Batch, SampleStream, check_range, joined
from dsbert.data.tokenizer import Vocabulary, find_tokenizer

# Documents whose samples are shuffled together, and lend each other text for next-sentence prediction.
WINDOW_DOCUMENTS = 2048


def store_of(texts: list[str], encoder: Encoder) -> TokenStore:
    """The tokens of documents, whose sentences are lines; in memory."""
    return TokenStore([pack_texts(encoder, texts, np.dtype(np.int32))])


class StreamingSamples:
    """As `SampleStream`, of sources by name (sources.py); positions may only go forward cheaply.

    seq_len, seed, nsp, mask_fraction: as there. tokenizer: a directory, or a name on the hub.
    """

    def __init__(
        self,
        sources: Sequence[str],
        tokenizer: str,
        *,
        seq_len: int,
        seed: int,
        nsp: bool = True,
        mask_fraction: float = 0.15,
        documents: Sequence[str] = (),
        text_column: str = TEXT_COLUMN,
    ) -> None:
        """Raises UserError if a source or the tokenizer cannot be found."""
        self.seq_len = seq_len
        self._tokenizer = find_tokenizer(tokenizer)
        self.vocab = Vocabulary.of(self._tokenizer)
        self._encoder = Encoder(self._tokenizer)
        self._sources = resolve(sources, documents)
        self._nsp, self._mask_fraction = nsp, mask_fraction
        self._seed, self._text_column = seed, text_column
        self._first = 0
        self._windows = self._all_windows()
        self._window = next(self._windows)

    def batch(self, position: int, count: int) -> Batch:
        """The samples at positions [position, position + count). Arguments and errors as of `SampleStream.batch`.

        A position before the last one asked for has the source read from its start.

        Raises UserError if the source cannot be read, or has no sample.
        """
        check_range(position, count)
        if position < self._first:
            self._rewind()
        parts = []
        while count:
            while position >= self._first + self._window.num_samples:
                self._first += self._window.num_samples
                self._window = next(self._windows)
            here = min(count, self._first + self._window.num_samples - position)
            parts.append(self._window.batch(position - self._first, here))
            position, count = position + here, count - here
        return joined(parts or [self._window.batch(0, 0)])

    def _rewind(self) -> None:
        self._windows = self._all_windows()
        self._first = 0
        self._window = next(self._windows)

    def _all_windows(self) -> Iterator[SampleStream]:
        """The samples of one window of documents after the other, epoch after epoch, each with a seed of its own."""
        number = 0
        while True:
            before = number
            for texts in self._text_windows():
                store = store_of(texts, self._encoder)
                if len(index := SpanIndex.build(store, self.seq_len)):
                    seed = (self._seed + (number << 32)) % (1 << 63)
                    yield SampleStream(
                        store, index, vocab=self.vocab, seq_len=self.seq_len, seed=seed, nsp=self._nsp,
                        mask_fraction=self._mask_fraction,
                    )  # fmt: skip
                    number += 1
            if number == before:
                names = ", ".join(source.name for source in self._sources)
                raise UserError(f"the corpus is empty: no text in {names}; name a source with text")

    def _text_windows(self) -> Iterator[list[str]]:
        window: list[str] = []
        for source in self._sources:
            for file in source.files:
                for piece in cut(file, source.documents, self._text_column):
                    for paragraphs in read(piece):
                        if text := "\n".join(split_sentences(paragraphs)):
                            window.append(text)
                        if len(window) == WINDOW_DOCUMENTS:
                            yield window
                            window = []
        if window:
            yield window
