"""The command `dsbert` as tests call it: in a process of its own, in this process, or on the ranks of a launch."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}

SMALL = (
    "model.hidden_size=32", "model.num_layers=1", "model.max_positions=32", "data.seq_len=24", "model.dropout=0.1",
    "sparsity.block_size=8", "sparsity.sparsity=0.75", "sparsity.num_updates=4", "batch.global_batch=12",
    "batch.micro_batch=3", "optim.total_steps=12", "optim.warmup_steps=2", "eval.every_steps=6", "eval.sequences=16",
    "checkpoint.every_steps=6", "log.every_steps=1", "log.wandb=false",
)  # fmt: skip


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def dsbert(*words: str) -> Done:
    """The command in this process, which has imported what is slow."""
    from dsbert.cli import app

    # A rank leaves its place in the environment, for libraries: this process is to stay none.
    environment = mock.patch.dict(os.environ)
    with environment, redirect_stdout(io.StringIO()) as stdout, redirect_stderr(io.StringIO()) as stderr:
        code = app.run(list(words))
    return Done(code, stdout.getvalue(), stderr.getvalue())


def dsbert_process(*words: str) -> Done:
    """The command in a process of its own, with all that it starts."""
    done = subprocess.run(
        [sys.executable, "-m", "dsbert", *words],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def dsbert_on_a_rank(words: list[str], per_rank: list[list[str]] | None = None) -> list[Any]:
    """The command on this rank of a launch."""
    extra = per_rank[int(os.environ["RANK"])] if per_rank else []
    return list(dsbert(*words, *extra))


def complaint(done: Done) -> str:
    """The one line of a user's mistake: exit code 2, no traceback, and every rank that spoke said the same."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = {line for line in done.stderr.splitlines() if line.startswith("dsbert: ")}
    assert len(lines) == 1, done.stderr
    return lines.pop()


def one_voice(answers: list[Done], code: int = 2) -> str:
    """The one line of what all ranks have found: the first says it, and the others leave as it does."""
    assert [answer.returncode for answer in answers] == [code] * len(answers), answers
    said = [[line for line in answer.stderr.splitlines() if line.startswith("dsbert: ")] for answer in answers]
    assert [len(lines) for lines in said] == [1] + [0] * (len(answers) - 1), answers
    assert not [answer for answer in answers if "Traceback" in answer.stderr], answers
    return said[0][0]
