"""The work that a preparation consists of: pieces named by their content, so that what was done once stays done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsbert.data.marks import write_mark
from dsbert.data.pieces import cut
from dsbert.data.sources import SourceFile, TextSource
from dsbert.data.spool import key_of
from dsbert.durable import checksum
from dsbert.errors import UserError


def cut_file(task: dict[str, Any]) -> dict[str, Any]:
    """Fingerprint a file and cut it into pieces. task: file, documents, column, to.

    Its mark holds {fingerprint, pieces}. Raises UserError for a file that cannot be read.
    """
    file = SourceFile.from_json(task["file"])
    if not file.fingerprint:
        try:
            file = replace(file, fingerprint=f"xxh3_128:{checksum(Path(file.path))}")
        except OSError as error:
            raise UserError(f"cannot read {file.path}: {error.strerror}: check the file") from None
    pieces = [piece.as_json() for piece in cut(file, task["documents"], task["column"])]
    return write_mark(task, {"fingerprint": file.fingerprint, "pieces": pieces})


def cut_tasks(sources: Sequence[TextSource], column: str, directory: Path) -> list[dict[str, Any]]:
    """A task per file; weight: its bytes, as far as they are known."""
    tasks = []
    for source in sources:
        for file in source.files:
            path = Path(file.path)
            state = path.stat() if file.kind != "package" and path.is_file() else None
            age = [state.st_size, state.st_mtime_ns] if state else []
            key = key_of("cut", file.as_json(), source.documents, column, age)
            tasks.append(
                {
                    "do": "cut",
                    "file": file.as_json(),
                    "documents": source.documents,
                    "column": column,
                    "to": str(directory / key),
                    "weight": state.st_size if state else 1,
                }
            )
    return tasks


def read_tasks(
    cuts: Sequence[dict[str, Any]], directory: Path, min_words: int, near: str, normalizer: str
) -> list[dict[str, Any]]:
    """A task per piece, in the order of the documents, out of what `cut_file` has written.

    near: near_duplicates.algorithm(), or "". normalizer: the tokenizer's, as JSON.
    """
    from importlib.metadata import version

    tasks = []
    for found in cuts:
        for piece in found["pieces"]:
            file = piece["file"]
            content = [file["kind"], found["fingerprint"], file["shard"], piece["documents"], piece["column"]]
            how = [piece["first"], piece["last"], min_words, near, normalizer, version("sentencex")]
            tasks.append(
                {
                    "do": "read",
                    "piece": piece,
                    "to": str(directory / key_of("read", content, how)),
                    "min_words": min_words,
                    "near": bool(near),
                    "normalizer": normalizer,
                    "weight": piece["weight"],
                }
            )
    return tasks


def source_fingerprint(cuts: Sequence[dict[str, Any]]) -> str:
    """What tells a source's content from any other: its file's fingerprint, or one over those of its files."""
    prints = [found["fingerprint"] for found in cuts]
    return prints[0] if len(prints) == 1 else f"{len(prints)} files: {key_of(prints)}"
