"""What TensorBoard shows of a run that was stopped in every way: each step once, as metrics.jsonl has it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from dsbert.base.jsonl import JsonlFile
from dsbert.training.metrics import TensorBoardLogger
from dsbert.training.tensorboard_process import write

accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
)


def shown(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard has of each curve, as (step, value); and the steps of pictures and histograms."""
    events = accumulator.EventAccumulator(
        str(run_dir / "tensorboard"), size_guidance=dict.fromkeys(("scalars", "images", "histograms"), 0)
    )
    events.Reload()
    tags = events.Tags()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}
    found |= {tag: [(event.step, 0.0) for event in events.Images(tag)] for tag in tags["images"]}
    return found | {tag: [(event.step, 0.0) for event in events.Histograms(tag)] for tag in tags["histograms"]}


def written(run_dir: Path, step: int) -> list[str]:
    """The whole of metrics.jsonl, by a start that begins after `step`; returns what was noted."""
    ended = threading.Event()
    ended.set()
    notes: list[str] = []
    write({"run_dir": str(run_dir), "step": step, "layers": None}, ended, notes.append)
    return notes


def test_a_run_with_its_pictures(run: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("heartbeats")))
    assert written(run_dir, 0) == []
    assert written(run_dir, 12) == [], "the next start has nothing to add"
    found = shown(run_dir)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in found["loss"]] == list(range(1, 13))
    assert [value for _, value in found["loss"]] == pytest.approx([record["loss"] for record in records], rel=1e-6)
    assert [step for step, _ in found["val_mlm_loss"]] == [6, 12]
    assert [step for step, _ in found["topology/blocks"]] == [3, 6, 9]
    assert [step for step, _ in found["topology/age"]] == [3, 6, 9]


def test_steps_that_are_taken_again_show_once(tmp_path: Path) -> None:
    """A start goes back to step 4; another finds that the one before was killed with steps that it had not written."""
    metrics = JsonlFile(tmp_path / "metrics.jsonl")
    for step in range(1, 8):
        metrics.append({"step": step, "loss": float(step)})
    written(tmp_path, 0)
    metrics.cut_back(4, attempt=2)
    for step in range(5, 7):
        metrics.append({"step": step, "loss": 10.0 + step})
    written(tmp_path, 4)
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 15.0), (6, 16.0)]
    assert shown(tmp_path)["loss"] == expected
    for step in range(7, 10):
        metrics.append({"step": step, "loss": 10.0 + step})
    written(tmp_path, 9)
    assert shown(tmp_path)["loss"] == [*expected, (7, 17.0), (8, 18.0), (9, 19.0)]
    metrics.close()


@pytest.mark.slow
def test_killed_writers_lose_nothing(tmp_path: Path) -> None:
    metrics = JsonlFile(tmp_path / "metrics.jsonl")
    last = tmp_path / "tensorboard" / "last_step"
    for number in range(3):
        logger = TensorBoardLogger(tmp_path, enabled=True, step=4 * number)
        metrics.append({"step": 4 * number + 1, "loss": 1.0})
        metrics.append({"step": 4 * number + 2, "loss": 1.0})
        deadline = time.monotonic() + 60
        while not last.exists() or int(last.read_text()) < 4 * number + 2:
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.02)
        metrics.append({"step": 4 * number + 3, "loss": 1.0})
        assert logger._sender is not None
        assert logger._sender._child is not None
        if number < 2:
            os.kill(logger._sender._child.pid, signal.SIGKILL)
        metrics.append({"step": 4 * number + 4, "loss": 1.0})
        logger.close()
    metrics.close()
    assert [step for step, _ in shown(tmp_path)["loss"]] == list(range(1, 13))


def test_without_tensorboard_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fake" / "torch" / "utils").mkdir(parents=True)
    (tmp_path / "fake" / "torch" / "__init__.py").touch()
    (tmp_path / "fake" / "torch" / "utils" / "__init__.py").touch()
    (tmp_path / "fake" / "torch" / "utils" / "tensorboard.py").write_text("import tensorboard")
    (tmp_path / "fake" / "tensorboard.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'tensorboard'\", name='tensorboard')"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"), prepend=os.pathsep)
    logger = TensorBoardLogger(tmp_path, enabled=True, step=0)
    assert logger._sender is not None
    logger._sender._thread.join(30)
    logger.close()
    (line,) = capfd.readouterr().err.splitlines()
    assert line == (
        "dsbert: TensorBoard: tensorboard is not installed: pip install 'dsbert[tensorboard]'. The run goes on; "
        "metrics.jsonl has everything, and the next start writes what is missing."
    )
