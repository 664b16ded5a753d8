"""Tasks of a preparation, plain JSON values that any worker may be given, and what they end with that is no result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsbert.base.errors import DsbertError, disk_error

Task = dict[str, Any]
"""do: its kind (worker.py); to: where its results go, without suffix; weight: bytes or tokens of work, roughly; and
what its kind wants."""


@dataclass(frozen=True)
class Failure:
    """What a task ended with that is no result. kind: the name of its DsbertError; None for a bug."""

    message: str
    kind: str | None

    def error(self) -> Exception:
        """To be raised where the failure is to be shown."""
        return DsbertError.named(self.kind)(self.message) if self.kind else RuntimeError(self.message)


def failure_of(error: Exception) -> Failure:
    """What to tell of an exception that a task has raised."""
    if isinstance(error, DsbertError):
        return Failure(str(error), type(error).__name__)
    if isinstance(error, OSError):
        return Failure(disk_trouble(error), type(disk_error(error, "")).__name__)
    return Failure(f"{type(error).__name__}: {error}", None)


def disk_trouble(error: OSError) -> str:
    """One line for a disk that is full, or cannot be written."""
    what = error.strerror or str(error) or type(error).__name__
    where = f" {error.filename}" if error.filename else ""
    return (
        f"expected to write to the disk, found: {what}{where}: make room or check it, and run the same command again: "
        "it goes on where it stopped"
    )
