"""What fine-tuning makes of models: tasks by arms, each of several seeds, with 95 % intervals.

    python tools/finetune_table.py --model dense=runs/dense --model sparse=runs/sparse --scratch exports/dense
        --task tasks/trec/task.yaml --task tasks/sms/task.yaml --dir runs/finetune
        [--seeds 5] [--rates 3e-4,1e-3] [--steps 400] [--batch-size 32] [--max-length 64] [--jobs 1] [--json]

Arms: every model as it is; of a sparse one also its blocks made dense, and moved by the mask manager; `scratch`, fresh
weights of the shape of a directory of transformers. Of several rates an arm has, for each task, the one that is best on
validation with the first seed; the other seeds are trained with that one alone. Scores are of the test split: accuracy,
F1 of answers, Pearson's r. Differences are paired by seed, against the first model as it is.

Every cell is a `dsbert finetune` in a directory of its own below --dir. What is done there is left alone: the same
command again completes the table. One process a cell, of OMP_NUM_THREADS threads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from on_ranks import markdown

from dsbert.experiment.commands import said_last
from dsbert.experiment.paired_statistics import estimate

_SCORES = ("accuracy", "f1", "pearson")  # the first that a task has
_SCRATCH = "scratch"


@dataclass(frozen=True)
class Arm:
    """name: as shown. model: where it starts; of `scratch` the directory whose shape it has. pattern: as finetune's."""

    name: str
    model: str
    pattern: str | None = None


@dataclass(frozen=True)
class Cell:
    """One fine-tuning."""

    task: Path
    arm: Arm
    rate: str
    seed: int

    def directory(self, root: Path) -> Path:
        """Where it is trained."""
        return root / self.task.parent.name / self.arm.name.replace(", ", "-") / f"{self.rate}-seed{self.seed}"

    def metrics(self, root: Path) -> dict[str, Any] | None:
        """Of its splits; None before it is done."""
        path = self.directory(root) / "metrics.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def score(self, root: Path, split: str) -> float | None:
        """Of one split; None before it is done."""
        found = (self.metrics(root) or {}).get(split, {})
        return next((float(found[name]) for name in _SCORES if name in found), None)


def arms_of(models: Iterable[str], scratch: str | None) -> list[Arm]:
    """From NAME=PATH; which of them are sparse, their weights say."""
    if scratch and not (Path(scratch) / "config.json").is_file():
        _refuse(f"expected a directory of transformers as --scratch, found none at {scratch}")
    found = []
    for given in models:
        name, _, path = given.partition("=")
        if not path:
            _refuse(f"expected --model NAME=PATH, found {given!r}")
        found.append(Arm(name, path))
        if _is_sparse(path):
            found += [Arm(f"{name}, {pattern}", path, pattern) for pattern in ("dense", "dynamic")]
    return [*found, *([Arm(_SCRATCH, scratch)] if scratch else [])]


def _refuse(mistake: str) -> NoReturn:
    print(f"finetune_table: {mistake}", file=sys.stderr)
    raise SystemExit(2)


def _is_sparse(path: str) -> bool:
    from dsbert.hf.finetuning.starting_model import load_model, resolve_model

    return load_model(resolve_model(Path(path)), "classification").pattern == "keep"


def fresh_model(shape: str, root: Path, seed: int) -> Path:
    """A directory of transformers with the configuration and tokenizer of `shape`, and weights drawn from the seed."""
    to = root / _SCRATCH / f"weights-seed{seed}"
    if not (to / "model.safetensors").is_file():
        import torch
        from transformers import AutoConfig, AutoModelForPreTraining, AutoTokenizer

        torch.manual_seed(seed)
        AutoTokenizer.from_pretrained(shape).save_pretrained(to)
        AutoModelForPreTraining.from_config(AutoConfig.from_pretrained(shape)).save_pretrained(to)
    return to


