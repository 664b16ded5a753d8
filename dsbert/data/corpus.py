"""Documents: lists of sentences, out of the lines of a source; which are worth keeping, and which are held out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import xxhash

from dsbert.data.pieces import cut, read
from dsbert.data.sentences import split_sentences
from dsbert.data.sources import resolve
from dsbert.errors import UserError

Document = list[str]

TEXT_COLUMN = "text"
# Below this a document is a heading or a redirect: no two halves of a sample come from it.
MIN_WORDS = 3
_HASH_RANGE = 1 << 64


def read_documents(sources: Sequence[str]) -> Iterator[Document]:
    """Read the sources one after the other, split into sentences; nothing but empty documents is left out.

    Yields:
        Documents: sentences without line breaks, runs of white space collapsed, none of them empty.

    Raises:
        UserError: a source is unknown, missing, damaged, not UTF-8 or not installed; or no source has any text.
    """
    found = False
    for source in resolve(sources):
        for file in source.files:
            for piece in cut(file, source.documents, TEXT_COLUMN):
                for paragraphs in read(piece):
                    document = split_sentences(paragraphs)
                    if document:
                        found = True
                        yield document
    if not found:
        raise UserError(f"the corpus is empty: no text in {', '.join(sources)}; name a source with text")


def num_words(text: str) -> int:
    """Words of a text, or of sentences joined by line breaks, apart by single white space."""
    return text.count(" ") + text.count("\n") + 1


def document_hash(document: Document) -> int:
    """A 64-bit hash of the document's text: it decides the split, so it must never change."""
    return text_hash("\n".join(document))


def text_hash(text: str) -> int:
    """`document_hash` of a document whose sentences are joined by line breaks."""
    return xxhash.xxh3_64_intdigest(text.encode())


def validation_limit(fraction: float) -> int:
    """Documents with a hash below it are held out."""
    return int(fraction * _HASH_RANGE)


def is_validation(document: Document, fraction: float) -> bool:
    """Whether the document is held out, by its text alone: no order, seed or other document can move it.

    Equal texts fall on the same side, so a duplicate cannot leak into the other split.
    """
    return document_hash(document) < validation_limit(fraction)
