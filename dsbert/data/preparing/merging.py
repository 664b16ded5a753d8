"""From spooled documents to token shards: a piece is encoded, then shards are put together from encoded pieces.

Where shards are cut depends on the documents alone, not on pieces: a preparation on any number of processes gives the
same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsbert.data.preparing.done_markers import write_marker
from dsbert.data.preparing.encoding import Encoded, Encoder
from dsbert.data.preparing.sentences import is_panic
from dsbert.data.preparing.split_assignment import TRAIN, VALIDATION
from dsbert.data.preparing.spool import save_array, texts_of
from dsbert.data.shards import Shard, token_dtype
from dsbert.data.tokenizer import load_tokenizer

SPLIT_CODES = {"train": TRAIN, "validation": VALIDATION}

Segment = tuple[str, int, int]
"""(encoded piece, first document, last document): part of a shard."""


def encode_piece(task: dict[str, Any]) -> dict[str, Any]:
    """Encode the documents of a spooled piece that are kept.

    task: piece (path of the spool), tokenizer (directory), splits (file of `SplitAssignment.splits`) and first (the
    piece's place in it), to.
    Writes <to>.<split>.arrow, and last <to>.json: {split: [documents, sentences, tokens], tokenless: documents that the
    tokenizer makes nothing of, or fails on}.
    """
    encoder, dtype, digest = _encoder(task["tokenizer"])
    splits = np.load(task["splits"], mmap_mode="r")
    parts: dict[str, list[Shard]] = {split: [] for split in SPLIT_CODES}
    at, wanted_documents = task["first"], 0
    for texts in texts_of(Path(task["piece"])):
        assigned = np.asarray(splits[at : at + len(texts)])
        at += len(texts)
        for split, wanted in SPLIT_CODES.items():
            kept = [texts[index] for index in np.flatnonzero(assigned == wanted).tolist()]
            if kept:
                wanted_documents += len(kept)
                parts[split].append(pack_texts(encoder, kept, dtype))
    counts: dict[str, Any] = {}
    files = []
    for split, shards in parts.items():
        shard = Shard.joined(shards, dtype)
        counts[split] = [len(shard.document_offsets) - 1, len(shard.sentence_lengths), len(shard.tokens)]
        if counts[split][0]:
            files.append(Path(f"{task['to']}.{split}.arrow"))
            shard.write(files[-1], digest, durable=False)
    counts["tokenless"] = wanted_documents - sum(count[0] for count in counts.values())
    return write_marker(task, counts, files)


def _encoded(encoder: Encoder, texts: list[str]) -> Encoded:
    """`Encoder.encode`, of which a document that the tokenizer fails on has no tokens."""
    try:
        return encoder.encode(texts)
    except BaseException as error:
        if not is_panic(error):
            raise
    if len(texts) > 1:
        half = len(texts) // 2
        parts = [_encoded(encoder, texts[:half]), _encoded(encoder, texts[half:])]
        ids, lengths, sentences = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return ids, lengths, sentences
    count = texts[0].count("\n") + 1
    return np.zeros(0, np.int32), np.zeros(count, np.int64), np.array([count], np.int64)


def plan_shards(pieces: Sequence[str], shard_tokens: int) -> list[list[Segment]]:
    """Cut the documents of encoded pieces, in order, into as few shards of at most `shard_tokens` tokens as can be.

    A document is never cut: one that is larger than a shard gets a shard of its own.
    """
    shards: list[list[Segment]] = [[]]
    held = 0
    for piece in pieces:
        offsets = Shard.open(Path(piece)).document_offsets
        first, count = 0, len(offsets) - 1
        while first < count:
            last = int(np.searchsorted(offsets, offsets[first] + shard_tokens - held, side="right")) - 1
            if last <= first and shards[-1]:
                shards.append([])
                held = 0
                continue
            last = max(last, first + 1)
            shards[-1].append((piece, first, last))
            held += int(offsets[last] - offsets[first])
            first = last
    return shards if shards[-1] else shards[:-1]


def merge_shard(task: dict[str, Any]) -> dict[str, Any]:
    """Put a shard together. task: segments, file, tokenizer (digest), vocab_size, to.

    Writes the shard, <to>.counts.npy (int64 [V]) and last <to>.json: its ShardEntry, and its sentences.
    """
    dtype = token_dtype(task["vocab_size"])
    parts = [Shard.open(Path(piece)).documents(first, last) for piece, first, last in task["segments"]]
    shard = Shard.joined(parts, dtype)
    entry = shard.write(Path(task["file"]), task["tokenizer"])
    counts = Path(f"{task['to']}.counts.npy")
    save_array(counts, np.bincount(shard.tokens, minlength=task["vocab_size"]))
    found = {"entry": asdict(entry), "sentences": len(shard.sentence_lengths)}
    return write_marker(task, found, [counts, Path(task["file"])])


@lru_cache(maxsize=1)
def _encoder(directory: str) -> tuple[Encoder, np.dtype[Any], str]:
    from dsbert.data.tokenizer import tokenizer_digest

    tokenizer = load_tokenizer(Path(directory))
    return Encoder(tokenizer), token_dtype(tokenizer.get_vocab_size()), tokenizer_digest(tokenizer)


def pack_texts(encoder: Encoder, texts: list[str], dtype: np.dtype[Any]) -> Shard:
    """A shard of documents, without the sentences and documents that have no token, or that the tokenizer fails on."""
    return pack(*_encoded(encoder, texts), dtype)


def pack(
    ids: NDArray[np.int32], lengths: NDArray[np.int64], sentences: NDArray[np.int64], dtype: np.dtype[Any]
) -> Shard:
    """A shard of encoded documents (`Encoder.encode`), without the sentences and documents that have no token."""
    ends = np.cumsum(sentences)
    kept = np.diff(np.cumsum(lengths > 0)[ends - 1], prepend=0)
    tokens = np.diff(np.cumsum(lengths)[ends - 1], prepend=0)
    return Shard(
        ids.astype(dtype),
        np.concatenate([[0], np.cumsum(tokens[kept > 0])]).astype(np.int64),
        np.concatenate([[0], np.cumsum(kept[kept > 0])]).astype(np.int64),
        lengths[lengths > 0].astype(np.int32),
    )
