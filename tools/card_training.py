"""Training on real text for as long as a stage of tools/card_suite.py has, with a kill in the middle.

The run is killed (SIGKILL) once a checkpoint and later steps are there; it is started again, takes the steps since the
checkpoint once more, and is stopped (SIGTERM, upon which it saves) shortly before the time is up.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from card_records import Record, Skipped, Stage, read

ROOT = Path(__file__).resolve().parent.parent
# A schedule for a card's two minutes. B = 64: where the kernels are expected to be furthest ahead of dense products.
_RECIPE = (
    "bert-base", "sparsity.block_size=64", "sparsity.num_updates=40", "batch.global_batch=128", "batch.micro_batch=128",
    "optim.total_steps=4000", "optim.warmup_steps=200", "optim.dense_lr=1e-4", "eval.every_steps=250",
    "eval.sequences=512", "checkpoint.every_steps=100", "log.every_steps=10", "log.wandb=false",
)  # fmt: skip
_DRY_RECIPE = (
    "demo", "model.hidden_size=32", "model.num_layers=1", "model.max_positions=32", "data.seq_len=24",
    "sparsity.block_size=8", "sparsity.sparsity=0.75", "sparsity.num_updates=40", "batch.global_batch=4",
    "batch.micro_batch=4", "optim.total_steps=100000", "optim.warmup_steps=2", "eval.every_steps=10",
    "eval.sequences=8", "checkpoint.every_steps=5", "log.every_steps=1", "log.wandb=false",
)  # fmt: skip
_VOCAB_SIZES = {False: 30522, True: 200}
# A save, and the way out.
_ENDING_S = 15.0
_POLL_S = 0.2
_DONE, _SAVED = 0, 75


def train(stage: Stage) -> None:
    """A record of every logged step ("progress"), and one of how the run went ("run").

    Raises Skipped without a text, RuntimeError if the run does not go on where it should, or ends in another way.
    """
    if stage.text is None:
        raise Skipped("no --text to train on")
    run = stage.work / "run"
    recipe = _DRY_RECIPE if stage.dry_run else _RECIPE
    words = ["pretrain", *recipe, f"data.path={_prepared(stage)}", "--nproc", "1", "--run-dir", str(run)]
    middle = time.monotonic() + 0.5 * (stage.left_s() - _ENDING_S)
    first = _start(words)
    killed_at = _follow(
        stage, 1, first, run, lambda step: step > _saved_step(run) > 0 and (stage.dry_run or time.monotonic() > middle)
    )
    if first.poll() is not None:
        raise RuntimeError(f"the run ended by itself with {first.poll()}, at step {killed_at}, before it was killed")
    first.kill()
    first.wait()
    second = _start(words)
    last = _follow(
        stage, 2, second, run, lambda step: stage.left_s() < _ENDING_S or (stage.dry_run and step > killed_at + 5)
    )
    second.send_signal(signal.SIGTERM)
    code = second.wait()
    found = _resumption(read(run / "metrics.jsonl"), _moved(run)) if code in (_DONE, _SAVED) else {}
    stage.record("run", killed_at=killed_at, last_step=last, exit_code=code, **found)
    if not found or last <= killed_at:
        raise RuntimeError(f"killed at step {killed_at}, the run went on to step {last} and ended with {code}")


def _prepared(stage: Stage) -> Path:
    """The text as `dsbert prepare` makes it, in the time of this stage, or the text itself if it is that already."""
    assert stage.text is not None
    if (stage.text / "manifest.json").is_file():
        return stage.text
    to, began = stage.work / "data", time.monotonic()
    size = str(_VOCAB_SIZES[stage.dry_run])
    process = _start(["prepare", "--source", str(stage.text), "--to", str(to), "--vocab-size", size])
    if process.wait():
        raise RuntimeError(f"dsbert prepare ended with {process.returncode}")
    stage.record("prepared", seconds=round(time.monotonic() - began, 1))
    return to


def _start(words: list[str]) -> subprocess.Popen[bytes]:
    """`dsbert WORDS`, of this checkout, in this process group, so that it ends with the stage."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen([sys.executable, "-m", "dsbert", *words], env=os.environ | {"PYTHONPATH": path})


def _follow(
    stage: Stage, attempt: int, process: subprocess.Popen[bytes], run: Path, enough: Callable[[int], bool]
) -> int:
    """Record what the attempt logs until `enough(its last logged step)`, or until it has ended; that step, 0: none.

    A step that is taken again has a line of its own: its seconds are others.
    """
    step, known = 0, {row["step"]: row for row in read(run / "metrics.jsonl")}
    while True:
        ended = process.poll() is not None
        for row in read(run / "metrics.jsonl"):
            if row != known.get(row["step"]):
                known[row["step"]] = row
                step = max(step, row["step"])
                stage.record("progress", attempt=attempt, **row)
        if ended or enough(step):
            return step
        time.sleep(_POLL_S)


def _saved_step(run: Path) -> int:
    """The step of the newest checkpoint that was published; 0: none yet."""
    latest = run / "checkpoints" / "latest"
    return int(latest.read_text().split()[0].removeprefix("step_")) if latest.exists() else 0


def _moved(run: Path) -> list[Record]:
    """What was logged of steps that were taken again."""
    return [row for path in sorted(run.glob("metrics.*.jsonl")) for row in read(path)]


def _resumption(rows: Iterable[Record], moved: Iterable[Record]) -> dict[str, Any]:
    """What the records of both attempts say of each other; {} if there is no step that both have logged.

    resumed_after: the last logged step of the first attempt that counts. difference: the largest of a loss of the same
    step in both attempts; 0 where a resumed run takes the same steps to the last bit.
    """
    final, first = ({row["step"]: row for row in them} for them in (rows, moved))
    both = sorted(final.keys() & first.keys())
    if not both:
        return {}
    return {
        "resumed_after": max((step for step in final if step < min(first)), default=0),
        "taken_again": len(both),
        "difference": max(abs(final[step]["loss"] - first[step]["loss"]) for step in both),
        "first_loss": final[min(final)]["loss"],
        "last_loss": final[max(final)]["loss"],
    }
