"""The records of a run directory, read once. Whatever is damaged or not there yet is left out, not complained of: these
files are looked at while others write them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from dsbert.base.durable import clock_of
from dsbert.base.errors import UserError
from dsbert.base.jsonl import JsonlFile
from dsbert.base.records import read_record, valid_records
from dsbert.cluster.heartbeats import SeenBeat, beats_in
from dsbert.monitoring.step_records import StepLog, StepSums, is_number
from dsbert.training.attempts import Attempt, Ending, Status
from dsbert.training.history import read_config

JOBS = "jobs.jsonl"
_LAST_TIME = 4e9  # of seconds since 1970


@dataclass(frozen=True)
class RunFiles:
    """What stands in a run directory.

    config: config.yaml; attempts: oldest first; beats: of the newest; metrics: what the lines of metrics.jsonl say that
    count for the newest attempt; saved: the newest published checkpoint and when it was, in seconds since 1970; job:
    the newest that was submitted for the run, and when; coming: ranks that have met and not yet taken the run over;
    closed: heartbeats are there and cannot be read; now: when all this was read, by the clock that dates the files.
    """

    path: Path
    config: Mapping[str, Any]
    attempts: list[Attempt]
    status: Status | None
    beats: list[SeenBeat]
    metrics: StepSums
    saved: tuple[str, float] | None
    job: tuple[str, float] | None
    coming: list[SeenBeat] = field(default_factory=list)
    closed: bool = False
    now: float = field(default_factory=time.time)

    @property
    def recipe(self) -> Mapping[str, Any]:
        """As config.yaml has it; {} where it has none."""
        recipe = self.config.get("recipe")
        return recipe if isinstance(recipe, dict) else {}

    @property
    def name(self) -> str | None:
        """Of the recipe."""
        name = self.recipe.get("name")
        return name if isinstance(name, str) else None

    @property
    def total_steps(self) -> int | None:
        """Of the recipe."""
        optim = self.recipe.get("optim")
        total = optim.get("total_steps") if isinstance(optim, dict) else None
        return total if type(total) is int and 0 < total <= 2**53 else None

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


def read_files(path: Path, log: StepLog | None = None) -> RunFiles:
    """Of a run, or of one that a job is to begin. log: of this run, from the look before. Raises UserError where there
    is neither."""
    # Heartbeats first: who ends while this is read has said so in what is read after them.
    beats_of = {folder.name: beats_in(folder) for folder in _folders(path / "heartbeats")}
    attempts = [_dated(one) for one in valid_records(_lines(path / "attempts.jsonl"), Attempt)]
    job = _newest_job(path)
    newest = attempts[-1] if attempts else None
    coming = [
        seen for nonce, beats in beats_of.items() if all(nonce != one.nonce for one in attempts) for seen in beats
    ]
    if newest is None and job is None and not coming:
        raise UserError(f"expected a run in {path}, found none: name a directory that `dsbert pretrain` writes")
    config: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        config = read_config(path)
    return RunFiles(
        path=path,
        config=config,
        attempts=attempts,
        status=_status(path),
        beats=beats_of.get(newest.nonce, []) if newest else [],
        metrics=(log or StepLog(path)).read(*since(newest)),
        saved=_newest_checkpoint(path),
        job=job,
        coming=coming,
        closed=newest is not None and not beats_of and (path / "heartbeats").exists() and not _listable(path),
        now=clock_of(path),
    )


def first_step(attempt: Attempt | None) -> int:
    """After how many steps an attempt began."""
    return int(attempt.checkpoint.removeprefix("step_")) if attempt and attempt.checkpoint else 0


def since(newest: Attempt | None) -> tuple[int, float]:
    """(after how many steps the newest attempt began, when): which lines of metrics.jsonl count."""
    return first_step(newest), (newest.started if newest else None) or 0.0


def _lines(path: Path) -> list[dict[str, Any]]:
    with suppress(OSError):
        return JsonlFile(path).read(skip_garbled=True)
    return []


def _folders(path: Path) -> list[Path]:
    with suppress(OSError):
        return [folder for folder in path.iterdir() if folder.is_dir()]
    return []


def _listable(path: Path) -> bool:
    with suppress(OSError):
        list((path / "heartbeats").iterdir())
        return True
    return False


def _status(path: Path) -> Status | None:
    with suppress(OSError, ValueError):
        status = read_record(path / "status.json", Status)
        if not _is_time(status.time):  # of a dsbert that did not write it yet
            status = status.model_copy(update={"time": (path / "status.json").stat().st_mtime})
        return status
    return None


def _dated(attempt: Attempt) -> Attempt:
    """Without times that are none."""
    changes: dict[str, Any] = {} if _is_time(attempt.started) else {"started": None}
    if attempt.previous and not _is_time(attempt.previous.time):
        changes["previous"] = Ending(**{**dict(attempt.previous), "time": None})
    return attempt.model_copy(update=changes) if changes else attempt


def _is_time(value: object) -> TypeGuard[float]:
    return is_number(value, _LAST_TIME) and value > 0


def _newest_job(path: Path) -> tuple[str, float] | None:
    for entry in reversed(_lines(path / JOBS)):
        job_id, submitted = entry.get("job_id"), entry.get("submitted")
        if isinstance(job_id, str) and _is_time(submitted):
            return job_id, float(submitted)
    return None


def _newest_checkpoint(path: Path) -> tuple[str, float] | None:
    """By the names in checkpoints/, of which only whole ones have this form."""
    with suppress(OSError):
        for checkpoint in sorted((path / "checkpoints").glob("step_" + "[0-9]" * 8), reverse=True):
            with suppress(OSError):
                return checkpoint.name, (checkpoint / "manifest.json").stat().st_mtime
    return None
