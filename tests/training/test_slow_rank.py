"""One of four ranks is slow in a real run: it is named on standard error, in the records and by `dsbert status`."""

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

SLOW_RANK = 2
# Seconds. Batches are made during the step before: a delay shows where it is longer than that step.
LATE_S = {"compute": 0.06, "data": 0.5}
# Steps that own more time than the least that is judged.
WORDS = ("model.hidden_size=64", "optim.total_steps=26", "eval.every_steps=26", "checkpoint.every_steps=26")


def train(run_dir: str, data: str, words: list[str], late_s: dict[str, float]) -> list[Any]:
    """`dsbert pretrain` on this rank. late_s: how long it sleeps in a forward pass, or when it makes a batch."""
    from dsbert.data.stream import SampleStream
    from dsbert.models import construction

    build, batch = construction.build_model, SampleStream.batch
    mine = late_s if int(os.environ["RANK"]) == SLOW_RANK else {}

    def build_model(*arguments: Any) -> Any:
        module, layers = build(*arguments)
        module.register_forward_hook(lambda *_: time.sleep(mine.get("compute", 0.0)))
        return module, layers

    def late_batch(*arguments: Any) -> Any:
        time.sleep(mine.get("data", 0.0))
        return batch(*arguments)

    with (
        mock.patch("dsbert.training.run.build_model", build_model),
        mock.patch.object(SampleStream, "batch", late_batch),
    ):
        done = dsbert("pretrain", "demo", "--run-dir", run_dir, f"data.path={data}", *SMALL, *words)
    return [done.returncode, done.stderr]


def pretrain(data: Path, run_dir: Path, words: tuple[str, ...], late_s: dict[str, float]) -> list[str]:
    """Returns the lines that name stragglers, of all ranks."""
    args = {"run_dir": str(run_dir), "data": str(data), "words": list(words), "late_s": late_s}
    ranks = run_distributed(train, 4, args, timeout=580)
    assert [code for code, _ in ranks] == [0] * 4, ranks
    return [line for _, said in ranks for line in said.splitlines() if "straggler" in line]


@pytest.mark.parametrize("cause", ["compute", pytest.param("data", marks=pytest.mark.slow)])
def test_a_slow_rank_is_named(data: Path, tmp_path: Path, cause: str, fault_table: FaultTable) -> None:
    start = time.time()
    (line,) = pretrain(data, tmp_path / "run", WORDS, {cause: LATE_S[cause]})
    assert f"rank {SLOW_RANK} on " in line
    assert f"cause: {cause} " in line
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["slowest_rank"], last["slowest_cause"], last["stragglers"]) == (SLOW_RANK, cause, str(SLOW_RANK))
    assert last["slowest_own_s"] >= 0.06 > last["own_s"] > 0
    (status,) = json.loads(dsbert("status", str(tmp_path / "run"), "--json").stdout)
    assert status["slowest_rank"]["rank"] == SLOW_RANK
    assert status["slowest_rank"]["straggler"]
    shown = " ".join(dsbert("status", str(tmp_path / "run")).stdout.split())
    assert f"slowest rank {SLOW_RANK} on " in shown
    assert f"({cause}, a straggler)" in shown
    what = f"one of four ranks is slow ({cause}): it is named, and all go on"
    fault_table.row("28", what, time.time() - start, (0, 0, 0, 0), {"rank": SLOW_RANK})


@pytest.mark.slow
@pytest.mark.timeout(600)  # a machine that is as busy as this is about takes its time
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_nobody_is_named_where_ranks_fight_for_cores(data: Path, tmp_path: Path, stage: int) -> None:
    """Four ranks on the cores of one machine, which has other work as well; 125 steps at each ZeRO stage."""
    words = ("optim.total_steps=125", "eval.every_steps=50", "checkpoint.every_steps=25", "log.every_steps=25")
    deepspeed = ("deepspeed.config=zero0_fp32", f"deepspeed.overrides.zero_optimization.stage={stage}")
    assert pretrain(data, tmp_path / "run", (*WORDS, *words, *deepspeed), {}) == []
