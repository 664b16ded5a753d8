"""The work that a preparation consists of: pieces named by their content, so that what was done once stays done."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from dsbert.base.durable import checksum
from dsbert.base.errors import UserError
from dsbert.data.preparing import pieces
from dsbert.data.preparing.done_markers import read_marker, write_marker
from dsbert.data.preparing.folders import EMPTY, LeftOut
from dsbert.data.preparing.kinds import separators_of
from dsbert.data.preparing.sources import SourceFile, TextSource
from dsbert.data.preparing.spool import key_of
from dsbert.data.preparing.unpacking import packing

_Item = TypeVar("_Item")
# Small files are looked at together, so that what each task costs does not add up.
_LOOK_BYTES, _FILES = 64 << 20, 256


def cut_files(task: dict[str, Any]) -> dict[str, Any]:
    """Fingerprint files and cut them into pieces. task: files, documents, column, to.

    Its marker holds {found: of each file, in their order, {path, fingerprint, pieces}}. Raises UserError for a file
    that cannot be read.
    """
    return write_marker(task, {"found": [_cut_file(file, task["documents"], task["column"]) for file in task["files"]]})


def _cut_file(values: dict[str, Any], documents: str, column: str) -> dict[str, Any]:
    file = SourceFile.from_json(values)
    if not file.fingerprint:
        try:
            file = replace(file, fingerprint=f"xxh3_128:{checksum(Path(file.path))}")
        except OSError as error:
            raise UserError(f"cannot read {file.path}: {error.strerror}: check the file") from None
    found = [piece.as_json() for piece in pieces.cut(file, documents, column)]
    return {"path": file.path, "fingerprint": file.fingerprint, "pieces": found}


def cut_tasks(sources: Sequence[TextSource], column: str, directory: Path) -> list[dict[str, Any]]:
    """Tasks of some files each, in the order of the sources; weight: their bytes, as far as they are known."""
    tasks = []
    for number, source in enumerate(sources):
        files = [(file, *_size_and_age(file)) for file in source.files]
        for some in _together(files, lambda one: one[1], _LOOK_BYTES):
            as_json = [file.as_json() for file, _, _ in some]
            key = key_of("cut", as_json, source.documents, column, [[size, age] for _, size, age in some])
            tasks.append(
                {
                    "do": "cut",
                    "source": number,
                    "files": as_json,
                    "documents": source.documents,
                    "column": column,
                    "to": str(directory / key),
                    "weight": sum(size or 1 for _, size, _ in some),
                }
            )
    return tasks


def _size_and_age(file: SourceFile) -> tuple[int | None, int]:
    """Of a local file; (None, 0) of what is elsewhere."""
    path = Path(file.path)
    if file.kind == "package" or not path.is_file():
        return None, 0
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def files_by_source(tasks: Sequence[dict[str, Any]], count: int) -> list[list[dict[str, Any]]]:
    """What `cut_files` has found, by the number of the source: its files, in their order."""
    found: list[list[dict[str, Any]]] = [[] for _ in range(count)]
    for task in tasks:
        found[task["source"]] += read_marker(task)["found"]
    return found


def empty_files(files: Sequence[dict[str, Any]]) -> list[LeftOut]:
    """Which of the files of `files_by_source` hold nothing."""
    return [LeftOut(file["path"], EMPTY) for file in files if not file["pieces"]]


def read_tasks(
    sources: Sequence[Sequence[dict[str, Any]]], directory: Path, min_words: int, near: str, normalizer: str
) -> list[dict[str, Any]]:
    """A task per piece, or for some files that are smaller than one, in the order of the documents.

    sources: from `files_by_source`. near: near_duplicates.algorithm(), or "".
    normalizer: the tokenizer's, as JSON.
    """
    from importlib.metadata import version

    tasks = []
    for number, files in enumerate(sources):
        found = [(file["fingerprint"], piece, len(file["pieces"]) == 1) for file in files for piece in file["pieces"]]
        for some in _together(found, lambda one: one[1]["weight"] if one[2] else None, pieces.PIECE_BYTES):
            content = [_content(fingerprint, piece) for fingerprint, piece, _ in some]
            tasks.append(
                {
                    "do": "read",
                    "source": number,
                    "pieces": [piece for _, piece, _ in some],
                    "to": str(directory / key_of("read", content, [min_words, near, normalizer, version("sentencex")])),
                    "min_words": min_words,
                    "near": bool(near),
                    "weight": sum(piece["weight"] for _, piece, _ in some),
                    "normalizer": normalizer,
                }
            )
    return tasks


def _content(fingerprint: str, piece: dict[str, Any]) -> list[Any]:
    file = piece["file"]
    # What of the name decides how the bytes are read.
    named = [packing(file["path"]), separators_of(file["path"])] if file["kind"] in ("text", "json", "csv") else []
    how = [piece["documents"], piece["column"], piece["first"], piece["last"]]
    return [file["kind"], *named, fingerprint, file["shard"], *how]


def _together(items: Sequence[_Item], weight: Callable[[_Item], int | None], most: int) -> Iterator[list[_Item]]:
    """Runs of at most `_FILES` items of at most `most` together; one that is larger, or without a weight, is alone."""
    run: list[_Item] = []
    held = 0
    for item in items:
        own = weight(item)
        if run and (own is None or held + max(1, own) > most or len(run) == _FILES):
            yield run
            run, held = [], 0
        run.append(item)
        held += most if own is None else own
    if run:
        yield run


def source_fingerprint(files: Sequence[dict[str, Any]]) -> str:
    """What tells a source's content from any other: its file's fingerprint, or one over those of its files.

    Files without anything in them do not count.
    """
    prints = [file["fingerprint"] for file in files if file["pieces"]]
    # Not by `key_of`, which changes with the format of what is kept between the passes: this stands in manifests.
    whole = xxhash.xxh3_128_hexdigest(json.dumps([1, prints]).encode())
    return prints[0] if len(prints) == 1 else f"{len(prints)} files: {whole}"
