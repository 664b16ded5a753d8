"""A run in which a rank computes wrongly ends with its name, once, before the step is taken."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.commands import SMALL, dsbert
from tests.fault_rows import FaultTable
from tests.helpers import run_distributed

STEPS_BETWEEN, FAULTY_STEP = 4, 8


def train(run_dir: str, data: str) -> list[Any]:
    """`dsbert pretrain` on this rank; rank 1 flips the last bit of a number in a gradient of its own in step 8."""
    import torch

    from dsbert.engine.train_engine import TrainEngine
    from dsbert.models import construction

    build, loss_again, gradients = construction.build_model, TrainEngine._loss_again, []

    def watched(engine: Any, *arguments: Any) -> Any:
        if engine.step == FAULTY_STEP - 1:
            gradients.append("that of the next rank's micro-batch comes now, and then the own one")
        return loss_again(engine, *arguments)

    def flip(gradient: torch.Tensor) -> torch.Tensor | None:
        if gradients:
            gradients.append("computed")
        if os.environ["RANK"] != "1" or len(gradients) != 3:
            return None
        gradient = gradient.clone()
        gradient.view(-1).view(torch.int32)[int(gradient.abs().argmax())] ^= 1
        return gradient

    def build_model(*arguments: Any) -> Any:
        module, layers = build(*arguments)
        next(iter(layers.values())).blocks.register_hook(flip)
        return module, layers

    words = (*SMALL, "deepspeed.config=zero1_fp32", f"health.replay_every_steps={STEPS_BETWEEN}")
    with (
        mock.patch("dsbert.training.run.build_model", build_model),
        mock.patch.object(TrainEngine, "_loss_again", watched),
    ):
        done = dsbert("pretrain", "demo", "--run-dir", run_dir, f"data.path={data}", *words)
    return [done.returncode, done.stderr]


@pytest.mark.slow
def test_the_rank_is_named_and_the_step_not_taken(data: Path, tmp_path: Path, fault_table: FaultTable) -> None:
    start = time.time()
    ranks = run_distributed(train, 2, {"run_dir": str(tmp_path / "run"), "data": str(data)}, timeout=500)
    assert [code for code, _ in ranks] == [3, 3], ranks
    (line,) = [line for _, said in ranks for line in said.splitlines() if "wrong ones" in line]
    assert f"of step {FAULTY_STEP} " in line
    assert "rank 1 computes wrong ones" in line
    assert f"is at fault, last seen at step {FAULTY_STEP - 1}" in line
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["outcome"], status["step"], status["culprit"]["rank"]) == ("failed", FAULTY_STEP - 1, 1)
    what = "one bit of a gradient flipped on one rank, in a step with a replay: the step is not taken"
    fault_table.row("27", what, time.time() - start, (3, 3), status["culprit"])


def test_where_bits_may_differ_it_is_said_and_left_alone() -> None:
    from dsbert.training.numerics import why_bits_may_differ

    same: dict[str, Any] = {
        "torch": "2",
        "device": "cpu",
        "cpu": "AVX2",
        "threads": 1,
        "ranks": 2,
        "micro_batch": 3,
        "arithmetic": 2,
    }
    assert why_bits_may_differ(same) is None
    assert why_bits_may_differ(same | {"threads": [1, 2]}) == "ranks differ in threads (1, 2)"
    assert "NVIDIA" in (why_bits_may_differ(same | {"device": "NVIDIA H100"}) or "")
    with mock.patch("dsbert.training.numerics.gather_json", return_value=["one", "other"]):
        assert why_bits_may_differ(same) == "ranks differ in model of CPU (one, other)"
