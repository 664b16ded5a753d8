"""Documents: lists of sentences, out of the lines of a source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from dsbert.base.errors import UserError
from dsbert.data.preparing.folders import EMPTY, NO_TEXT, LeftOut
from dsbert.data.preparing.pieces import cut, read
from dsbert.data.preparing.sentences import split_sentences
from dsbert.data.preparing.sources import resolve

Document = list[str]

TEXT_COLUMN = "text"
# Below this a document is a heading or a redirect: no two halves of a sample come from it.
MIN_WORDS = 3


def read_documents(
    sources: Sequence[str],
    documents: Sequence[str] = (),
    text_column: str = TEXT_COLUMN,
    left_out: list[LeftOut] | None = None,
) -> Iterator[Document]:
    """Read the sources one after the other, split into sentences; nothing but empty documents is left out.

    Args:
        sources: SOURCES, as sources.py says.
        documents: how rows make documents: none (each source's default), one for all, or one for each.
        text_column: what tables call their text.
        left_out: files that are not read, and those without text, are added to it.

    Yields:
        Documents: sentences without line breaks, runs of white space collapsed, none of them empty.

    Raises:
        UserError: a source is unknown, missing, damaged, not UTF-8 or not installed; or has no text.
    """
    left_out = [] if left_out is None else left_out
    for source in resolve(sources, documents):
        left_out += source.left_out
        without = []
        for file in source.files:
            pieces = cut(file, source.documents, text_column)
            found = False
            for paragraphs in chain.from_iterable(map(read, pieces)):
                document = split_sentences(paragraphs)
                if document:
                    found = True
                    yield document
            if not found:
                without.append(LeftOut(file.path, NO_TEXT if pieces else EMPTY))
        if len(without) == len(source.files):
            raise UserError(f"the corpus is empty: no text in {source.name}; name a source with text")
        left_out += without
