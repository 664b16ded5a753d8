"""Lines of a text file at any offset of its unpacked text: plain, .gz, .xz, .zst or .bz2.

A packed file cannot be entered in its middle. It is read forward, and the last megabytes stay in memory, so that going
on where one stood costs nothing: a worker reads a file's pieces in rising order, and unpacks it once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

from dsbert.base.errors import UserError
from dsbert.data.preparing.grouping import Row
from dsbert.data.preparing.kinds import disguised
from dsbert.data.preparing.unpacking import ERRORS, open_packed, packing

# How much longer than the file its text may be; only a guess: the last piece of a file goes to the text's end.
PACKED_RATIO = 6
LOOKBACK_BYTES = 1 << 16

_BLOCK_BYTES = 1 << 20
_KEPT_BLOCKS = 16
_MAX_LINE_BYTES = 1 << 25
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Lines:
    """One file. `path` may be packed; offsets count bytes of the unpacked text."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if the file cannot be opened."""
        self.path = path
        self._packed = bool(packing(path))
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._line_starts = {0: 0}  # of the first line and of another one: where they begin
        self._file, self._next = self._open(), 0

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def from_offset(self, offset: int) -> Iterator[Row]:
        """(offset, text) of the lines that begin at `offset` or later, without line ends.

        Raises UserError, naming the file and the place, for what cannot be unpacked or is not UTF-8.
        """
        skip = offset > 0  # the rest of the line before: nothing but its end, where a line begins at `offset`
        for start, lines in self._raw(max(0, offset - 1)):
            if skip and lines:
                start += len(lines.pop(0)) + 1
                skip = False
            yield from self._texts(start, lines)

    def line_at(self, offset: int) -> int:
        """Where the line begins that the byte at `offset` belongs to; of a line that is too long, a place in it.

        Raises as `from_offset` does.
        """
        index, end = divmod(offset, _BLOCK_BYTES)
        while index >= 0 and index * _BLOCK_BYTES + _MAX_LINE_BYTES >= offset:
            found = self._block(index).rfind(b"\n", 0, end)
            if found >= 0:
                return index * _BLOCK_BYTES + found + 1
            index, end = index - 1, _BLOCK_BYTES
        return max(0, (index + 1) * _BLOCK_BYTES)

    def number_of(self, offset: int) -> int:
        """The number, from 1, of the line that begins at `offset`. Raises as `from_offset` does."""
        index, end = divmod(offset, _BLOCK_BYTES)
        whole = sum(self._block(number).count(b"\n") for number in range(index))
        return 1 + whole + self._block(index).count(b"\n", 0, end)

    def from_line(self, number: int) -> Iterator[Row]:
        """(line number, text) from line `number` on, counted from 0. Raises as `from_offset` does."""
        start = self._start_of(number)
        if start is None:
            return
        for offset, lines in self._raw(start):
            self._line_starts = {0: 0, number: offset}
            for _, text in self._texts(offset, lines):
                yield number, text
                number += 1

    def _raw(self, offset: int) -> Iterator[tuple[int, list[bytes]]]:
        """(offset of the first, lines), block by block."""
        index, skip = divmod(offset, _BLOCK_BYTES)
        rest = b""
        while block := self._block(index):
            *lines, rest = (rest + block[skip:]).split(b"\n")
            begins, offset = offset, offset + sum(map(len, lines)) + len(lines)
            yield begins, lines
            if len(rest) > _MAX_LINE_BYTES:
                raise UserError(
                    f"expected lines of at most {_MAX_LINE_BYTES >> 20} MiB in {self.path}, found a longer one at byte "
                    f"{offset}: break it up, or leave the file out"
                )
            index, skip = index + 1, 0
        if rest:
            yield offset, [rest]

    def _texts(self, offset: int, lines: list[bytes]) -> Iterator[Row]:
        if not offset and lines:
            if kind := disguised(lines[0]):
                raise UserError(
                    f"expected UTF-8 text, {self.path} is not UTF-8 text at byte 0, but {kind} by its content: convert "
                    "or unpack it, give it the name of what it is, or leave the file out"
                )
            lines[0] = lines[0].removeprefix(_BYTE_ORDER_MARK)
        data = b"\n".join(lines)
        if (nul := data.find(b"\0")) >= 0:
            raise UserError(
                f"expected UTF-8 text, {self.path} is not UTF-8 text at byte {offset + nul} (a byte of value 0, as in "
                "binary files and UTF-16): convert it, e.g. with iconv, or leave the file out"
            )
        try:
            texts = data.decode().split("\n") if lines else []
        except UnicodeDecodeError as error:
            place = error.start
            raise UserError(
                f"expected UTF-8 text, {self.path} is not UTF-8 text at byte {offset + place} "
                f"({error.reason} {error.object[place]:#04x}): convert it, e.g. with iconv, or leave the file out"
            ) from None
        # `accumulate` gives the offset of the line after the last one as well.
        starts = accumulate((len(line) + 1 for line in lines), initial=offset)
        yield from zip(starts, texts, strict=False)

    def _start_of(self, number: int) -> int | None:
        """Where a line begins; None beyond the last one."""
        known = max(line for line in self._line_starts if line <= number)
        offset, missing = self._line_starts[known], number - known
        index, skip = divmod(offset, _BLOCK_BYTES)
        while missing and (block := self._block(index)):
            ends = block.count(b"\n", skip)
            if ends >= missing:
                for _ in range(missing):
                    skip = block.index(b"\n", skip) + 1
                missing = 0
                break
            missing -= ends
            index, skip = index + 1, 0
        if missing:
            return None
        start = index * _BLOCK_BYTES + skip
        self._line_starts = {0: 0, number: start}
        return start

    def _block(self, index: int) -> bytes:
        """The block of that number, empty beyond the end."""
        if not self._packed:
            return self._read(lambda: self._pread(index))
        if index in self._blocks:
            return self._blocks[index]
        if index < self._next:
            self.close()
            self._blocks.clear()
            self._file, self._next = self._open(), 0
        while self._next <= index:
            block = self._read(lambda: _read_fully(self._file, _BLOCK_BYTES))
            if not block:
                return b""
            self._blocks[self._next] = block
            self._next += 1
            if len(self._blocks) > _KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        return self._blocks[index]

    def _pread(self, index: int) -> bytes:
        self._file.seek(index * _BLOCK_BYTES)
        return _read_fully(self._file, _BLOCK_BYTES)

    def _read(self, read: Any) -> bytes:
        try:
            data: bytes = read()
        except ERRORS as error:
            raise UserError(
                f"cannot read {self.path}: {' '.join(str(error).split())}: expected a whole file, check it and fetch "
                "it again"
            ) from None
        return data

    def _open(self) -> IO[bytes]:
        try:
            return open_packed(self.path) if self._packed else self.path.open("rb")
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}: check the path") from None


def _read_fully(file: IO[bytes], size: int) -> bytes:
    """`size` bytes, fewer only at the end."""
    data = file.read(size)
    while 0 < len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data
