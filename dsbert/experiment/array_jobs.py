"""What is missing of an experiment, as SLURM array jobs through `dsbert submit`: a task per cell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsbert.base.errors import UserError
from dsbert.experiment.planning import Plan, run_directory
from dsbert.jobs.job_queue import queued_jobs
from dsbert.jobs.submit import job_from_options, submit_recipes

_TASKS = 1000  # of one array: SLURM's default limit


def submit_missing(
    plan: Plan, directory: Path, options: dict[str, Any], *, dry_run: bool, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """What `submit` returns, for each array. Cells that a job is on already are left to it.

    options: of `dsbert submit`. Where a sweep is not over, its best value is not known, and the seeds that follow are
    to be submitted when it is. Raises UserError as `submit` does, or if nothing is missing.
    """
    cells, busy = [], 0
    for cell in plan.missing:
        if not dry_run and queued_jobs(run_directory(directory, cell)):
            busy += 1
        else:
            cells.append(cell)
    if busy:
        say(f"{busy} cells are queued or at work already")
    if not cells:
        raise UserError(f"expected cells that are missing and in no queue, found none of {len(plan.wanted)}")
    job = job_from_options("", (), options | {"run_dir": directory / plan.experiment.name})
    found = []
    for first in range(0, len(cells), _TASKS):
        part = cells[first : first + _TASKS]
        recipes = [cell.recipe for cell in part]
        directories = [run_directory(directory, cell) for cell in part]
        found.append(submit_recipes(job, recipes, directories, dry_run=dry_run))
    if plan.unknown:
        say(f"{plan.unknown} more cells follow from the sweep: submit again when it is over")
    return found
