"""What the fault tests saw, as rows of docs/faults.md: tools/fault_table.py runs the tests and prints them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PATH_ENV = "DSBERT_FAULT_ROWS"


class FaultTable:
    """Collects rows, and writes them where the environment says."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def row(
        self, numbers: str, what: str, seconds: float, codes: Sequence[int | str | None], culprit: dict[str, Any] | None
    ) -> dict[str, Any]:
        """A fault that was survived. numbers: as docs/faults.md counts; seconds: until the last survivor had left;
        culprit: its rank, host and step, as far as known; or what was `named`, where that is no rank."""
        found = {"fault": numbers, "what": what, "seconds": round(seconds, 1), "codes": list(codes), "culprit": culprit}
        self._rows.append(found | {"identical": None})
        return self._rows[-1]

    def identical(self, rows: list[dict[str, Any]]) -> None:
        """The final state of the run that had these faults was that of the undisturbed one, bit for bit."""
        for row in rows:
            row["identical"] = True

    def write(self) -> None:
        path = os.environ.get(PATH_ENV)
        if path and self._rows:
            with Path(path).open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in self._rows)
