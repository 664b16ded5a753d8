"""The text of each row of JSON lines and of CSV, out of the lines of a file. What is no such row is refused with its
place, and so is what is no text: to guess what a number or a list stands for would make other text of it.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from dsbert.base.errors import UserError
from dsbert.data.preparing.grouping import MAX_DOCUMENT_CHARS, Row
from dsbert.data.preparing.kinds import separators_of
from dsbert.data.preparing.lines import Lines

_HALF_ESCAPED, _HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]"), re.compile("[\ud800-\udfff]")


def json_rows(rows: Iterator[Row], path: str, column: str, line_of: Callable[[int], int]) -> Iterator[Row]:
    """(position, text) of lines that hold a JSON object each. line_of(position): the line's number, for messages.

    Raises UserError.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs) and sum(name == column for name, _ in pairs) > 1:
            raise ValueError(f"the column {column!r} twice")
        return found

    decode = json.JSONDecoder(object_pairs_hook=once).decode
    for position, line in rows:
        if not line or line.isspace():
            continue
        try:
            value = decode(line)
        except (ValueError, RecursionError) as error:
            found = "lists in lists, too deep to read" if isinstance(error, RecursionError) else str(error)[:200]
            raise UserError(
                f"expected one JSON object a line in {path}, found at line {line_of(position)}: {found}: convert it, "
                "e.g. with jq -c"
            ) from None
        if not isinstance(value, dict):
            raise UserError(
                f"expected one JSON object a line in {path}, found at line {line_of(position)}: "
                f"{type(value).__name__}: convert it, e.g. with jq -c '.[]'"
            )
        if column not in value:
            raise UserError(
                f"expected a column {column!r} in {path}, found at line {line_of(position)}: "
                f"{', '.join(value)[:200] or 'none'}: give --text-column"
            )
        text = value[column]
        if text is not None and not isinstance(text, str):
            raise no_text(text, path, column, f"line {line_of(position)}")
        # Half a character is an escape in JSON, and no text.
        yield position, _HALF_CHARACTER.sub("\ufffd", text or "") if _HALF_ESCAPED.search(line) else text or ""


def no_text(value: Any, path: str, column: str, place: str) -> UserError:
    """To raise of a row whose column holds something else. place: which row, in words."""
    return UserError(
        f"expected text in column {column!r} of {path}, found {type(value).__name__} at {place}: make it text, or give "
        "another --text-column"
    )


class CsvTable:
    """The rows of a CSV file (RFC 4180, a header first) that begin at any offset.

    A quoted value may hold line ends, so that only who has read all before it knows where a row begins. The file is
    parsed from its start, and gone on with where the last call ended.
    """

    def __init__(self, lines: Lines, column: str) -> None:
        self._lines, self._column = lines, column
        self._rows: Iterator[Row] | None = None
        self._last: Row | None = None
        self._before = -1  # where the row before the last one began

    def from_offset(self, offset: int) -> Iterator[Row]:
        """(offset, text) of the rows that begin at `offset` or later. Raises UserError, naming file and line."""
        if self._rows is None or offset <= self._before:
            self._rows, self._last, self._before = self._parsed(), None, -1
        while True:
            if self._last is not None and self._last[0] >= offset:
                yield self._last
            try:
                row = next(self._rows, None)
            except UserError:
                self._rows = None  # or the next call would take this for the end
                raise
            if row is None:
                return
            self._before, self._last = self._last[0] if self._last else -1, row

    def _parsed(self) -> Iterator[Row]:
        rows, header = self._header()
        at = header.index(self._column)
        tabs = separators_of(self._lines.path) == "\t"
        for position, number, row in rows:
            if tabs and any("\n" in value and "\t" in value for value in row):
                raise UserError(
                    f"expected a row a line in {self._lines.path}, found one that ends at line {number}, with line "
                    "ends and tabs in quotes, which may be no more than characters: convert it, e.g. to JSON lines"
                )
            if len(row) != len(header):
                raise UserError(
                    f"expected {len(header)} columns in each row of {self._lines.path}, found {len(row)} at line "
                    f"{number}: put quotes around text that holds separators or line ends"
                )
            yield position, row[at]

    def _header(self) -> tuple[Iterator[tuple[int, int, list[str]]], list[str]]:
        """The rows after the header, and the names in it, by the separator that tells the column."""
        names: list[str] = []
        wrong = None
        for separator in separators_of(self._lines.path):
            rows = self._split(separator)
            try:
                first = next(rows, None)
            except UserError as error:  # another separator may take it apart
                wrong = wrong or error
                continue
            if first is None:
                return rows, [self._column]  # a file without a line is one without a row
            header = [name.strip() for name in first[2]]
            if header.count(self._column) == 1:
                return rows, header
            names = max(names, header, key=len)
        if wrong is not None:
            raise wrong
        found = f"{names.count(self._column)} of them" if self._column in names else ", ".join(names)[:200]
        raise UserError(
            f"expected a column {self._column!r} in the first line of {self._lines.path}, found {found}: give "
            "--text-column"
        )

    def _split(self, separator: str) -> Iterator[tuple[int, int, list[str]]]:
        """(offset, number of its last line, columns) of all rows but empty lines."""
        begins: list[int] = []

        def fed() -> Iterator[str]:
            for offset, line in self._lines.from_offset(0):
                begins.append(offset)
                yield line + "\n"

        csv.field_size_limit(MAX_DOCUMENT_CHARS)
        reader = csv.reader(fed(), delimiter=separator, skipinitialspace=True, strict=True)
        while True:
            begins.clear()
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise UserError(
                    f"expected a table with quotes as CSV has them in {self._lines.path}, found at line "
                    f"{reader.line_num}: {error}: convert it, e.g. to JSON lines"
                ) from None
            if row is None:
                return
            if row and (len(row) > 1 or row[0].strip()):
                yield begins[0], reader.line_num, row
