"""What is kept between the passes of a preparation, so that none is made twice: cleaned documents, piece by piece.

    <key>.arrow     the documents' texts, sentences joined by line breaks, compressed
    <key>.facts.npy uint64 [D, 4]: the 128-bit hash (high, low) of copies, the 64-bit one of the split, the text's bytes
    <key>.near.npy  uint64 [D, bands]: near_duplicates.py, where they are asked for
    <key>.json      how many documents there are, were dropped and mended: the done marker (done_markers.py)

A key names the content: the file's fingerprint, the range, and all that decides what becomes of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from dsbert.data.preparing.done_markers import write_marker
from dsbert.data.preparing.folding import Folder, folder_of
from dsbert.data.preparing.near_duplicates import BANDS
from dsbert.data.preparing.pieces import Piece, read
from dsbert.data.preparing.scripts import num_words
from dsbert.data.preparing.sentences import Splitter

FORMAT = 2
FACTS_HIGH, FACTS_LOW, FACTS_SPLIT, FACTS_BYTES = range(4)
# Documents that are named in a summary, of each kind: more are only counted.
MAX_EXAMPLES = 3
_EXAMPLE_CHARS = 60
_BATCH_CHARS = 1 << 22
_HALF = (1 << 64) - 1


def key_of(*parts: Any) -> str:
    """A name for what follows from the parts, plain JSON values."""
    return xxhash.xxh3_128_hexdigest(json.dumps([FORMAT, *parts], sort_keys=True).encode())


def spool_piece(task: dict[str, Any]) -> dict[str, Any]:
    """Read, split, clean and hash the documents of pieces into `task["to"]`, a path without suffix.

    task: pieces (each `Piece.as_json`), to, min_words, near (bool), normalizer (folding.py; as JSON). Returns what
    <key>.json then holds: {documents, sentences, bytes, empty, tiny, mended, examples, each: the documents of each
    piece}; mended: documents whose sentences were found another way (sentences.py), with the first few of which
    examples say where they are.

    Raises UserError for a source that cannot be read, OSError for a disk that cannot be written.
    """
    import pyarrow as pa

    to, near, folder = Path(task["to"]), task["near"], folder_of(task["normalizer"])
    pieces = [Piece.from_json(piece) for piece in task["pieces"]]
    counts: dict[str, Any] = dict.fromkeys(("documents", "sentences", "bytes", "empty", "tiny", "mended"), 0)
    counts["examples"] = []
    each = [0] * len(pieces)
    facts: list[tuple[int, int, int, int]] = []
    signatures: list[NDArray[np.uint64]] = []
    files = [to.with_name(f"{to.name}.{kind}") for kind in ("arrow", "facts.npy")]
    temporary = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    schema = pa.schema([("text", pa.large_string())])
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, schema, options=options) as writer:
            for texts in _cleaned(pieces, task["min_words"], counts, each):
                facts += [_facts(folder, text) for text in texts]
                if near:
                    from dsbert.data.preparing.near_duplicates import band_hashes

                    signatures += [band_hashes(folder.folded(text)[0].decode()) for text in texts]
                writer.write_batch(pa.RecordBatch.from_arrays([pa.array(texts, pa.large_string())], schema=schema))
        os.replace(temporary, files[0])
    finally:
        temporary.unlink(missing_ok=True)
    counts["bytes"] = sum(fact[FACTS_BYTES] for fact in facts)
    save_array(files[1], np.array(facts, dtype=np.uint64).reshape(-1, 4))
    if near:
        files.append(to.with_name(f"{to.name}.near.npy"))
        save_array(files[-1], np.array(signatures, dtype=np.uint64).reshape(-1, BANDS))
    return write_marker(task, {**counts, "each": each}, files)


def texts_of(path: Path) -> Iterator[list[str]]:
    """The documents of a spooled piece, in batches. Raises OSError if it cannot be read."""
    import pyarrow as pa

    with pa.memory_map(str(path.with_name(f"{path.name}.arrow"))) as source, pa.ipc.open_stream(source) as batches:
        for batch in batches:
            yield batch.column(0).to_pylist()


def load_facts(path: Path) -> NDArray[np.uint64]:
    """uint64 [D, 4], of a spooled piece. Raises OSError, ValueError."""
    facts: NDArray[np.uint64] = np.load(path.with_name(f"{path.name}.facts.npy"))
    return facts


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write a .npy file, whole or not at all. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.save(file, array)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _cleaned(pieces: list[Piece], min_words: int, counts: dict[str, Any], each: list[int]) -> Iterator[list[str]]:
    """Batches of texts that are worth keeping; what there was is added to `counts`, and to `each` piece's documents."""
    batch: list[str] = []
    chars = 0
    splitter = Splitter()
    found = ((number, paragraphs) for number, piece in enumerate(pieces) for paragraphs in read(piece))
    for number, paragraphs in found:
        document = splitter.split(paragraphs)
        text = "\n".join(document)
        if splitter.mended:
            counts["mended"] += 1
            if len(counts["examples"]) < MAX_EXAMPLES:
                counts["examples"].append(
                    f"{pieces[number].file.path}: the document that begins {text[:_EXAMPLE_CHARS]!r}"
                )
        if not text:
            counts["empty"] += 1
        elif num_words(text, min_words) < min_words:
            counts["tiny"] += 1
        else:
            batch.append(text)
            chars += len(text)
            counts["documents"] += 1
            each[number] += 1
            counts["sentences"] += len(document)
            if chars >= _BATCH_CHARS:
                yield batch
                batch, chars = [], 0
    if batch:
        yield batch


def _facts(folder: Folder, text: str) -> tuple[int, int, int, int]:
    copy, split = folder.hashes(text)
    return copy >> 64, copy & _HALF, split, len(text.encode())