def train(cell: Cell, options: argparse.Namespace) -> str | None:
    """Train what is not done; what it complained of, or None."""
    if cell.metrics(options.dir) is not None:
        return None
    model = cell.arm.model
    if cell.arm.name == _SCRATCH:
        model = str(fresh_model(model, options.dir, cell.seed))
    command = [
        sys.executable, "-m", "dsbert", "finetune", model, "--task", str(cell.task), "--to",
        str(cell.directory(options.dir)), "--batch-size", str(options.batch_size), "--max-length",
        str(options.max_length), "--nproc", "1", f"learning_rate={cell.rate}", f"max_steps={options.steps}",
        f"seed={cell.seed}", "eval_strategy=no", "save_strategy=no",
    ]  # fmt: skip
    if cell.arm.pattern:
        command[6:6] = ["--pattern", cell.arm.pattern]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"{cell.directory(options.dir)}: {said_last(done.stderr)}"


def train_all(cells: list[Cell], options: argparse.Namespace) -> list[str]:
    """Complaints of those that failed."""
    waiting = [cell for cell in cells if cell.metrics(options.dir) is None]
    failed = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for number, (cell, complaint) in enumerate(
            zip(waiting, pool.map(lambda cell: train(cell, options), waiting), strict=True), 1
        ):
            where = cell.directory(options.dir).relative_to(options.dir)
            print(f"{number} of {len(waiting)}: {where} {complaint or 'done'}", file=sys.stderr, flush=True)
            failed += [complaint] if complaint else []
    return failed


def best_rate(task: Path, arm: Arm, options: argparse.Namespace) -> str | None:
    """By validation, with the first seed; None where nothing is done."""
    cells = [Cell(task, arm, rate, 1) for rate in options.rates]
    scores = {cell.rate: cell.score(options.dir, "validation") for cell in cells}
    done = {rate: score for rate, score in scores.items() if score is not None}
    return max(done, key=lambda rate: done[rate]) if done else None


def rows(arms: list[Arm], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Of the table: a row per task and arm."""
    found = []
    for task in options.task:
        scores: dict[str, dict[int, float]] = {}
        for arm in arms:
            rate = best_rate(task, arm, options)
            cells = [Cell(task, arm, rate, seed) for seed in range(1, options.seeds + 1)] if rate else []
            own = {cell.seed: score for cell in cells if (score := cell.score(options.dir, "test")) is not None}
            scores[arm.name] = own
            reference = scores[arms[0].name]
            difference = estimate([own[seed] - reference[seed] for seed in sorted(own.keys() & reference.keys())])
            found.append(
                {
                    "task": task.parent.name,
                    "arm": arm.name,
                    "rate": rate,
                    "test score": str(estimate([own[seed] for seed in sorted(own)])),
                    f"less {arms[0].name}": "" if arm is arms[0] else str(difference),
                    "n": f"{len(own)} of {options.seeds}" if len(own) < options.seeds else options.seeds,
                }
            )
    return found


def options_from(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=PATH", help="a run, export, ...")
    parser.add_argument("--scratch", metavar="DIR", help="a directory of transformers: fresh weights of its shape")
    parser.add_argument("--task", action="append", required=True, type=Path, metavar="FILE")
    parser.add_argument("--dir", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rates", type=lambda text: text.split(","), default=["3e-4", "1e-3"])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--no-training", action="store_true", help="only the table of what is done")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


def main() -> None:
    """First the rates, with one seed; then the other seeds; then the table. Exits with 1 where cells failed."""
    options = options_from()
    arms, failed = arms_of(options.model, options.scratch), []
    if not options.no_training:
        pairs = [(task, arm) for task in options.task for arm in arms]
        failed += train_all([Cell(task, arm, rate, 1) for task, arm in pairs for rate in options.rates], options)
        chosen = [(task, arm, best_rate(task, arm, options)) for task, arm in pairs]
        seeds = range(2, options.seeds + 1)
        failed += train_all(
            [Cell(task, arm, rate, seed) for seed in seeds for task, arm, rate in chosen if rate], options
        )
    table = rows(arms, options)
    print(json.dumps(table) if options.json else markdown(table))
    if failed:
        print("\n".join(f"finetune_table: {complaint}" for complaint in failed), file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
