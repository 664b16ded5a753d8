"""The records of a run directory, read once. Whatever is damaged or not there yet is left out, not complained of: these
files are looked at while others write them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsbert.base.errors import UserError
from dsbert.base.jsonl import JsonlFile
from dsbert.base.records import read_record, valid_records
from dsbert.cluster.heartbeats import SeenBeat, beats_in
from dsbert.training.attempts import Attempt, Status
from dsbert.training.history import read_config

JOBS = "jobs.jsonl"


@dataclass(frozen=True)
class RunFiles:
    """What stands in a run directory.

    attempts: oldest first; beats: of the newest; metrics: the lines of metrics.jsonl, whose fields are as
    training/reporting.py wrote them; saved: the newest published checkpoint and when it was, in seconds since 1970;
    job: the newest that was submitted for the run, and when; now: when all this was read.
    """

    path: Path
    recipe: Mapping[str, Any]
    attempts: list[Attempt]
    status: Status | None
    beats: list[SeenBeat]
    metrics: list[dict[str, Any]]
    saved: tuple[str, float] | None
    job: tuple[str, float] | None
    now: float = field(default_factory=time.time)

    @property
    def total_steps(self) -> int | None:
        """Of the recipe."""
        total = self.recipe.get("optim", {}).get("total_steps")
        return total if isinstance(total, int) else None

    @property
    def attempt(self) -> Attempt | None:
        """The newest."""
        return self.attempts[-1] if self.attempts else None

    @property
    def ended(self) -> Status | None:
        """What the newest attempt has said of its end; None where it has not."""
        status, attempt = self.status, self.attempt
        said = status and attempt and status.outcome is not None and status.attempt == attempt.number
        return status if said else None


def read_files(path: Path) -> RunFiles:
    """Of a run, or of one that a job is to begin. Raises UserError where there is neither."""
    attempts = valid_records(_lines(path / "attempts.jsonl"), Attempt)
    job = _newest_job(path)
    if not attempts and job is None:
        raise UserError(f"expected a run in {path}, found none: name a directory that `dsbert pretrain` writes")
    status, recipe = None, {}
    with suppress(OSError, ValueError):
        status = read_record(path / "status.json", Status)
        if status.time is None:  # of a dsbert that did not write it yet
            status = status.model_copy(update={"time": (path / "status.json").stat().st_mtime})
    with suppress(OSError, ValueError, KeyError, TypeError):
        recipe = dict(read_config(path)["recipe"])
    beats = beats_in(path / "heartbeats" / attempts[-1].nonce) if attempts else []
    metrics = [record for record in _lines(path / "metrics.jsonl") if isinstance(record.get("step"), int)]
    return RunFiles(path, recipe, attempts, status, beats, metrics, _newest_checkpoint(path), job)


def _lines(path: Path) -> list[dict[str, Any]]:
    with suppress(OSError):
        return JsonlFile(path).read(skip_garbled=True)
    return []


def _newest_job(path: Path) -> tuple[str, float] | None:
    for entry in reversed(_lines(path / JOBS)):
        job_id, submitted = entry.get("job_id"), entry.get("submitted")
        if isinstance(job_id, str) and isinstance(submitted, int | float):
            return job_id, float(submitted)
    return None


def _newest_checkpoint(path: Path) -> tuple[str, float] | None:
    """By the names in checkpoints/, of which only whole ones have this form."""
    for checkpoint in sorted((path / "checkpoints").glob("step_" + "[0-9]" * 8), reverse=True):
        with suppress(OSError):
            return checkpoint.name, (checkpoint / "manifest.json").stat().st_mtime
    return None
