"""Which rows of a source make up a document, before anything is cleaned.

A ROW is a line of a text file, or a string in a table. A grouping says what becomes of rows:

    row         each row is a document
    blank-line  empty rows stand between documents
    rows:N      N rows are a document: for sources of one sentence a row, as BookCorpus is

Rows carry a position (a byte offset or a row number), and a PIECE of a source owns the documents that begin at the
positions [first, last). So any number of workers can read pieces of one file, and each document is read once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dsbert.base.errors import UserError

Row = tuple[int, str]
Paragraphs = list[str]

# A longer document is cut, at the end of a row: memory stays bounded, whatever somebody calls a document.
MAX_DOCUMENT_CHARS = 1 << 23


@dataclass(frozen=True)
class Grouping:
    """kind: "row", "blank-line" or "rows", of `count` rows each."""

    kind: str
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Grouping:
        """Raises UserError for anything but row, blank-line and rows:N."""
        if text in ("row", "blank-line"):
            return cls(text)
        match = re.fullmatch(r"rows:([1-9][0-9]{0,8})", text)
        if match is None:
            raise UserError(f"expected --documents row, blank-line or rows:N, found {text!r}")
        return cls("rows", int(match[1]))

    def __str__(self) -> str:
        return f"rows:{self.count}" if self.kind == "rows" else self.kind

    def documents(self, rows: Iterable[Row], first: int, last: int | None, at_start: bool) -> Iterator[Paragraphs]:
        """The documents that begin at positions [first, last), each as its lines without the empty ones.

        Args:
            rows: from `first` on, or for blank-line from some rows before it, since only they tell whether `first`
                begins a document. Read no further than the last document goes.
            first: for rows:N a row number that N divides.
            last: None for the end of the source.
            at_start: whether `rows` begins where the source does.
        """
        end = float("inf") if last is None else last
        if self.kind == "blank-line":
            groups = _between_blanks(rows, first, end, at_start)
        else:
            groups = _counted(rows, end, self.count)
        for group in groups:
            yield [line for text in group for raw in text.splitlines() if (line := raw.strip())]


def _counted(rows: Iterable[Row], end: float, count: int) -> Iterator[list[str]]:
    group: list[str] = []
    number = chars = 0
    for position, text in rows:
        if position >= end:
            break
        group.append(text)
        number, chars = number + 1, chars + len(text)
        if number == count or chars >= MAX_DOCUMENT_CHARS:
            yield group
            group, number, chars = [], number % count, 0
    if group:
        yield group


def _between_blanks(rows: Iterable[Row], first: int, end: float, at_start: bool) -> Iterator[list[str]]:
    group: list[str] = []
    chars = 0
    begins, ours = at_start, False  # whether the next row that is not empty begins a document; whether we are in ours
    for position, text in rows:
        if not text or text.isspace():
            if group:
                yield group
                group, chars = [], 0
            begins = True
            continue
        if begins:
            if position >= end:
                return
            ours, begins = position >= first, False
        elif not ours and position >= end:
            return
        if ours:
            group.append(text)
            chars += len(text)
            if chars >= MAX_DOCUMENT_CHARS:
                yield group
                group, chars = [], 0
    if group:
        yield group
