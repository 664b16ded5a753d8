"""ZeRO's buffer for gradients is as large as they are, and what is reduced together stays the same."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers import run_distributed


def steps(stage: int, dtype: str) -> dict[str, Any]:
    """By whether the bucket is made to fit: elements of all parameters, of the bucket, and the losses' bits."""
    from unittest import mock

    from dsbert.cluster import process_group
    from dsbert.engine import ds_engine
    from dsbert.engine.zero_shards import full_shape
    from tests import workbench as bench

    world = process_group.init(60)
    found = {}
    for fits in (True, False):
        recipe = bench.recipe(
            sparsity={"kernels": "cpu"},
            deepspeed=bench.zero_config(stage, dtype),
            batch={"global_batch": 8, "micro_batch": 2},
        )
        original = ds_engine._with_buckets_that_fit
        with mock.patch.object(ds_engine, "_with_buckets_that_fit", original if fits else lambda config, model: config):
            engine, _ = bench.engine_and_masks(recipe, world)
        results = [engine.train_step(bench.step_batches(engine, bench.stream(), step)) for step in range(3)]
        found[str(fits)] = {
            "parameters": sum(full_shape(parameter).numel() for parameter in engine.parameters.values()),
            "bucket": engine.deepspeed_engine.optimizer.reduce_bucket_size,
            "losses": [loss.hex() for result in results for loss in result.losses.tolist()],
            "asked for": engine.ds_config["zero_optimization"].get("reduce_bucket_size"),
        }
    return found


@pytest.mark.parametrize(("stage", "dtype"), [(1, "fp32"), (2, "bf16"), (3, "fp32")])
def test_a_bucket_holds_all_gradients_and_no_more(stage: int, dtype: str) -> None:
    for found in run_distributed(steps, 2, {"stage": stage, "dtype": dtype}):
        assert found["True"]["bucket"] == found["True"]["parameters"]
        assert found["False"]["bucket"] == 500_000_000  # if not, DeepSpeed's default has changed
        assert found["True"]["losses"] == found["False"]["losses"]
        assert found["True"]["asked for"] is None, "records say what the JSON says"


def test_a_smaller_bucket_that_is_asked_for_stays() -> None:
    import torch

    from dsbert.engine.ds_engine import _with_buckets_that_fit

    model = torch.nn.Linear(10, 10)
    for asked, expected in ((7, 7), (10**9, 110)):
        config = {"zero_optimization": {"stage": 2, "reduce_bucket_size": asked}}
        assert _with_buckets_that_fit(config, model)["zero_optimization"] == {
            "stage": 2,
            "reduce_bucket_size": expected,
        }
        assert config["zero_optimization"]["reduce_bucket_size"] == asked
