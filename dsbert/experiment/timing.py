"""How long cells take: by what was measured of their like, else by a few steps taken now."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import xxhash
from filelock import FileLock

from dsbert.base.durable import replace_durably
from dsbert.base.errors import UserError
from dsbert.base.jsonl import JsonlFile
from dsbert.experiment.cells import Cell, overrides
from dsbert.experiment.commands import pretrain_command, said_last
from dsbert.experiment.planning import Plan

_STEPS = 8
_WARM = 3  # steps that are not counted: kernels are measured and memory is found in them


def seconds_per_step(plan: Plan, directory: Path, threads: int, show: Callable[[int, int], None]) -> dict[str, float]:
    """By cell name, for all cells that are wanted. show: (shapes timed, shapes to time).

    Cells of one shape (model, sparsity, batch, precision) take the same time: one stands for all. What was timed here
    before, with as many threads on the same kind of processor, is not timed again.
    """
    known = _measured(plan)
    path = directory / "timings.json"
    with FileLock(directory / "timings.lock"):
        timed: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
        shapes = {cell.name: _shape(cell) for cell in plan.wanted}
        pending = {shape: cell for cell in plan.wanted if (shape := shapes[cell.name]) not in known}
        keys = {shape: f"{shape} {threads} {_processor()}" for shape in pending}
        todo = [shape for shape in pending if keys[shape] not in timed]
        for number, shape in enumerate(todo):
            show(number, len(todo))
            timed[keys[shape]] = _time(pending[shape], threads)
            replace_durably(path, json.dumps(timed, indent=1).encode())
        show(len(todo), len(todo))
    return {name: known[shape] if shape in known else timed[keys[shape]] for name, shape in shapes.items()}


def hours(cells: Iterable[Cell], per_step: dict[str, float]) -> float:
    """Of training alone, one after the other."""
    return sum(per_step[cell.name] * cell.recipe.optim.total_steps for cell in cells) / 3600


def _shape(cell: Cell) -> str:
    recipe = cell.recipe.model_dump(mode="json", include={"model", "sparsity", "data", "batch", "deepspeed"})
    del recipe["data"]["path"]
    return xxhash.xxh3_64_hexdigest(json.dumps(recipe, sort_keys=True).encode())


def _measured(plan: Plan) -> dict[str, float]:
    """By shape: of cells that are done."""
    found: dict[str, list[float]] = {}
    for cell in plan.cells:
        if result := plan.results.get(cell.name):
            found.setdefault(_shape(cell), []).append(result.last.seconds / result.last.step)
    return {shape: statistics.median(values) for shape, values in found.items()}


def _time(cell: Cell, threads: int) -> float:
    """Seconds per step, the median of a few."""
    settings = {
        "optim.total_steps": _STEPS, "optim.warmup_steps": 1, "sparsity.num_updates": 1, "log.every_steps": 1,
        "eval.sequences": 0, "checkpoint.every_steps": _STEPS,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        done = subprocess.run(
            pretrain_command(cell, Path(folder) / "timing.yaml", run_dir, *overrides(settings)),
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise UserError(f"{cell.label} cannot be timed: {said_last(done.stderr)}")
        records = list(JsonlFile(run_dir / "metrics.jsonl").read())
        return float(statistics.median(record["step_s"] for record in records if record["step"] > _WARM))


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"
