"""Recipes, overrides and the DeepSpeed JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dsbert.config import BatchConfig, load_recipe, recipe_names, sparse_lr_factor
from dsbert.ds_config import ds_config_names, load_ds_config, precision, zero_stage
from dsbert.errors import UserError


def test_the_family_of_the_paper() -> None:
    assert recipe_names() == sorted(
        ["demo", "wikibooks", *(f"bert-{size}" for size in ("tiny", "mini", "small", "medium", "base", "large"))]
    )
    shapes = {
        "tiny": (2, 128),
        "mini": (4, 256),
        "small": (4, 512),
        "medium": (8, 512),
        "base": (12, 768),
        "large": (24, 1024),
    }
    for size, shape in shapes.items():
        recipe = load_recipe(f"bert-{size}")
        assert (recipe.model.num_layers, recipe.model.hidden_size) == shape
        assert recipe.model.intermediate_size == 4 * shape[1]
        assert recipe.model.hidden_size // recipe.model.num_heads == 64
        assert recipe.model.dropout == (0.1 if size in ("medium", "base", "large") else 0.0)
        assert (recipe.sparsity.sparsity, recipe.sparsity.block_size, recipe.sparsity.num_updates) == (0.9, 16, 80)
        assert (recipe.optim.eps, recipe.optim.weight_decay, recipe.optim.warmup_steps) == (1e-6, 0.01, 10_000)
        assert recipe.deepspeed.config == "zero1_bf16"


def test_learning_rate_rule() -> None:
    assert sparse_lr_factor(0.9) == pytest.approx(6.40, abs=0.005)
    assert sparse_lr_factor(0.0) == 1.0
    assert load_recipe("bert-medium").peak_lr == pytest.approx(2e-4 * 6.40, rel=1e-3)
    assert load_recipe("bert-medium", ["sparsity.pattern=dense"]).peak_lr == pytest.approx(2e-4)
    given = load_recipe("bert-medium", ["optim.dense_lr=null", "optim.lr=3e-4"])
    assert given.peak_lr == 3e-4


def test_yaml_that_reads_numbers_as_strings(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "dsbert" / "recipes" / "demo.yaml").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("seed: 1", "seed: 1").replace("dense_lr: ", "eps: 1e-6\n  dense_lr: "))
    assert load_recipe(str(path)).optim.eps == 1e-6


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "sparsity.blocksize=8",
            "unknown recipe key 'sparsity.blocksize': the nearest known key is 'sparsity.block_size'",
        ),
        ("sparcity.block_size=8", "the nearest known key is 'sparsity'"),
        ("sparsity.block_size=7", "recipe key 'sparsity.block_size'"),
        ("optim.warmup_steps=100000000", "expected warmup_steps below total_steps"),
        ("sparsity.num_updates=800000", "expected sparsity.num_updates of at most total_steps"),
        ("data.seq_len=1024", "expected data.seq_len of at most model.max_positions 512"),
        ("model.num_heads=5", "expected num_heads that divides hidden_size"),
        ("seed", "expected an override a.b=value"),
        ("seed.x=1", "expected a section at 'seed'"),
        ("model.hidden_size=[", "expected a YAML value"),
    ],
)
def test_a_mistake_is_one_line(override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("bert-base", [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_identity_leaves_out_what_may_change_on_resume() -> None:
    base = load_recipe("demo").identity()
    for override in (
        "batch.micro_batch=8",
        "deepspeed.config=zero3_bf16",
        "log.every_steps=1",
        "data.path=x",
        "sparsity.kernels=dense",
        "checkpoint.every_steps=7",
    ):
        assert load_recipe("demo", [override]).identity() == base
    for override in (
        "batch.global_batch=8",
        "sparsity.sparsity=0.8",
        "seed=2",
        "optim.total_steps=999",
        "optim.dense_lr=1e-5",
        "data.nsp=false",
        "model.dropout=0.2",
    ):
        assert load_recipe("demo", [override]).identity() != base


@pytest.mark.parametrize(
    ("name", "stage", "dtype"),
    [("zero0_fp32", 0, "fp32"), ("zero1_fp32", 1, "fp32"), ("zero1_bf16", 1, "bf16"), ("zero2_bf16", 2, "bf16"),
     ("zero3_bf16", 3, "bf16"), ("zero1_fp16", 1, "fp16")],
)  # fmt: skip
def test_ds_configs(name: str, stage: int, dtype: str) -> None:
    assert name in ds_config_names()
    config = load_ds_config(load_recipe("demo", [f"deepspeed.config={name}"]), world_size=2, accumulation_steps=3)
    assert (zero_stage(config), precision(config)) == (stage, dtype)
    assert config["train_batch_size"] == 2 * 3 * 16
    assert config["gradient_clipping"] == 1.0


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7, 16, 32, 33, 64, 100, 511, 512])
@pytest.mark.parametrize("micro_batch", [1, 3, 32, 512, 1000])
def test_a_batch_on_ranks(world_size: int, micro_batch: int) -> None:
    """As few micro-batches as allowed, of a size without which no rank could do."""
    batch = BatchConfig(global_batch=512, micro_batch=micro_batch)
    size, share = batch.on_ranks(world_size).micro_batch, math.ceil(512 / world_size)
    rounds = math.ceil(share / min(micro_batch, share))
    assert size <= micro_batch
    assert (rounds - 1) * size < share <= rounds * size < share + rounds


def test_more_ranks_than_samples_are_refused() -> None:
    with pytest.raises(UserError, match=r"each of 513 ranks, found 512: start at most 512 ranks, or give .*batch=513"):
        BatchConfig(global_batch=512, micro_batch=32).on_ranks(513)


def test_the_json_may_not_own_what_the_recipe_owns(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"optimizer": {"type": "Adam"}}))
    recipe = load_recipe("demo", [f"deepspeed.config={path}"])
    with pytest.raises(UserError, match="the recipe owns it as optim"):
        load_ds_config(recipe, 1, 1)
    path.write_text(json.dumps({"train_batch_size": "auto", "zero_optimization": {"stage": 2}}))
    assert zero_stage(load_ds_config(recipe, 1, 1)) == 2
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}))
    with pytest.raises(UserError, match="offload_optimizer"):
        load_ds_config(recipe, 1, 1)
    path.write_text("{")
    with pytest.raises(UserError, match="expected JSON"):
        load_ds_config(recipe, 1, 1)
    with pytest.raises(UserError, match="zero1_bf16"):
        load_ds_config(load_recipe("demo", ["deepspeed.config=zero9"]), 1, 1)
