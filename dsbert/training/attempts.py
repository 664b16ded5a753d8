"""The records of a run, as its files say them: who is at work on it, how attempts ended, and each step and update."""

from __future__ import annotations

import os

from pydantic import Field

from dsbert.base.records import CheckpointName, Count, Digest, Number, NumRanks, Record, Word
from dsbert.cluster.heartbeats import Culprit

START_ENV = "DSBERT_START"  # slurm/job.sh sets it


class CulpritRecord(Record):
    """The rank at fault, where it was seen last, and its exit code where it has left by itself. Whatever an older
    dsbert has written here holds nobody up."""

    rank: Count
    host: str
    step: Count | None
    phase: str | None = None
    code: Count | None = None

    @classmethod
    def of(cls, culprit: Culprit) -> CulpritRecord:
        """Of the rank that the heartbeats accuse."""
        return cls(
            rank=culprit.rank, host=culprit.host, step=culprit.step, phase=culprit.phase, code=culprit.code
        )  # fmt: skip


class Ending(Record):
    """How an attempt ended: done | requeue | failed; outcome None where it has not said so. time: when, or when its
    ranks were seen last, in seconds since 1970."""

    outcome: str | None = None
    step: Count | None = None
    cause: str | None = None
    culprit: CulpritRecord | None = None
    time: float | None = None


class Attempt(Record):
    """attempt.json, the owner of the run, and the lines of attempts.jsonl.

    nonce: drawn at every start; job_id: SLURM's, of an array's task its own; array_task: the same as squeue and sbatch
    call it, ARRAY_TASK; restart_count: SLURM's, of starts through the queue; start: the job script's, of those inside
    one allocation; checkpoint: what it goes on from; started: seconds since 1970; previous: how the attempt before it
    ended, where that is known.
    """

    number: Number
    nonce: Word
    job_id: str | None = None
    array_task: str | None = None
    restart_count: Count | None = None
    start: Count | None = None
    started: float | None = None
    world_size: NumRanks | None = None
    checkpoint: CheckpointName | None = None
    previous: Ending | None = None

    @property
    def slurm_start(self) -> tuple[int, int] | None:
        """As `slurm_start()` of its ranks; None where that is not known."""
        return None if self.restart_count is None else (self.restart_count, self.start or 0)

    @property
    def job(self) -> str | None:
        """As people know it, and jobs.jsonl."""
        return self.array_task or self.job_id


def slurm_array_task() -> str | None:
    """Which task of an array this job is, by the name that squeue has for it; None where it is none."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else None


def slurm_start() -> tuple[int, int]:
    """Which start of its job this is: how often SLURM has requeued it, and how often the job script has started ranks
    again inside the allocation, when all that it had started before was over for it."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0), int(os.environ.get(START_ENV) or 0)


class Status(Record):
    """status.json: how the last attempt ended, outcome None while it goes on. saved: the newest checkpoint that it
    knows of. time: when this was written, in seconds since 1970."""

    attempt: Number
    job_id: str | None = None
    restart_count: Count | None = None
    start: Count | None = None
    outcome: str | None
    step: Count | None
    cause: str | None
    culprit: CulpritRecord | None
    saved: CheckpointName | None = None
    time: float | None = None

    @property
    def ending(self) -> Ending:
        """What the next attempt says of this one."""
        return Ending(outcome=self.outcome, step=self.step, cause=self.cause, culprit=self.culprit, time=self.time)


class StepRecord(Record):
    """The lines of metrics.jsonl."""

    step: Number


class UpdateRecord(Record):
    """The lines of masks.jsonl. Coordinates are lists, or packed (sparse/journal.py); norms: by layer and group of
    blocks, in the order of `update_norms.SUMMARY`; older journals have none."""

    step: Number
    update: Number
    digest: Digest
    pruned: Count
    layers: dict[str, dict[str, list[Count] | str]]
    norms: dict[str, dict[str, list[float]]] = Field(default_factory=dict)
