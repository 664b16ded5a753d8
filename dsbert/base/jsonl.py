"""Journals: files of JSON objects, one per line, that are cut back on resume, so that each step stands once.

Also the one way in which dsbert writes JSON: strict, with null for NaN and infinities.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from dsbert.base.durable import open_regular

# A line that is longer is damage; those of mask updates at block size 1 are the longest.
_MAX_LINE_BYTES = 1 << 30
# How much of a file's end is looked at in one piece for its last newline.
_TAIL_BYTES = 1 << 16


def to_json(value: Any) -> str:
    """`value` as one line of strict JSON: NaN and infinities become null, numpy and torch scalars plain numbers.

    Raises:
        TypeError: something in it has no JSON form.
    """
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    """`value` built from what JSON knows."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays, without importing either
        return _plain(value.tolist())
    return value


class JsonlFile:
    """A journal of JSON objects, one per line, whose field "step" never falls.

    A line counts once its newline is written: what a crash has left after the last newline is dropped when the file
    is next opened for writing, and not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line, and hand it to the operating system before returning.

        Raises:
            OSError: the file cannot be written.
            TypeError: the record has no JSON form.
        """
        line = to_json(record).encode() + b"\n"
        if self._file is None:
            self._drop_torn_line()
            self._file = self.path.open("ab")
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            self.close()  # part of the line may stand there: the next append drops it
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def sync(self) -> None:
        """Have what was appended survive a power cut, too: for use before a checkpoint that relies on it.

        Raises:
            OSError: the disk refuses.
        """
        if self._file is not None:
            os.fsync(self._file.fileno())

    def read(self, *, skip_garbled: bool = False) -> list[dict[str, Any]]:
        """All records, in order; none where there is no file.

        Args:
            skip_garbled: leave out what is no JSON object, as a power cut may leave it, instead of raising.

        Raises:
            OSError: the file cannot be read, or is none.
            ValueError: a line is not a JSON object.
        """
        if not self.path.exists():
            return []
        records = []
        with open_regular(self.path) as file:
            for number, line in enumerate(lines_of(file), start=1):
                if not line.endswith(b"\n"):
                    break
                record = parse_object(line)
                if record is not None:
                    records.append(record)
                elif not skip_garbled:
                    raise ValueError(f"{self.path}, line {number}: expected a JSON object, got {line[:80]!r}")
        return records

    def cut_back(self, step: int, attempt: int) -> int:
        """Move the lines beyond `step` to <name>.<attempt>.jsonl, where this file is <name>.jsonl.

        The copy is on disk before the original is cut, so a crash in between loses nothing. A last line that is no
        JSON, as a power cut may leave it, is moved too.

        Returns:
            The number of lines moved.

        Raises:
            OSError: the copy cannot be written; the file is then as it was.
        """
        self.close()
        if not self.path.exists():
            return 0
        self._drop_torn_line()
        with _open_for_cutting(self.path) as file:
            starts = _line_starts(file)
            keep = len(starts)
            # From the end: lines can be large, and few of them lie beyond a checkpoint.
            while keep and _is_beyond(file, starts[keep - 1], step):
                keep -= 1
            if keep < len(starts):
                file.seek(starts[keep])
                with self.path.with_suffix(f".{attempt}{self.path.suffix}").open("ab") as aside:
                    shutil.copyfileobj(file, aside)
                    aside.flush()
                    os.fsync(aside.fileno())
                file.truncate(starts[keep])
        return len(starts) - keep

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._file is not None:
            file, self._file = self._file, None
            with suppress(OSError):  # what a full disk has not taken was reported by `append`
                file.close()

    def _drop_torn_line(self) -> None:
        """Cut off what follows the last newline, looking from the end."""
        if not self.path.exists():
            return
        with _open_for_cutting(self.path) as file:
            end = position = file.seek(0, os.SEEK_END)
            whole = 0
            while position and not whole:
                start = max(0, position - _TAIL_BYTES)
                file.seek(start)
                whole = start + file.read(position - start).rfind(b"\n") + 1
                whole, position = (whole, start) if whole > start else (0, start)
            if whole < end:
                file.truncate(whole)


def lines_of(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file, of which none fills the memory: what is longer than any of ours comes in pieces."""
    while line := file.readline(_MAX_LINE_BYTES):
        yield line


def parse_object(text: bytes) -> dict[str, Any] | None:
    """The JSON object that a line or a file holds, or None."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _line_starts(file: IO[bytes]) -> list[int]:
    """The offset of each line's first byte."""
    starts = []
    offset = 0
    for line in lines_of(file):
        starts.append(offset)
        offset += len(line)
    return starts


def _is_beyond(file: IO[bytes], start: int, step: int) -> bool:
    """Whether the line at `start` belongs to a later step, or to none that can be read."""
    file.seek(start)
    record = parse_object(file.readline(_MAX_LINE_BYTES)) or {"step": None}
    found = record.get("step", step)
    return not isinstance(found, int) or found > step


def _open_for_cutting(path: Path) -> IO[bytes]:
    open_regular(path).close()  # or opening it might wait for ever
    return path.open("r+b")


class Difference(NamedTuple):
    """An entry, by its dotted key, in which two nested values differ; None where one has none."""

    key: str
    before: Any
    after: Any


def value_differences(before: Any, after: Any, key: str = "") -> Iterator[Difference]:
    """Every entry in which two nested values differ, in the order of `before`, then of `after`."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in [*before, *(name for name in after if name not in before)]:
            yield from value_differences(before.get(name), after.get(name), f"{key}.{name}" if key else name)
    elif before != after:
        yield Difference(key, before, after)


def first_difference(before: Any, after: Any) -> Difference | None:
    """The first of `value_differences`."""
    return next(value_differences(before, after), None)
