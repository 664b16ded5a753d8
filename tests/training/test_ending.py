"""A run is done if it was trained to its end: not if its steps were skipped, nor with weights that are no numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands import SMALL, dsbert
from tests.helpers import run_distributed

FP16 = "deepspeed.config=zero1_fp16"
SCALE = "deepspeed.overrides.fp16"


def train_in_fp16(words: list[str]) -> list[Any]:
    """Slow on a CPU, but right."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True
    return list(dsbert(*words))


def train(data: Path, run_dir: Path, *changes: str, world_size: int = 1) -> tuple[int, str, dict[str, Any]]:
    """(exit code, what rank 0 said, status.json) of a start."""
    words = ["pretrain", "demo", "--run-dir", str(run_dir), f"data.path={data}", *SMALL, *changes]
    ranks = run_distributed(train_in_fp16, world_size, {"words": words})
    assert len({rank[0] for rank in ranks}) == 1
    return ranks[0][0], ranks[0][2], json.loads((run_dir / "status.json").read_text())


def last_record(run_dir: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    return record


def assert_not_done(found: tuple[int, str, dict[str, Any]], message: str) -> None:
    code, said, status = found
    assert code == 1
    assert status["outcome"] == "failed"
    assert message in status["cause"]
    assert said.count(message) == 1
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_static_loss_scale_that_always_overflows_ends_the_run(data: Path, tmp_path: Path) -> None:
    found = train(data, tmp_path / "run", FP16, f"{SCALE}.loss_scale=1e9", world_size=2)
    assert_not_done(found, "expected a finite gradient, found none in 10 steps in a row, the last of them step 10")
    assert "lower the learning rate or the loss scale, now 1e+09" in found[1]
    assert last_record(tmp_path / "run")["step"] == 10


@pytest.mark.slow
def test_a_run_of_nothing_but_skipped_steps_is_not_done_however_often_it_is_started(data: Path, tmp_path: Path) -> None:
    changes = (FP16, f"{SCALE}.loss_scale=1e9", "optim.max_skipped_steps=100")
    for _ in range(2):  # the second start finds all steps taken
        found = train(data, tmp_path / "run", *changes)
        assert_not_done(found, "expected a finite loss and gradient at the last step, 12, found none in the last 12")


@pytest.mark.slow
@pytest.mark.parametrize(("least", "done"), [(1, True), (10**9, False)])
def test_a_dynamic_scale_may_fall_until_its_minimum(least: int, done: bool, data: Path, tmp_path: Path) -> None:
    changes = (FP16, f"{SCALE}.loss_scale=0", f"{SCALE}.hysteresis=1", f"{SCALE}.initial_scale_power=35",
               f"{SCALE}.min_loss_scale={least}", "optim.max_skipped_steps=3", "optim.total_steps=24")  # fmt: skip
    found = train(data, tmp_path / "run", *changes)
    skipped = [json.loads(line)["skipped"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    if done:
        assert found[0] == 0, found[1]
        assert found[2]["outcome"] == "done"
        assert sum(skipped) > 10, "many more in a row than are allowed"
        assert skipped[-1] == 0
    else:  # 2^35, ..., 2^30, and then 10^9 three times
        assert_not_done(found, "found none in 3 steps in a row, the last of them step 9")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("optim.max_skipped_steps=100",), "expected finite weights and moments at step 6, found others in bert."),
        (("optim.max_skipped_steps=3",), "expected a finite gradient, found none in 3 steps in a row"),
        (
            ("optim.total_steps=1", "optim.warmup_steps=0", "sparsity.num_updates=1"),
            "expected a finite validation loss",
        ),
    ],
    ids=["at a save", "in a row", "by the last step"],
)
def test_a_rate_that_overflows_saves_nothing_and_is_not_done(
    changes: tuple[str, ...], message: str, data: Path, tmp_path: Path
) -> None:
    """The last: every loss is finite, the weights after the only step are not."""
    found = train(data, tmp_path / "run", "optim.dense_lr=null", "optim.lr=1e38", *changes)
    assert_not_done(found, message)
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))
