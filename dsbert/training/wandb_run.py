"""What W&B is told of a run: who it is and what it was made with, from the run directory alone, so that whoever sends
it, and when, says the same."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsbert.base.durable import read_regular
from dsbert.base.records import read_record
from dsbert.training.attempts import Attempt
from dsbert.training.history import read_config

# wandb's own variables, for what the recipe does not say.
_OF_THE_USER = {
    "name": "WANDB_NAME",
    "entity": "WANDB_ENTITY",
    "group": "WANDB_RUN_GROUP",
    "job_type": "WANDB_JOB_TYPE",
    "notes": "WANDB_NOTES",
}


def describe_run(run_dir: Path) -> dict[str, Any]:
    """The arguments of wandb.init that say which run it is: id, name, project, group and so on, where there is one; and
    config: the recipe, with how and from what it is trained beside it.

    Raises:
        OSError: config.yaml cannot be read, or wandb_id cannot be written.
        ValueError: config.yaml is not what a run writes.
    """
    written = read_config(run_dir)
    recipe = _table(written, "recipe")
    log = _table(recipe, "log")
    found = {"name": Path(os.path.abspath(run_dir)).name}
    found |= {key: os.environ[name] for key, name in _OF_THE_USER.items() if os.environ.get(name)}
    found |= {key: log[f"wandb_{key}"] for key in ("name", "group", "project") if log.get(f"wandb_{key}")}
    run: dict[str, Any] = dict(found)
    if tags := list(filter(None, os.environ.get("WANDB_TAGS", "").split(","))):
        run["tags"] = tags
    return {"id": run_id(run_dir), **run, "config": {**recipe, **_circumstances(run_dir, written)}}


def logs_artifacts(run_dir: Path) -> bool:
    """Whether the recipe asks for checkpoints as artifacts. Raises as `describe_run` does."""
    return bool(_table(_table(read_config(run_dir), "recipe"), "log").get("wandb_artifacts"))


def run_id(run_dir: Path) -> str:
    """The run's id in W&B: kept in wandb_id, drawn on the first call, from no generator that training uses. Raises
    OSError if it cannot be kept."""
    path = run_dir / "wandb_id"
    with suppress(OSError):
        kept = read_regular(path).decode("utf-8", "replace").strip()
        if re.fullmatch(r"[\w-]{1,128}", kept, re.ASCII):
            return kept
    fresh, drawn = path.with_name(f"{path.name}.tmp"), secrets.token_hex(4)
    fresh.write_text(drawn)
    fresh.replace(path)  # also of one that is damaged: W&B goes on as a new run
    return drawn


def _circumstances(run_dir: Path, written: Mapping[str, Any]) -> dict[str, Any]:
    """What is not in the recipe and tells runs of one recipe apart. Of the newest attempt, where it changes."""
    attempt = None
    with suppress(OSError, ValueError):
        attempt = read_record(run_dir / "attempt.json", Attempt)
    return {
        "run_dir": os.path.abspath(run_dir),
        "world_size": attempt.world_size if attempt else None,
        "job_id": attempt.job_id if attempt else None,
        "data_digest": _table(written, "identity").get("data_digest"),
        "git_revision": written.get("git_revision"),
        "versions": _table(written, "versions"),
        "numerics": _table(written, "numerics"),
    }


def _table(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part of config.yaml; empty where an older dsbert has written none. Raises ValueError for anything else."""
    found = values.get(key) or {}
    if not isinstance(found, dict):
        raise ValueError(f"expected a table as {key} in config.yaml, found a {type(found).__name__}")
    return found
