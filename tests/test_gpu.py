"""A smoke test on a real card: everything else runs without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers import run_distributed


def train_on_the_card(stage: int, directory: str) -> dict[str, Any]:
    from dsbert.checkpoint.loading import load_checkpoint
    from dsbert.checkpoint.publisher import Retention
    from dsbert.checkpoint.state import Totals
    from dsbert.checkpoint.writer import CheckpointWriter
    from dsbert.cluster import process_group
    from tests import workbench as bench

    world = process_group.init(60)
    assert world.device.type == "cuda"
    engine, masks = bench.engine_and_masks(bench.recipe(deepspeed=bench.zero_config(stage, "bf16")), world)
    source = bench.stream()
    losses = []
    for step in range(1, 21):
        losses.append(engine.train_step(bench.step_batches(engine, source, step - 1)).mean_losses()[0])
        before = bench.held_elements(engine)
        update = masks.maybe_update(step)
        if update:
            bench.check_update(engine, before, update)
    (Path(directory) / "companions").mkdir()
    writer = CheckpointWriter(Path(directory), Path(directory) / "companions", attempt="1-test", retention=Retention(1))
    path = writer.save(engine, masks, bench.run_record(engine.recipe), Totals()).path
    digest = masks.digest()
    engine, masks = bench.engine_and_masks(engine.recipe, world)
    load_checkpoint(path, engine, masks)
    assert masks.digest() == digest
    again = engine.train_step(bench.step_batches(engine, source, 20)).mean_losses()[0]
    assert abs(again - losses[-1]) < 1.0
    return {"first": losses[0], "last": losses[-1]}


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_small_run_on_one_card(stage: int, tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    (result,) = run_distributed(train_on_the_card, 1, {"stage": stage, "directory": str(tmp_path)})
    assert result["last"] < result["first"]
