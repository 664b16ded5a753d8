"""The table of fine-tunings: which rate an arm gets, and what is paired with what."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import finetune_table as tool

TASK = Path("tasks/trec/task.yaml")
DENSE, SPARSE = tool.Arm("dense", "runs/dense"), tool.Arm("sparse, dynamic", "runs/sparse", "dynamic")


def _done(root: Path, arm: Any, rate: str, seed: int, validation: float, test: float) -> None:
    directory = tool.Cell(TASK, arm, rate, seed).directory(root)
    directory.mkdir(parents=True)
    metrics = {"validation": {"rows": 9, "accuracy": validation}, "test": {"rows": 9, "accuracy": test}}
    (directory / "metrics.json").write_text(json.dumps(metrics))


@pytest.fixture
def options(tmp_path: Path) -> Any:
    words = ["--model", "dense=runs/dense", "--task", str(TASK), "--dir", str(tmp_path), "--seeds", "3"]
    return tool.options_from([*words, "--rates", "3e-4,1e-3"])


def test_the_rate_is_chosen_by_validation_and_differences_are_of_one_seed(tmp_path: Path, options: Any) -> None:
    for arm, gain in ((DENSE, 0.0), (SPARSE, 0.1)):
        _done(tmp_path, arm, "3e-4", 1, validation=0.7, test=0.9)  # better on test, where nobody may look
        for seed, own in ((1, 0.5), (2, 0.6), (3, 0.4)):
            _done(tmp_path, arm, "1e-3", seed, validation=0.8, test=own + gain)
    dense, sparse = tool.rows([DENSE, SPARSE], options)
    assert (dense["rate"], dense["test score"], dense["n"], dense["less dense"]) == ("1e-3", "0.5000 ± 0.2484", 3, "")
    assert sparse["test score"] == "0.6000 ± 0.2484"
    assert sparse["less dense"] == "0.1000 ± 0.0000"


def test_what_is_missing_is_said(tmp_path: Path, options: Any) -> None:
    _done(tmp_path, DENSE, "1e-3", 1, validation=0.8, test=0.5)
    dense, sparse = tool.rows([DENSE, SPARSE], options)
    assert (dense["test score"], dense["n"]) == ("0.5000", "1 of 3")
    assert (sparse["rate"], sparse["test score"], sparse["n"]) == (None, "missing", "0 of 3")


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    for words, said in (
        (["--model", "runs/dense"], "expected --model NAME=PATH, found 'runs/dense'"),
        (
            ["--model", "a=b", "--scratch", str(tmp_path)],
            "expected a directory of transformers as --scratch, found none",
        ),
    ):
        command = [sys.executable, tool.__file__, *words, "--task", str(TASK), "--dir", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1
