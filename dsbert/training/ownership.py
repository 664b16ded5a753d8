"""Whether a run is somebody's: an attempt that is at work on it must not lose it to another by mistake."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsbert.base.errors import UserError
from dsbert.base.jsonl import parse_object
from dsbert.cluster.heartbeats import living_rank


def assert_free(run_dir: Path, else_do: str) -> None:
    """Raise UserError if an attempt is at work in the run directory: one whose heartbeats move, whoever started it.

    An earlier start of this very job is none: SLURM has given it up, and it leaves when it sees ours. May take as long
    as a heartbeat does, where the owner cannot be seen from this machine. else_do: what to do if it is to be taken.
    """
    owner = _owner(run_dir)
    if owner is None or _is_before_us(owner):
        return
    rank = living_rank(run_dir / "heartbeats" / str(owner["nonce"]))
    if rank is not None:
        job = f" of job {owner['job_id']}" if owner.get("job_id") else ""
        where = f"rank {rank['rank']} on {rank['host']} (process {rank['pid']}) at step {rank['step']}"
        raise UserError(
            f"expected nobody at work on the run in {run_dir}, found attempt {owner['number']}{job}, {where}: wait for "
            f"its end, stop it, {else_do}"
        )


def _owner(run_dir: Path) -> dict[str, Any] | None:
    with suppress(OSError):
        record = parse_object((run_dir / "attempt.json").read_bytes())
        if record is not None and {"number", "nonce"} <= record.keys():
            return record
    return None


def _is_before_us(owner: dict[str, Any]) -> bool:
    job, restart = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    before = owner.get("restart_count")
    return job is not None and owner.get("job_id") == job and isinstance(before, int) and before < int(restart)
