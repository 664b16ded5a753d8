"""Pieces of sources: what one worker reads in about a second, and which anybody may read at any time.

A piece is the documents that begin in a range of a file; grouping.py says why they never overlap. Where a file is cut
follows from its size and metadata alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsbert.data.preparing.grouping import Grouping, Paragraphs
from dsbert.data.preparing.lines import LOOKBACK_BYTES, PACKED_RATIO, Lines
from dsbert.data.preparing.parsing import CsvTable, json_rows
from dsbert.data.preparing.sources import SourceFile
from dsbert.data.preparing.tables import parquet_rows, row_groups, shard_rows, sotu_rows
from dsbert.data.preparing.unpacking import packing

PIECE_BYTES = 8 << 20
_LINE_BYTES = 64  # what a line of a source of sentences takes, for cutting it by lines; only a guess


@dataclass(frozen=True)
class Piece:
    """The documents of `file` that begin at [first, last): bytes of unpacked text, or rows; last None: to the end.

    weight: how much work it is: bytes of text, roughly.
    """

    file: SourceFile
    documents: str
    column: str
    first: int
    last: int | None
    weight: int

    def as_json(self) -> dict[str, Any]:
        """As plain JSON values, which `from_json` takes."""
        return {**vars(self), "file": self.file.as_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Piece:
        """What `as_json` gave."""
        return cls(**{**values, "file": SourceFile.from_json(values["file"])})


def cut(file: SourceFile, documents: str, column: str) -> list[Piece]:
    """The pieces of a file, in order; none of a file without a byte, or without a row.

    Raises UserError if it cannot be opened, or is a table without the column.
    """
    grouping = Grouping.parse(documents)
    if file.kind in ("text", "json", "csv"):
        size = os.stat(file.path).st_size
        if not size:
            return []
        size *= PACKED_RATIO if packing(file.path) else 1
        step = PIECE_BYTES
        if file.kind == "csv" and grouping.kind != "row":
            step = size  # where its n-th row begins, or an empty one stands, no line of it tells
        elif grouping.kind == "rows":
            step = grouping.count * max(1, PIECE_BYTES // (_LINE_BYTES * grouping.count))
            size //= _LINE_BYTES
        edges = list(range(0, max(1, size), step))
        weight = max(1, min(size, step)) * (_LINE_BYTES if grouping.kind == "rows" and file.kind != "csv" else 1)
    elif file.kind == "parquet":
        edges, weight = row_groups(file.path, column, grouping.count, PIECE_BYTES)
    else:
        edges, weight = [0], PIECE_BYTES
    ends = [*edges[1:], None]
    return [Piece(file, documents, column, first, last, weight) for first, last in zip(edges, ends, strict=False)]


def read(piece: Piece) -> Iterator[Paragraphs]:
    """The piece's documents, each as its lines without the empty ones; some may have none.

    Raises UserError, naming file and place, for what cannot be read or decoded.
    """
    grouping = Grouping.parse(piece.documents)
    at_start = piece.first == 0
    path, column = piece.file.path, piece.column
    if piece.file.kind == "csv":
        rows = _opened(path).table(column).from_offset(piece.first)
    elif piece.file.kind in ("text", "json"):
        lines = _opened(path).lines
        if grouping.kind == "rows":
            rows = lines.from_line(piece.first)
        else:
            # For blank-line with a whole row before it, however long that is.
            looks_back = grouping.kind == "blank-line"
            start = lines.line_at(max(0, piece.first - LOOKBACK_BYTES)) if looks_back else piece.first
            rows = lines.from_offset(start)
            at_start = start == 0
        if piece.file.kind == "json":
            line_of = (lambda number: number + 1) if grouping.kind == "rows" else lines.number_of
            rows = json_rows(rows, path, column, line_of)
    elif piece.file.kind == "parquet":
        back = 1 if grouping.kind == "blank-line" and piece.first else 0
        rows = parquet_rows(path, column, piece.first - back)
    elif piece.file.kind == "package":
        rows = sotu_rows()
    else:
        rows = shard_rows(path, piece.file.shard, column)
    return grouping.documents(rows, piece.first, piece.last, at_start)


class _Opened:
    """A file of lines that is being read."""

    def __init__(self, path: str) -> None:
        self.lines = Lines(Path(path))
        self._tables: dict[str, CsvTable] = {}

    def table(self, column: str) -> CsvTable:
        """Its rows, as a CSV file."""
        return self._tables.setdefault(column, CsvTable(self.lines, column))


_last: dict[tuple[str, int, int], _Opened] = {}


def _opened(path: str) -> _Opened:
    """The last one is kept open: the next piece of a packed file goes on where this one ended."""
    state = os.stat(path)
    key = (path, state.st_ino, state.st_mtime_ns)
    if key not in _last:
        while _last:
            _last.popitem()[1].lines.close()
        _last[key] = _Opened(path)
    return _last[key]
