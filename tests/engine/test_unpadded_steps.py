"""Steps without padding: ranks have unequally many tokens, and one of them has none. At every ZeRO stage the same.

12 samples in micro-batches of 5 are three: of two ranks the first has one, and a micro-batch without samples beside the
second's last one.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers import run_distributed

STEPS = 4


def steps(stage: int, dtype: str, micro_batch: int) -> dict[str, Any]:
    """A few steps, without dropout: losses, norms, and what was computed for them."""
    from dsbert.base import collectives
    from dsbert.cluster import process_group
    from tests import workbench as bench

    world = process_group.init(60)
    recipe = bench.recipe(
        model={"dropout": 0.0},
        batch={"global_batch": 12, "micro_batch": micro_batch},
        deepspeed=bench.zero_config(stage, dtype),
    )
    engine, _ = bench.engine_and_masks(recipe, world)
    engine.prove_layout()
    source = bench.stream()
    found: dict[str, Any] = {"losses": [], "norms": [], "computed": []}
    for step in range(STEPS):
        result = engine.train_step(bench.step_batches(engine, source, step))
        found["losses"].append(result.mean_losses())
        found["norms"].append(result.grad_norm)
        found["computed"].append((result.tokens, result.positions, result.pairs))
    losses, _ = engine.evaluate_batch(source.batch(0, 3 * (world.rank == 0)))  # at stage 3 together
    found["evaluated"] = collectives.gather_json(losses.tolist())
    found["plan"] = collectives.gather_json([micro.count for micro in engine.plan()])
    collectives.assert_replicas_agree("the weights", engine.replica_digests())
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """All samples at once, on one rank."""
    return run_distributed(steps, 1, {"stage": 0, "dtype": "fp32", "micro_batch": 12})[0]


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        *[(1, "fp32"), (3, "fp32")],
        *(pytest.param(*cell, marks=pytest.mark.slow) for cell in [(0, "fp32"), (2, "fp32"), (3, "bf16")]),
        *(pytest.param(stage, "bf16", marks=pytest.mark.exhaustive) for stage in (0, 1, 2)),
    ],
)
def test_every_stage_takes_the_same_steps(stage: int, dtype: str, alone: dict[str, Any]) -> None:
    first, second = run_distributed(steps, 2, {"stage": stage, "dtype": dtype, "micro_batch": 5})
    assert first == second
    assert first["plan"] == [[5, 0], [5, 2]]
    close = {"fp32": 1e-5, "bf16": 2e-2}[dtype]
    for found, expected in zip(first["losses"], alone["losses"], strict=True):
        assert found == pytest.approx(expected, abs=close)
    assert first["norms"] == pytest.approx(alone["norms"], rel=10 * close)
    assert first["evaluated"][0] == pytest.approx(alone["evaluated"][0], rel=10 * close)
    assert first["evaluated"][1] == [0.0, 0.0]
    # One token stands in for the samples that are not there.
    assert first["computed"] == [[tokens, positions + 1, pairs + 2] for tokens, positions, pairs in alone["computed"]]


def test_what_is_computed_is_counted(alone: dict[str, Any]) -> None:
    from tests import workbench as bench

    source = bench.stream()
    for step, computed in enumerate(alone["computed"]):
        lengths = source.batch(12 * step, 12).attention_mask.sum(1)
        assert lengths.sum() < 0.95 * 12 * bench.SEQ_LEN, "there would be padding"
        assert computed == [lengths.sum(), lengths.sum(), 2 * (lengths**2).sum()]
