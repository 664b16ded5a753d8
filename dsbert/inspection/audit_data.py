"""Whether a prepared data directory is what its manifest says: every byte is read, and every file that is wrong
named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dsbert.base.durable import differences
from dsbert.base.errors import DataError, DsbertError
from dsbert.checkpoint.loading import Problem
from dsbert.data.indices import index_differences
from dsbert.data.manifest import (
    MANIFEST,
    SPLITS,
    TOKENIZER,
    UNIGRAM,
    Manifest,
    ShardEntry,
    data_digest,
    load_manifest,
    load_unigram_counts,
)
from dsbert.data.shards import Shard, shard_checksum
from dsbert.data.tokenizer import load_tokenizer, tokenizer_digest
from dsbert.data.verification import wrong_file
from dsbert.inspection.audit_checkpoint import Audit


def audit_data(path: Path, count: Callable[[int], object] = lambda nbytes: None) -> Audit:
    """Of the manifest, the tokenizer, every shard, and the unigram counts. count: told the bytes of every piece."""
    audit = Audit()
    try:
        manifest = load_manifest(path)
    except DsbertError as error:
        audit.problems.append(Problem(MANIFEST, str(error)))
        return audit
    if data_digest(manifest.tokenizer.digest, manifest.splits) != manifest.digest:
        audit.problems.append(Problem(MANIFEST, "expected the digest of its own entries, found another"))
    vocab_size = _audit_tokenizer(path, manifest, audit)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for split in SPLITS:
        entry = manifest.splits[split]
        found = [_audit_shard(path, shard, manifest, vocab_size, audit, count) for shard in entry.shards]
        if all(shard is not None for shard in found):
            totals = [
                sum(len(shard.document_offsets) - 1 for shard in found if shard),
                sum(len(shard.sentence_lengths) for shard in found if shard),
                sum(len(shard.tokens) for shard in found if shard),
            ]
            if totals != [entry.documents, entry.sentences, entry.tokens]:
                expected = f"{entry.documents} documents, {entry.sentences} sentences, {entry.tokens} tokens"
                audit.problems.append(Problem(MANIFEST, f"expected {expected} in {split}, found {totals}"))
            if split == "train":
                for shard in found:
                    counts += np.bincount(shard.tokens, minlength=vocab_size) if shard else 0
                _audit_unigram(path, counts, audit)
    _audit_other_files(path, manifest, audit)
    return audit


def _audit_tokenizer(path: Path, manifest: Manifest, audit: Audit) -> int:
    file = path / TOKENIZER / "tokenizer.json"
    try:
        if os.path.lexists(file) and (wrong := wrong_file(file)):
            raise DataError(wrong)
        tokenizer = load_tokenizer(path / TOKENIZER)
    except DsbertError as error:
        audit.problems.append(Problem(f"{TOKENIZER}/tokenizer.json", str(error)))
        return manifest.tokenizer.vocab_size
    if (found := tokenizer_digest(tokenizer)) != manifest.tokenizer.digest:
        message = f"expected the tokenizer {manifest.tokenizer.digest}, found {found}"
        audit.problems.append(Problem(f"{TOKENIZER}/tokenizer.json", message))
    return manifest.tokenizer.vocab_size


def _audit_shard(
    path: Path, entry: ShardEntry, manifest: Manifest, vocab_size: int, audit: Audit, count: Callable[[int], object]
) -> Shard | None:
    """The shard, if it can be read and is what was prepared."""
    file = path / entry.file

    def read(nbytes: int) -> None:
        count(nbytes)
        audit.nbytes += nbytes

    try:
        if wrong := wrong_file(file, entry.bytes):
            audit.problems.append(Problem(entry.file, f"{wrong}: prepare the data again"))
            return None
        if shard_checksum(file, read) != entry.xxh3:
            audit.problems.append(Problem(entry.file, "the checksum differs: prepare the data again"))
            return None
        shard = Shard.open(file, entry.bytes, manifest.tokenizer.digest)
        shard.check_sentences()
    except OSError as error:
        audit.problems.append(Problem(entry.file, f"unreadable: {error.strerror}"))
        return None
    except DsbertError as error:
        audit.problems.append(Problem(entry.file, str(error)))
        return None
    holds = len(shard.document_offsets) - 1, len(shard.tokens)
    if holds != (entry.documents, entry.tokens):
        expected = f"{entry.documents} documents and {entry.tokens} tokens"
        audit.problems.append(Problem(entry.file, f"expected {expected}, found {holds}: prepare the data again"))
        return None
    if len(shard.tokens) and not 0 <= int(shard.tokens.min()) <= int(shard.tokens.max()) < vocab_size:
        audit.problems.append(Problem(entry.file, f"expected ids below {vocab_size}, found {int(shard.tokens.max())}"))
        return None
    return shard


def _audit_unigram(path: Path, counts: np.ndarray, audit: Audit) -> None:
    try:
        found = load_unigram_counts(path)
        if not np.array_equal(found, counts):
            audit.problems.append(
                Problem(UNIGRAM, "expected how often each token occurs in the train split, found other")
            )
    except DsbertError as error:
        audit.problems.append(Problem(UNIGRAM, str(error)))


def _audit_other_files(path: Path, manifest: Manifest, audit: Audit) -> None:
    """What the manifest names beside the shards, unless it was found wrong already; and the sample indices."""
    known = {problem.file for problem in audit.problems}
    unread = {name: wrong for name in manifest.files if (wrong := wrong_file(path / name))}
    rest = {name: digest for name, digest in manifest.files.items() if name not in unread}
    for name, wrong in (unread | differences(path, rest)).items():
        if name not in known:
            audit.problems.append(Problem(name, f"{wrong}: prepare the data again"))
    for folder in sorted((*path.glob("pairs-*"), *path.glob("spans-*"))):
        for name, wrong in index_differences(folder).items():
            message = f"{wrong}: remove {folder.name}, it is made again"
            audit.problems.append(Problem(f"{folder.name}/{name}", message))
