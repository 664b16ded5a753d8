"""metrics.jsonl, which has a million lines in a long run: as sums, read on from where they were left, or as columns."""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeGuard

from dsbert.base.durable import open_regular
from dsbert.base.jsonl import lines_of, parse_object

METRICS = "metrics.jsonl"
_LARGEST = 1e30  # FLOPs reach 1e24, everything else far less
_RECENT = 20
# Ours has thirty fields; of a stranger's file no line may bring one of its own.
_MOST_COLUMNS = 200


class StepSums:
    """What the lines that count say together, in little memory.

    losses: of each line that has one. val_loss: held-out MLM loss, of the newest evaluation. skipped: steps.
    steps_s, evaluation_s, saves_s: seconds.
    """

    def __init__(self) -> None:
        self.losses: array[float] = array("d")
        self.val_loss: float | None = None
        self.skipped = 0
        self.steps_s = self.evaluation_s = self.saves_s = 0.0
        self._recent: deque[dict[str, Any]] = deque(maxlen=_RECENT)

    @property
    def recent(self) -> list[dict[str, float]]:
        """The newest lines, oldest first; only fields that are numbers."""
        return [{key: value for key, value in one.items() if is_number(value)} for one in self._recent]

    @property
    def last(self) -> dict[str, float]:
        """The newest line; {} where there is none."""
        return self.recent[-1] if self._recent else {}

    @property
    def words(self) -> dict[str, str]:
        """The fields of the newest line that are text."""
        newest = self._recent[-1] if self._recent else {}
        return {key: value for key, value in newest.items() if isinstance(value, str)}

    def add(self, record: dict[str, Any]) -> None:
        """The next line. record: with a valid step."""
        before = self._recent[-1]["step"] if self._recent else 0
        self._recent.append(record)
        if is_number(loss := record.get("loss")):
            self.losses.append(loss)
        if is_number(loss := record.get("val_mlm_loss")):
            self.val_loss = float(loss)
        self.skipped += int(_positive(record, "skipped"))
        self.steps_s += _positive(record, "step_s") * (record["step"] - before)
        self.evaluation_s += _positive(record, "validation_s")
        self.saves_s += _positive(record, "save_s")


class StepLog:
    """metrics.jsonl of a run, looked at again and again: what was read before is not read again.

    began, started: after how many steps the newest attempt began, and when. Lines beyond that which are older are left
    out: the attempt has not cut them off yet.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / METRICS
        self._of, self._sums = (0, 0.0), StepSums()
        self._offset, self._last_line = 0, b""

    def read(self, began: int, started: float) -> StepSums:
        """Of all lines that count now. A file that cannot be read has none."""
        if self._of != (began, started):
            self._forget((began, started))
        try:
            with open_regular(self._path) as file:
                if not self._goes_on(file):
                    self._forget(self._of)
                file.seek(self._offset)
                for line in lines_of(file):
                    if not line.endswith(b"\n"):
                        break
                    self._offset, self._last_line = self._offset + len(line), line
                    if record := _record(line, began, started):
                        self._sums.add(record)
        except OSError:
            self._forget(self._of)
        return self._sums

    def _forget(self, of: tuple[int, float]) -> None:
        self._of, self._sums, self._offset, self._last_line = of, StepSums(), 0, b""

    def _goes_on(self, file: IO[bytes]) -> bool:
        """Whether what was read last stands where it stood: a resumed run cuts lines off, and the clock that is in each
        makes those that follow others."""
        file.seek(self._offset - len(self._last_line))
        return file.read(len(self._last_line)) == self._last_line


def read_columns(run: Path, began: int, started: float) -> dict[str, array[float]]:
    """By field, a number for each line of metrics.jsonl that counts, as `StepLog` says, NaN where it has none; {} where
    there are no lines."""
    columns: dict[str, array[float]] = {}
    count = 0
    with suppress(OSError), open_regular(run / METRICS) as file:
        for record in _records(file, began, started):
            for key, value in record.items():
                if value is not None and not is_number(value):
                    continue
                if key not in columns and len(columns) < _MOST_COLUMNS:
                    columns[key] = array("d", [math.nan]) * count
                if key in columns:
                    columns[key].append(math.nan if value is None else value)
            count += 1
            for column in columns.values():
                if len(column) < count:
                    column.append(math.nan)
    return columns


def is_number(value: object, most: float = _LARGEST) -> TypeGuard[float]:
    """Finite, no truth value, and no larger than anything of ours."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -most <= value <= most


def _records(file: IO[bytes], began: int, started: float) -> Iterator[dict[str, Any]]:
    for line in lines_of(file):
        if not line.endswith(b"\n"):
            return
        if record := _record(line, began, started):
            yield record


def _record(line: bytes, began: int, started: float) -> dict[str, Any] | None:
    """The line's object, if it counts."""
    record = parse_object(line)
    if record is None or type(step := record.get("step")) is not int or not 0 < step <= 2**53:
        return None
    time = record.get("time")
    return record if step <= began or not is_number(time) or time >= started else None


def _positive(record: dict[str, Any], key: str) -> float:
    value = record.get(key)
    return max(0.0, float(value)) if is_number(value) else 0.0
