"""What the stages of tools/card_suite.py find: a line of JSON each, on disk before the next thing is begun."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """What a stage is given. records: the file of lines. work: a folder that goes with the suite. until: by
    time.monotonic(), when it is ended. text: a folder of text, or of what `dsbert prepare` has made of one."""

    name: str
    records: Path
    work: Path
    until: float
    text: Path | None = None
    dry_run: bool = False

    def left_s(self) -> float:
        """Seconds until this stage is ended."""
        return self.until - time.monotonic()

    def record(self, kind: str, **row: Any) -> None:
        """Write a line down, whole; what is no finite number is null."""
        add(self.records, {"stage": self.name, "kind": kind, **row})


class Skipped(Exception):
    """Raised by a stage that cannot be had here; says why in one line."""


def add(path: Path, record: Record) -> None:
    """Append a line in one write, so that one who is ended meanwhile leaves all of it or nothing."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps(plain).encode() + b"\n")
        os.fsync(file.fileno())


def read(path: Path) -> list[Record]:
    """All lines so far; one that was cut off is passed over."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
