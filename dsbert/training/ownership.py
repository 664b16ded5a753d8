"""Whether a run is somebody's: an attempt that is at work on it must not lose it to another by mistake."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from dsbert.base.errors import UserError
from dsbert.base.records import read_record
from dsbert.cluster.heartbeats import living_rank
from dsbert.training.attempts import Attempt, slurm_start


def assert_free(run_dir: Path, else_do: str) -> None:
    """Raise UserError if an attempt is at work in the run directory: one whose heartbeats move, whoever started it.

    An earlier start of this very job is none: SLURM or its script has given it up, and it leaves when it sees ours. May
    take as long as a heartbeat does, where the owner cannot be seen from this machine. else_do: what to do if it is to
    be taken.
    """
    owner = _owner(run_dir)
    if owner is None or _is_before_us(owner):
        return
    rank = living_rank(run_dir / "heartbeats" / owner.nonce)
    if rank is not None:
        job = f" of job {owner.job}" if owner.job else ""
        where = f"rank {rank.rank} on {rank.host} (process {rank.pid}) at step {rank.step}"
        raise UserError(
            f"expected nobody at work on the run in {run_dir}, found attempt {owner.number}{job}, {where}: wait for "
            f"its end, stop it, {else_do}"
        )


def _owner(run_dir: Path) -> Attempt | None:
    with suppress(OSError, ValueError):
        return read_record(run_dir / "attempt.json", Attempt)
    return None


def _is_before_us(owner: Attempt) -> bool:
    job, before = os.environ.get("SLURM_JOB_ID"), owner.slurm_start
    return job is not None and owner.job_id == job and before is not None and before < slurm_start()
