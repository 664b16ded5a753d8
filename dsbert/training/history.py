"""What the records of a run say about the attempts before: whether a checkpoint was saved, and of what run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from dsbert.base.durable import open_regular, read_regular
from dsbert.base.jsonl import JsonlFile, lines_of, parse_object
from dsbert.base.records import read_record, valid_records
from dsbert.training.attempts import Attempt, Status, StepRecord

_RECORDS = ("config.yaml", "attempt.json", "attempts.jsonl", "status.json", "metrics.jsonl", "masks.jsonl", "wandb_id")
# A run that ends like this has saved its last step.
_SAVED = ("done", "requeue")


def assert_files(run: Path) -> None:
    """Raise OSError if a record is something that reading or writing might wait for."""
    for name in _RECORDS:
        with suppress(FileNotFoundError):
            open_regular(run / name).close()


def saved_before(run: Path) -> str | None:
    """Which record says that a checkpoint was saved, and what it says; None if none does. Damaged records say nothing,
    but where no other tells what became of the steps in the journals, these do. Raises OSError."""
    status = None
    with suppress(FileNotFoundError, ValueError):
        status = read_record(run / "status.json", Status)
    attempts = valid_records(JsonlFile(run / "attempts.jsonl").read(skip_garbled=True), Attempt)
    for told in (_by_status(status) if status else None, *map(_by_attempt, reversed(attempts))):
        if told:
            return told
    every_steps = None
    with suppress(OSError, ValueError, KeyError, TypeError):
        every_steps = int(read_config(run)["recipe"]["checkpoint"]["every_steps"])
    for name in ("metrics.jsonl", "masks.jsonl"):
        step = _last_step(run / name)
        if step and every_steps and step >= 2 * every_steps:  # a save begins when the one before has ended
            return f"{name} reaches step {step} with a checkpoint every {every_steps}"
        if step and not status and not attempts:
            return f"{name} reaches step {step}, and no other record can be read"
    return None


def read_config(run: Path) -> dict[str, Any]:
    """config.yaml. Raises OSError, or ValueError if it is no table."""
    try:
        config = yaml.safe_load(read_regular(run / "config.yaml"))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    if not isinstance(config, dict):
        raise ValueError(f"a {type(config).__name__} instead of a table")
    return config


def _by_status(status: Status) -> str | None:
    if status.saved:
        return f"status.json names {status.saved}"
    if status.outcome in _SAVED and status.step:
        return f"status.json says {status.outcome} at step {status.step}"
    return None


def _by_attempt(attempt: Attempt) -> str | None:
    if attempt.checkpoint:
        return f"attempts.jsonl says that attempt {attempt.number} resumed from {attempt.checkpoint}"
    before = attempt.previous
    if before and before.outcome in _SAVED and before.step:
        return f"attempts.jsonl says {before.outcome} at step {before.step}"
    return None


def _last_step(path: Path) -> int | None:
    """Of the last line of a journal that has one."""
    return max(_steps(path), default=None)


def _steps(path: Path) -> Iterator[int]:
    with suppress(FileNotFoundError), open_regular(path) as file:
        for line in lines_of(file):
            record = parse_object(line) if line.endswith(b"\n") else None
            yield from (valid.step for valid in valid_records([record], StepRecord))
