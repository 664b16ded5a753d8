"""TrainEngine, mask updates and checkpoints through DeepSpeed: real ranks, real gloo, each ZeRO stage in processes of
its own. A launch costs ten seconds, so each one checks many things.

The micro-batches of a step are the same at 2 and at 3 ranks (12 samples, 2 at a time), and dropout depends on where a
micro-batch starts alone: every fp32 run below must take the same way, dropout included.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import run_distributed

STEPS, SAVE_AT = 20, 10
FURTHER_BF16 = [(0, 2), (2, 2), (3, 2), (0, 3), (1, 3), (2, 3), (3, 3)]


def train_save_resume(stage: int, dtype: str, directory: str, low_rank: int = 0) -> dict[str, Any]:
    """Train 20 steps with 4 mask updates, saving at 10; load that into a second engine and train the rest again."""
    import torch

    from dsbert.base import collectives
    from dsbert.cluster import process_group
    from tests import workbench as bench

    world = process_group.init(60)
    recipe = bench.recipe(deepspeed=bench.zero_config(stage, dtype), sparsity={"low_rank": low_rank})
    source = bench.stream()
    engine, masks = bench.engine_and_masks(recipe, world)
    masks.verify_replicas()
    companions = Path(directory) / "companions"
    companions.mkdir(exist_ok=True)
    losses, norms, digests, block_norms, at_save = [], [], [], [], None
    for step in range(1, STEPS + 1):
        result = engine.train_step(bench.step_batches(engine, source, step - 1))
        losses.append(result.mean_losses())
        norms.append(result.grad_norm)
        before = bench.held_elements(engine)
        update = masks.maybe_update(step)
        if update:
            bench.check_update(engine, before, update)
            digests.append(update.digest)
            block_norms.append(update.norms)
        if step == SAVE_AT:
            from dsbert.checkpoint.publisher import Retention
            from dsbert.checkpoint.state import Totals
            from dsbert.checkpoint.writer import CheckpointWriter

            writer = CheckpointWriter(Path(directory), companions, attempt="1-test", retention=Retention(2))
            at_save = writer.save(engine, masks, bench.run_record(engine.recipe), Totals()).path
    assert at_save is not None
    collectives.assert_replicas_agree("the weights", engine.replica_digests())
    first = bench.held_elements(engine), masks.digest(), masks.dof

    from dsbert.checkpoint.loading import load_checkpoint, verify_checkpoint

    assert verify_checkpoint(at_save) == []
    engine, masks = bench.engine_and_masks(recipe, world)
    state = load_checkpoint(at_save, engine, masks)
    assert (state.step, engine.step, state.adam_step) == (SAVE_AT, SAVE_AT, SAVE_AT)
    again = []
    for step in range(SAVE_AT + 1, STEPS + 1):
        again.append(engine.train_step(bench.step_batches(engine, source, step - 1)).mean_losses())
        masks.maybe_update(step)
    assert again == losses[SAVE_AT:], "a resumed run must take the same way, bit for bit"
    second = bench.held_elements(engine), masks.digest(), masks.dof
    assert first[1:] == second[1:]
    for name, tensors in first[0].items():
        for kind, (offset, tensor) in tensors.items():
            assert torch.equal(tensor, second[0][name][kind][1]), (name, kind, offset)
    return {"losses": losses, "digests": digests, "norms": norms, "block_norms": block_norms}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Stage 0 in fp32 on 2 ranks: plain data parallelism, which the others are measured against."""
    ranks = run_distributed(train_save_resume, 2, _args(0, "fp32", tmp_path_factory.mktemp("stage0")))
    _same_on_all_ranks(ranks)
    return ranks[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "world_size"),
    [(1, 2), (2, 2), (3, 2), (1, 3)] + [pytest.param(stage, 3, marks=pytest.mark.exhaustive) for stage in (0, 2, 3)],
)
def test_every_stage_and_world_takes_the_same_way(
    stage: int, world_size: int, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    ranks = run_distributed(train_save_resume, world_size, _args(stage, "fp32", tmp_path))
    _same_on_all_ranks(ranks)
    assert ranks[0]["digests"] == undisturbed["digests"]
    assert len(set(undisturbed["digests"])) == 4
    for found, expected in zip(ranks[0]["losses"], undisturbed["losses"], strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    assert ranks[0]["norms"] == pytest.approx(undisturbed["norms"], rel=1e-4)
    for layers, expected_layers in zip(ranks[0]["block_norms"], undisturbed["block_norms"], strict=True):
        for name, groups in expected_layers.items():
            for group, summary in groups.items():
                assert layers[name][group] == pytest.approx(summary, rel=1e-4), (name, group)


@pytest.mark.parametrize(
    ("stage", "world_size"),
    [(1, 2), *(pytest.param(*cell, marks=pytest.mark.exhaustive) for cell in FURTHER_BF16)],
)
def test_bf16_agrees_on_all_ranks_and_resumes_exactly(
    stage: int, world_size: int, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    ranks = run_distributed(train_save_resume, world_size, _args(stage, "bf16", tmp_path))
    _same_on_all_ranks(ranks)
    for found, expected in zip(ranks[0]["losses"], undisturbed["losses"], strict=True):
        assert found == pytest.approx(expected, abs=2e-2)


def test_the_run_learns_and_reports_finite_norms(undisturbed: dict[str, Any]) -> None:
    mlm = [loss for loss, _ in undisturbed["losses"]]
    assert sum(mlm[-4:]) < sum(mlm[:4]) - 0.2
    assert all(math.isfinite(norm) and norm > 0 for norm in undisturbed["norms"])


def _args(stage: int, dtype: str, directory: Path) -> dict[str, Any]:
    return {"stage": stage, "dtype": dtype, "directory": str(directory)}


def _same_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks[1:]:
        assert rank == ranks[0]
