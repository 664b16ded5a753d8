"""`dsbert experiment` as a user runs it: real processes that train, share the work, are killed and go on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dsbert.base.errors import EXIT_REQUEUE
from dsbert.cluster.heartbeats import beats_in
from tests.commands import ENVIRONMENT, complaint, dsbert_process

SMOKE = Path(__file__).parents[2] / "experiments" / "smoke.yaml"
KILLS = int(os.environ.get("DSBERT_KILLS", "2"))  # ten take three minutes
slow = pytest.mark.slow


def start(directory: Path, *words: str, file: Path = SMOKE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dsbert", "experiment", str(file), "--dir", str(directory), *words],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == code, stdout + stderr
    return stderr


def table(directory: Path) -> dict[str, Any]:
    """Without seconds, which are measured anew."""
    done = dsbert_process("experiment", "table", str(SMOKE), "--dir", str(directory), "--cells", "--format", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for rows in found.values():
        for row in rows:
            if isinstance(row, dict):
                row.pop("seconds", None)
    return found


def attempts(directory: Path) -> list[int]:
    """Of each cell: how often it was begun."""
    return [len(path.read_text().splitlines()) for path in sorted(directory.glob("cells/*/attempts.jsonl"))]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two callers, who share the work, have trained."""
    directory = tmp_path_factory.mktemp("experiment")
    said = [ended(caller) for caller in [start(directory, "--threads", "1") for _ in range(2)]]
    assert all("6 of 6 cells" in text for text in said), said
    return directory


@slow
@pytest.mark.timeout(400)
def test_two_callers_train_each_cell_once(undisturbed):
    assert attempts(undisturbed) == [1] * 6
    found = table(undisturbed)
    assert found["notes"] == []
    assert [row["n"] for row in found["arms"]] == ["2", "2", "2"]
    assert [row["density"] for row in found["arms"]] == ["1", "0.104", "0.104"]
    # As `dsbert pretrain` itself has it.
    for row in found["cells"]:
        records = [json.loads(line) for line in (undisturbed / row["run"] / "metrics.jsonl").read_text().splitlines()]
        assert row["loss"] == f"{records[-1]['val_mlm_loss']:.4f}"


@slow
@pytest.mark.timeout(900)
def test_a_killed_experiment_ends_with_the_same_table(undisturbed, tmp_path):
    rng = random.Random(1)
    survived = []
    for _ in range(KILLS):
        caller = start(tmp_path, "--jobs", "2", "--threads", "1")
        time.sleep(rng.uniform(1, 25))
        caller.send_signal(signal.SIGKILL)
        caller.communicate()
        time.sleep(1.0)
        survived += _training_in(tmp_path)
    assert survived == [], "a training outlived the caller that was killed"
    ended(start(tmp_path, "--jobs", "2", "--threads", "1"))
    assert table(tmp_path) == table(undisturbed)


@slow
@pytest.mark.timeout(300)
def test_a_signal_has_trainings_save(tmp_path):
    """And the next call resumes them."""
    file = tmp_path / "long.yaml"
    text = (
        SMOKE.read_text()
        .replace("optim.total_steps: 60", "optim.total_steps: 100000")
        .replace("seeds: [1, 2]", "seeds: [1]")
    )
    file.write_text(text.replace("name: smoke\n", ""))
    caller = start(tmp_path, "--threads", "1", file=file)
    deadline = time.monotonic() + 120
    while not any(seen.beat.step >= 5 for path in tmp_path.glob("cells/*/heartbeats/*") for seen in beats_in(path)):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    caller.send_signal(signal.SIGTERM)
    assert "1 trainings save and leave; the same command goes on" in ended(caller, EXIT_REQUEUE)
    (saved,) = tmp_path.glob("cells/*/checkpoints/step_*")
    assert int(saved.name.removeprefix("step_")) >= 5
    status = dsbert_process("experiment", "status", str(file), "--dir", str(tmp_path))
    assert "0 of 3 cells" in status.stdout


@slow
@pytest.mark.timeout(300)
def test_a_cell_that_fails_is_tried_twice_and_marked(tmp_path):
    """Here: a rate that is too large for any loss to stay finite."""
    file = tmp_path / "fails.yaml"
    text = SMOKE.read_text().replace("seeds: [1, 2]", "seeds: [1]").replace("name: smoke\n", "")
    file.write_text(text.partition("arms:")[0] + "arms: {static: {overrides: {optim.dense_lr: 1.0e+30}}}\n")
    said = ended(start(tmp_path, "--jobs", "2", "--threads", "1", file=file), 1)
    assert "static seed=1 failed with 1, tried once more: expected a finite gradient" in said
    assert "static seed=1 failed with 1, given up" in said
    done = dsbert_process("experiment", "table", str(file), "--dir", str(tmp_path), "--format", "csv")
    assert "static,,missing,0 of 1" in done.stdout


def _training_in(directory: Path) -> list[int]:
    """Processes of ours that still train there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "pretrain" in words and any(word.startswith(str(directory)) for word in words):
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--slurm", "--nodes", "1"], "expected --time with --slurm, found none"),
        (["--nodes", "2"], "expected --slurm with --nodes, found none"),
    ],
)
def test_options_that_do_not_fit_are_one_line(tmp_path, words, message):
    assert message in complaint(dsbert_process("experiment", str(SMOKE), "--dir", str(tmp_path), *words))


def test_slurm_gets_a_task_per_cell_in_its_own_run_directory(tmp_path, data):
    """A dry run of an experiment on data that is there; bash reads the script."""
    file = tmp_path / "mine.yaml"
    text = SMOKE.read_text().replace("data: {source: sotu, vocab_size: 2048}\n", "").replace("name: smoke\n", "")
    file.write_text(text.replace("overrides:\n", f"overrides:\n  data.path: {data}\n", 1))
    words = ["--slurm", "--nodes", "2", "--time", "60", "--array", "1-6%3", "--dry-run"]
    done = dsbert_process("experiment", str(file), "--dir", str(tmp_path / "runs"), *words)
    assert done.returncode == 0, done.stderr
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=False).returncode == 0
    assert "#SBATCH --array=1-6%3" in done.stdout
    program = done.stdout.partition("# --- settings ---")[2].partition("# --- end of settings ---")[0]
    found = {}
    for task in range(1, 7):
        script = f'SLURM_ARRAY_TASK_ID={task}\n{program}\nprintf \'%s\\0\' "$TASK_RUN_DIR" "$FROZEN"'
        shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0")
        recipe = json.loads(shown[1])
        found[shown[0]] = (recipe["sparsity"]["pattern"], recipe["seed"])
    assert sorted(found.values()) == sorted((arm, seed) for arm in ("dense", "static", "dynamic") for seed in (1, 2))
    assert all(Path(path).parent == tmp_path / "runs" / "cells" for path in found)
