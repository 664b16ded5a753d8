"""Which jobs are on a run, and handing one more to SLURM. RUN/jobs.jsonl has a line per job that was submitted."""

from __future__ import annotations

import itertools
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dsbert.base.errors import UserError
from dsbert.base.jsonl import JsonlFile
from dsbert.config.recipe import Recipe
from dsbert.training.ownership import assert_free
from dsbert.training.preflight import assert_data, assert_identity, assert_whole, assert_writable

T = TypeVar("T")
_JOBS = "jobs.jsonl"
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class TaskRun:
    """What a job, or one task of an array (with its number), is to do in a run directory."""

    recipe: Recipe
    task: int | None = None

    def job_id(self, job_id: str) -> str:
        """As SLURM calls it."""
        return job_id if self.task is None else f"{job_id}_{self.task}"


@dataclass(frozen=True)
class Finding:
    """A check of `look_at`, and what is wrong; None where nothing is."""

    about: str
    error: UserError | None


@dataclass(frozen=True)
class Readiness:
    """Whether a job can begin in a run directory. jobs: ids of those that are queued or at work on the run."""

    findings: tuple[Finding, ...]
    jobs: tuple[str, ...]


def look_at(run_dir: Path, run: TaskRun, *, after: bool = False, data_is_made: bool = True) -> Readiness:
    """All that the nodes would refuse hours later, and whether the run is somebody's; `dsbert plan` shows it, and
    `dsbert submit` refuses.

    after: whether the job may wait for others that are on the run. data_is_made: else an earlier job may be to make it.
    """
    findings: list[Finding] = []

    def check(about: str, work: Callable[[], T]) -> T | None:
        try:
            found = work()
        except UserError as error:
            findings.append(Finding(about, error))
            return None
        findings.append(Finding(about, None))
        return found

    manifest = check("data", lambda: assert_data(run.recipe)) if data_is_made or run.recipe.data.path.exists() else None
    check("run directory", lambda: assert_writable(run_dir))
    entries = check("jobs", lambda: _jobs_on(run_dir, after)) or []
    if not entries:
        check("owner", lambda: assert_free(run_dir, "or choose another --run-dir"))
    digest, queued = manifest.digest if manifest else None, entries[-1].get("identity") if entries else None
    check("identity", lambda: assert_identity(run.recipe, digest, run_dir, queued))
    if manifest:
        check("shards and blocks", partial(assert_whole, run.recipe, manifest))
    return Readiness(tuple(findings), tuple(str(entry["job_id"]) for entry in entries))


def assert_ready(runs: Mapping[Path, TaskRun], *, after: bool, data_is_made: bool) -> list[str]:
    """The jobs that are queued or at work on these runs, which the new one has to wait for.

    runs: by run directory. after, data_is_made: as of `look_at`. Raises UserError for what it finds wrong first.
    """
    jobs: set[str] = set()
    for run_dir, run in runs.items():
        found = look_at(run_dir, run, after=after, data_is_made=data_is_made)
        for finding in found.findings:
            if finding.error:
                raise finding.error
        jobs |= set(found.jobs)
    return sorted(jobs)


def _jobs_on(run_dir: Path, after: bool) -> list[dict[str, Any]]:
    """Those that the new one is to wait for. Raises UserError where it may not."""
    entries = queued_jobs(run_dir)
    if entries and not after:
        raise UserError(
            f"expected no other job on the run in {run_dir}, found job {entries[-1]['job_id']} queued or at work: "
            "cancel it, choose another --run-dir, or have this one wait for its end with --after"
        )
    return entries


def queued_jobs(run_dir: Path) -> list[dict[str, Any]]:
    """The entries of jobs.jsonl whose jobs are queued or at work."""
    return [entry for entry in _jobs(run_dir).read(skip_garbled=True) if _is_queued(str(entry.get("job_id")))]


def hand_over(text: str, run_dir: Path, runs: Mapping[Path, TaskRun]) -> tuple[str, Path]:
    """Write the script beside the run directory, over none that is there, and submit it: (job id, script).

    Raises UserError for what the disk or sbatch complained of; then no script is left behind.
    """
    path = _write(text, run_dir)
    try:
        job_id = _sbatch(path)
    except UserError:
        path.unlink()
        raise
    for directory, run in runs.items():
        entry: dict[str, Any] = {"job_id": run.job_id(job_id), "script": str(path), "submitted": time.time()}
        entry["identity"] = run.recipe.identity()
        directory.mkdir(parents=True, exist_ok=True)
        with closing(_jobs(directory)) as jobs:
            jobs.append(entry)
    return job_id, path


def _jobs(run_dir: Path) -> JsonlFile:
    return JsonlFile(run_dir / _JOBS)


def _write(text: str, run_dir: Path) -> Path:
    """RUN_DIR.sbatch, or RUN_DIR.2.sbatch where that is another job's, and so on."""
    try:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            path = run_dir.with_name(f"{run_dir.name}.{number}.sbatch" if number > 1 else f"{run_dir.name}.sbatch")
            with suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
                file.write(text)
                return path
    except OSError as error:
        raise UserError(f"expected to write {path}, found: {error.strerror}") from None
    raise AssertionError("itertools.count ends never")


def _sbatch(path: Path) -> str:
    done = _run("sbatch", "--parsable", str(path))
    if done.returncode:
        raise UserError(f"expected sbatch to accept the job, found: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]  # a cluster's name may follow


def _is_queued(job_id: str) -> bool:
    """Whether SLURM has the job, or a task of the array, on its list of those that are not over."""
    done = _run("squeue", "--noheader", f"--jobs={job_id}", "--format=%T")
    return done.returncode == 0 and bool(done.stdout.strip())


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise UserError(
            f"expected {command[0]} on the PATH, found none: submit where SLURM is, or use --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"expected an answer of {command[0]} within {_TIMEOUT_S:g} s, found none") from None
