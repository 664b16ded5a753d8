"""`dsbert prepare`: from sources of text to a data directory, complete or not there at all.

Everything is written into a temporary directory beside the target, which one rename puts in place; what an
interrupted call leaves behind does no harm. Equal requests give equal bytes.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from dsbert.data.corpus import Document, document_hash, is_validation, read_documents, source_fingerprint
from dsbert.data.manifest import (
    MANIFEST,
    SPLITS,
    TOKENIZER,
    UNIGRAM,
    Manifest,
    Request,
    Source,
    SplitEntry,
    TokenizerEntry,
    data_digest,
    load_manifest,
)
from dsbert.data.shards import DEFAULT_SHARD_TOKENS, ShardWriter, checksum
from dsbert.data.tokenizer import save_tokenizer, tokenizer_digest, train_tokenizer
from dsbert.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total), in documents; a total of 0 means that it is not known."""

_ENCODE_DOCUMENTS = 16
_MAX_SHARD_TOKENS = 1 << 30


def prepare(
    sources: Sequence[str],
    to: str | Path,
    vocab_size: int,
    validation: float = 0.05,
    progress: Progress | None = None,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
) -> dict[str, Any]:
    """Make the data directory `to`, or find that it is already there.

    Args:
        sources: names of known corpora or paths of text files (corpus.py).
        to: the directory to make.
        vocab_size: tokens wanted; a small corpus has fewer.
        validation: fraction of the documents held out, chosen by their text; 0 holds out none. A split that would
            get no document gets the nearest one.
        progress: told how far each stage is.
        shard_tokens: largest shard.

    Returns:
        documents, sentences, tokens (both splits together), duplicates (exact copies dropped), shards, digest,
        seconds, and up_to_date: True if nothing had to be done.

    Raises:
        UserError: a source cannot be read, a number is out of bounds, or `to` holds something else.
    """
    began = time.monotonic()
    if not 0 <= validation < 1:
        raise UserError(f"the validation fraction must be in [0, 1), got {validation}")
    if not 1 <= shard_tokens <= _MAX_SHARD_TOKENS:
        raise UserError(f"shard_tokens must be in [1, {_MAX_SHARD_TOKENS}], got {shard_tokens}")
    request = Request(
        tuple(Source(source, source_fingerprint(source)) for source in sources), vocab_size, validation, shard_tokens
    )
    target = Path(to)
    manifest = _existing(target, request)
    up_to_date = manifest is not None
    if manifest is None:
        manifest = _make(target, request, progress or (lambda stage, done, total: None))
    splits = manifest.splits.values()
    return {
        "documents": sum(split.documents for split in splits),
        "sentences": sum(split.sentences for split in splits),
        "tokens": sum(split.tokens for split in splits),
        "duplicates": manifest.duplicates,
        "shards": sum(len(split.shards) for split in splits),
        "digest": manifest.digest,
        "seconds": time.monotonic() - began,
        "up_to_date": up_to_date,
    }


def _existing(target: Path, request: Request) -> Manifest | None:
    """The manifest of a target that answers this request and is intact, or None if there is nothing there."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    if not target.is_dir() or not (target / MANIFEST).exists():
        raise UserError(f"{target} exists and holds no prepared data; choose another directory with --to")
    manifest = load_manifest(target)
    pairs = [
        (field.name, getattr(manifest.request, field.name), getattr(request, field.name)) for field in fields(Request)
    ]
    differing = [f"{name} {_brief(old)} instead of {_brief(new)}" for name, old, new in pairs if old != new]
    if differing:
        raise UserError(f"{target} was prepared with {'; '.join(differing)}; choose another directory with --to")
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        path = target / shard.file
        if not path.is_file() or checksum(path) != shard.xxh3:
            raise UserError(f"{path} is missing or damaged; remove {target} and prepare again")
    return manifest


def _brief(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"{source.name} ({source.fingerprint})" for source in value)
    return str(value)


def _make(target: Path, request: Request, progress: Progress) -> Manifest:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        manifest = _fill(temporary, request, progress)
        temporary.chmod(0o755)
        os.rename(temporary, target)  # fails on a target that somebody else filled meanwhile
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}; check the disk, or whether another prepare ran") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _fill(directory: Path, request: Request, progress: Progress) -> Manifest:
    """Write all files of the data directory. The corpus is held in memory; its tokens are not."""
    documents, duplicates = _read_unique([source.name for source in request.sources], progress)
    held_out = _held_out(documents, request.validation)
    progress("train tokenizer", 0, 0)
    # The validation documents train no part of the model, so not the tokenizer either.
    training = [document for document, held in zip(documents, held_out, strict=True) if not held]
    tokenizer = train_tokenizer(chain.from_iterable(training), request.vocab_size)
    progress("train tokenizer", 1, 1)
    save_tokenizer(tokenizer, directory / TOKENIZER)

    size = tokenizer.get_vocab_size()
    writers = {split: ShardWriter(directory, split, size, request.shard_tokens) for split in SPLITS}
    for number, (document, held) in enumerate(zip(_encode(tokenizer, documents), held_out, strict=True), start=1):
        if document:
            writers["validation" if held else "train"].add(document)
        progress("encode", number, len(documents))
    splits: dict[str, SplitEntry] = {split: writer.close() for split, writer in writers.items()}
    np.save(directory / UNIGRAM, writers["train"].counts)
    digest = tokenizer_digest(tokenizer)
    manifest = Manifest(request, TokenizerEntry(digest, size, True), splits, duplicates, data_digest(digest, splits))
    manifest.save(directory)
    return manifest


def _read_unique(sources: Sequence[str], progress: Progress) -> tuple[list[Document], int]:
    """The documents in order without exact copies, and how many copies there were."""
    seen: set[bytes] = set()
    unique: list[Document] = []
    duplicates = 0
    for number, document in enumerate(read_documents(sources), start=1):
        key = xxhash.xxh3_128_digest("\n".join(document).encode())
        if key in seen:
            duplicates += 1
        else:
            seen.add(key)
            unique.append(document)
        progress("read", number, 0)
    progress("read", len(unique) + duplicates, len(unique) + duplicates)
    return unique, duplicates


def _held_out(documents: list[Document], fraction: float) -> NDArray[np.bool_]:
    """bool [documents]: which are for validation. Each split that is wanted gets at least one document.

    Raises:
        UserError: a validation split is wanted of a single document.
    """
    held = np.array([is_validation(document, fraction) for document in documents])
    if fraction == 0:
        return held
    if len(documents) < 2:
        raise UserError(
            "the corpus has one document, which cannot be split into train and validation; "
            "separate documents by an empty line, or set the validation fraction to 0"
        )
    hashes = [document_hash(document) for document in documents]
    if not held.any():
        held[int(np.argmin(hashes))] = True
    elif held.all():
        held[int(np.argmax(hashes))] = False
    return held


def _encode(tokenizer: "Tokenizer", documents: Iterable[Document]) -> Iterator[list[list[int]]]:
    """The documents' sentences as token ids, without special tokens; sentences without any token are left out."""
    remaining = iter(documents)
    # Several documents at once keep all cores busy; a document alone may be a single sentence.
    while group := list(islice(remaining, _ENCODE_DOCUMENTS)):
        texts = [sentence for document in group for sentence in document]
        encodings = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        for document in group:
            sentences = (encoding.ids for encoding in islice(encodings, len(document)))
            yield [ids for ids in sentences if ids]
