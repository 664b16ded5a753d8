"""Recipes, overrides and the DeepSpeed JSON."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import pytest

from dsbert.base.errors import UserError
from dsbert.config.lr_schedule import learning_rate
from dsbert.config.recipe import load_recipe, recipe_from_dict, sparse_lr_factor
from dsbert.config.recipe_files import RECIPES, recipe_names
from dsbert.config.sections import BatchConfig
from dsbert.engine.ds_config import ds_config_names, load_ds_config, precision, zero_stage
from dsbert.engine.micro_batches import cut


def test_the_family_of_the_paper() -> None:
    assert recipe_names() == sorted(
        [
            "demo",
            "modernbert-demo",
            "continue-base",
            "wikibooks",
            "wikibooks-phase2",
            *(f"bert-{size}" for size in ("tiny", "mini", "small", "medium", "base", "large")),
            *(f"short-{size}" for size in ("tiny", "mini", "medium")),
        ]
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


def rates(*overrides: str) -> list[float]:
    """Shares of the peak at each of ten steps, of which the first two warm up."""
    recipe = load_recipe("demo", ["optim.total_steps=10", "optim.warmup_steps=2", "sparsity.num_updates=2", *overrides])
    return [learning_rate(recipe.optim, 1.0, step) for step in range(1, 11)]


def test_schedules_of_the_learning_rate() -> None:
    """No step is taken in vain; a stable phase, where there is one, ends where decay_steps say."""
    assert rates() == pytest.approx([1 / 2, 1, *(left / 9 for left in range(8, 0, -1))])
    cosine = rates("optim.schedule=cosine")
    assert cosine[:2] == [0.5, 1.0]
    assert cosine[2:] == pytest.approx([0.5 * (1 + math.cos(math.pi * done / 9)) for done in range(1, 9)])
    stable = [1 / 2, 1, 1, 1, 1, 1, 1]
    assert rates("optim.schedule=wsd", "optim.decay_steps=3") == pytest.approx([*stable, 3 / 4, 2 / 4, 1 / 4])
    assert rates("optim.schedule=wsd", "optim.decay_steps=0.3") == rates("optim.schedule=wsd", "optim.decay_steps=3")
    assert rates("optim.schedule=wsd") == pytest.approx([*stable, 1, 1, 1 / 2])


def test_steps_may_be_shares_of_the_run() -> None:
    recipe = load_recipe("demo", ["optim.total_steps=1000", "optim.warmup_steps=0.06"])
    assert recipe.optim.warmup_steps == 60
    assert recipe.model_dump(mode="json")["optim"]["warmup_steps"] == 60
    assert load_recipe("demo", ["optim.warmup_steps=0"]).optim.warmup_steps == 0


def test_what_is_at_its_default_is_in_no_record() -> None:
    """Else no run of before would be resumed."""
    recipe = load_recipe("demo")
    assert "init_from" not in recipe.model_dump(mode="json")
    assert {"schedule", "decay_steps"}.isdisjoint(recipe.identity()["optim"])
    assert load_recipe("demo", ["optim.schedule=wsd"]).identity()["optim"]["schedule"] == "wsd"


def test_yaml_that_reads_numbers_as_strings(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "dsbert" / "recipes" / "demo.yaml").read_text()
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
        ("optim.warmup_steps=1.5", "recipe key 'optim.warmup_steps'"),
        ("optim.decay_steps=10", "expected decay_steps with schedule wsd alone, found schedule linear"),
        (
            "lr_scheduler_type=cosine",
            "unknown recipe key 'lr_scheduler_type': the nearest known key is 'optim.schedule'",
        ),
        ("sparsity.num_updates=800000", "expected sparsity.num_updates of at most total_steps"),
        ("data.seq_len=1024", "expected data.seq_len of at most model.max_positions 512"),
        ("model.num_heads=5", "expected num_heads that divides hidden_size"),
        ("seed", "expected an override a.b=value"),
        ("seed.x=1", "expected a section at 'seed'"),
        ("model.hidden_size=[", "expected a YAML value"),
        ("optim.learning_rate=1e-3", "the nearest known key is 'optim.lr'"),
        ("batch_size=8", "the nearest known key is 'batch.global_batch'"),
        ("epochs=8", "the nearest known key is 'optim.total_steps'"),
        ("num_layer=8", "the nearest known key is 'model.num_layers'"),
        ("optim.zzz=8", "unknown recipe key 'optim.zzz': known here: total_steps, warmup_steps"),
        ("data.path=", "recipe key 'data.path': expected a path, found null"),
        ("data.path=''", "recipe key 'data.path': expected a path, found ''"),
        ("data.stage_to=''", "recipe key 'data.stage_to': expected a path, found ''"),
        ("deepspeed.config=''", "recipe key 'deepspeed.config': expected text"),
        ("name=../a", "expected a name that a directory can have"),
        ("seed=99999999999999999999", "expected less than 9223372036854775808"),
        ("optim.lr=1e-3", "expected exactly one of lr and dense_lr, found both"),
    ],
)
def test_a_mistake_is_one_line(override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("bert-base", [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_mistakes_stand_in_one_line() -> None:
    overrides = ["seed", "optim.eps=true", "batch_size=3", "data.seq_len=0100", "model.hidden_size=wide"]
    with pytest.raises(UserError) as caught:
        load_recipe("demo", overrides)
    complaints = str(caught.value).split("; ")
    assert [next(word for word in overrides if word.split("=")[0] in one) for one in complaints] == [
        "seed", "data.seq_len=0100", "model.hidden_size=wide", "optim.eps=true", "batch_size=3",
    ]  # fmt: skip
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "written", "expected"),
    [
        (22, "total_steps: 10:00", "(mine.yaml, line 22): expected a whole number, found '10:00'"),
        (22, "total_steps: 0100", "line 22: the number 0100, octal to some readers and decimal to others"),
        (22, "total_steps: true", "(mine.yaml, line 22): expected a whole number, found true"),
        (22, "total_steps: .inf", "line 22: the number .inf, which is not finite"),
        (22, "total_steps: 1e999", "line 22: the number 1e999, which is not finite"),
        (22, "total_steps: 1_000", "(mine.yaml, line 22): expected a whole number, found '1_000'"),
        (22, "total_steps: 800.5", "(mine.yaml, line 22): expected a whole number, found 800.5"),
        (22, "total_steps: '800'", "(mine.yaml, line 22): expected a whole number, found '800'"),
        (22, "total_steps: !!int '800'", "line 22: the tag"),
        (22, "total_steps: 1\n  total_steps: 1", "line 23: 'optim.total_steps' again, after line 22"),
        (22, "total_steps: 1\noptim:", "line 23: 'optim' again, after line 21"),
        (22, "total_steps: *other", "line 22: found undefined alias 'other'"),
        (22, "total_steps: &more [*more]", "more than 5000 values, with what aliases repeat"),
        (22, "<<: {total_steps: 1}", "line 22: a merge key"),
        (22, "\ttotal_steps: 1", "line 22: "),
        (17, "nsp: yes", "(mine.yaml, line 17): expected true or false, found 'yes'"),
        (17, "seq_len: 64\n---", "line 18: "),
        (11, "sparsity: true", "(mine.yaml, line 11): expected a number, found true"),
    ],
)
def test_a_recipe_is_yaml_1_2_and_nothing_is_taken_for_something_else(
    line: int, written: str, expected: str, tmp_path: Path
) -> None:
    lines = (RECIPES / "demo.yaml").read_text().splitlines()
    lines[line - 1] = "  " + written
    (tmp_path / "mine.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        load_recipe(str(tmp_path / "mine.yaml"))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_yaml_1_2_knows_is_read(tmp_path: Path) -> None:
    text = (RECIPES / "demo.yaml").read_text()
    path = tmp_path / "mine.yaml"
    changed = text.replace("total_steps: 800", "total_steps: &steps 8e2").replace(
        "warmup_steps: 80", "warmup_steps: 0x50"
    )
    path.write_bytes(
        b"\xef\xbb\xbf" + changed.replace("sequences: 512", "sequences: *steps").replace("\n", "\r\n").encode()
    )
    recipe = load_recipe(str(path), ["seed=0o17", "name=on", "optim.eps=1e-7"])
    assert (recipe.optim.total_steps, recipe.optim.warmup_steps, recipe.eval.sequences) == (800, 80, 800)
    assert (recipe.seed, recipe.name, recipe.optim.eps) == (15, "on", 1e-7)


def test_files_that_are_no_recipes_end_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\n# caf\xe9\n")
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(2**30)
    bomb = ["a: &a0 [x, x, x, x, x, x, x, x, x]"]
    bomb += [f"b{n}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]" for n in range(9)]
    (tmp_path / "bomb.yaml").write_text("\n".join(bomb))
    (tmp_path / "deep.yaml").write_text("[" * 60_000)
    (tmp_path / "wide.yaml").write_text(f"[{'a,' * 30_000}]")
    start = time.process_time()
    for name, expected in {
        "fifo": "no regular file",
        "": "no regular file",
        "latin.yaml": "line 2: the byte 0xe9, which is not UTF-8",
        "huge.yaml": "1073741824 bytes",
        "bomb.yaml": "with what aliases repeat",
        "deep.yaml": "more than 32 levels",
        "wide.yaml": "more than 5000 values",
    }.items():
        with pytest.raises(UserError, match=expected):
            load_recipe(str(tmp_path / name))
    with pytest.raises(UserError, match="no regular file"):
        load_recipe("/dev/zero")
    assert time.process_time() - start < 7  # a second each


@pytest.mark.parametrize(
    ("recipe", "overrides", "expected"),
    [
        ("demo", [], (800, 80, 40)),
        ("demo", ["optim.total_steps=800"], (800, 80, 40)),
        ("demo", ["optim.total_steps=50"], (50, 5, 40)),
        ("demo", ["optim.total_steps=5"], (5, 0, 5)),
        ("demo", ["optim.total_steps=1"], (1, 0, 1)),
        ("demo", ["optim.total_steps=1600"], (1600, 160, 40)),
        ("demo", ["optim.total_steps=50", "optim.warmup_steps=7"], (50, 7, 40)),
        ("demo", ["sparsity.num_updates=20", "optim.total_steps=50"], (50, 5, 20)),
        ("bert-base", ["optim.total_steps=1000"], (1000, 13, 80)),
        ("bert-base", ["optim.total_steps=20"], (20, 0, 20)),
    ],
)
def test_warm_up_and_updates_follow_the_steps(recipe: str, overrides: list[str], expected: tuple[int, ...]) -> None:
    found = load_recipe(recipe, overrides)
    assert (found.optim.total_steps, found.optim.warmup_steps, found.sparsity.num_updates) == expected


def test_what_is_asked_for_is_not_lowered() -> None:
    with pytest.raises(UserError, match="expected warmup_steps below total_steps 50, found 70"):
        load_recipe("demo", ["optim.total_steps=50", "optim.warmup_steps=70"])
    with pytest.raises(UserError, match=r"expected sparsity\.num_updates of at most total_steps 50, found 70"):
        load_recipe("demo", ["optim.total_steps=50", "sparsity.num_updates=70"])


def test_identity_leaves_out_what_may_change_on_resume() -> None:
    base = load_recipe("demo").identity()
    for override in (
        "batch.micro_batch=8",
        "deepspeed.config=zero3_bf16",
        "log.every_steps=1",
        "log.wandb_group=sweep",
        "log.wandb_artifacts=true",
        "log.tensorboard=true",
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
    """Every sample on one rank, every rank with samples, in micro-batches as large as that allows."""
    batch = BatchConfig(global_batch=512, micro_batch=micro_batch).on_ranks(world_size)
    plans = [cut(batch, rank, world_size) for rank in range(world_size)]
    assert [sample for plan in plans for part in plan for sample in range(part.first, part.first + part.count)] == [
        *range(512)
    ]
    assert all(0 < part.count <= batch.micro_batch <= micro_batch for plan in plans for part in plan)
    lengths = {len(plan) for plan in plans}
    assert max(lengths) - min(lengths) <= 1
    if batch.micro_batch < micro_batch:
        assert lengths == {1}
        assert math.ceil(512 / micro_batch) <= world_size, "there was a reason"
        counts = {part.count for (part,) in plans}
        assert max(counts) == math.ceil(512 / world_size)


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


def test_rates_by_density() -> None:
    rates = {
        rule: load_recipe("demo", [f"optim.lr_rule={rule}"]).peak_lr / 6e-4
        for rule in ("eq3", "inverse", "inverse_sqrt")
    }
    assert rates == pytest.approx({"eq3": 6.40, "inverse": 10.0, "inverse_sqrt": 10**0.5}, rel=1e-3)


def test_options_that_are_off_leave_no_trace_in_records() -> None:
    """So that runs that began before there were any are resumed."""
    found = load_recipe("demo").model_dump(mode="json")
    later = {
        "update_every_steps", "update_from", "update_until", "min_age_updates", "initial_scale", "fresh_moments",
        "low_rank",
    }  # fmt: skip
    assert not later & set(found["sparsity"])
    assert "lr_rule" not in found["optim"]
    on = load_recipe("demo", ["sparsity.update_every_steps=20", "sparsity.min_age_updates=2", "optim.lr_rule=inverse"])
    assert on.identity()["sparsity"]["update_every_steps"] == 20
    assert on.identity()["optim"]["lr_rule"] == "inverse"
    assert recipe_from_dict(on.model_dump(mode="json")) == on


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sparsity.update_every_steps=0", "sparsity.update_every_steps.*more than 0"),
        ("sparsity.update_until=0.001", "expected 1 to 0 pattern updates, found 40"),
        ("sparsity.update_from=0.5", None),
    ],
)
def test_updates_must_fit_their_part_of_the_run(override: str, message: str | None) -> None:
    if message is None:
        load_recipe("demo", [override])
        return
    with pytest.raises(UserError, match=message):
        load_recipe("demo", [override])
    with pytest.raises(UserError, match="update_from below update_until"):
        load_recipe("demo", ["sparsity.update_from=0.5", "sparsity.update_until=0.5"])


@pytest.mark.parametrize("name", ["1e5", "0o7", "yes", "12:30", "null"])
def test_a_recipe_written_as_a_document_is_read_as_it_was(name: str, tmp_path: Path) -> None:
    recipe = load_recipe("demo").model_copy(update={"name": name})
    (tmp_path / "written.yaml").write_text(recipe.as_document())
    assert load_recipe(str(tmp_path / "written.yaml")) == recipe
