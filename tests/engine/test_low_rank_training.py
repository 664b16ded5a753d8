"""Blocks and U V trained through DeepSpeed, each ZeRO stage in processes of its own: as plain torch trains them,
resumed to the bit, and at another number of ranks and stage with what was saved.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_engine import train_save_resume
from tests.helpers import run_distributed

RANK, STEPS, FURTHER = 3, 6, 2
slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive
EXHAUSTIVE = [(0, 1), (1, 1), (2, 1), (3, 1), (2, 2)]
CELLS = [
    (1, 2),
    *(pytest.param(*cell, marks=slow) for cell in ((0, 2), (3, 2))),
    *(pytest.param(*cell, marks=exhaustive) for cell in EXHAUSTIVE),
]


def _recipe(stage: int, dtype: str = "fp32") -> Any:
    from tests import workbench as bench

    return bench.recipe(
        model={"dropout": 0.0},  # whose draws plain torch does not know
        sparsity={"pattern": "static", "low_rank": RANK},
        optim={"total_steps": 20, "warmup_steps": 2, "lr": 5e-3, "weight_decay": 1.0},
        deepspeed=bench.zero_config(stage, dtype),
    )


def train(stage: int, directory: str, dtype: str = "fp32", start: str = "", steps: int = STEPS) -> list[list[float]]:
    """Take so many steps, from a checkpoint where one is named, and save; the losses of each."""
    from dsbert.checkpoint.loading import load_checkpoint
    from dsbert.checkpoint.publisher import Retention
    from dsbert.checkpoint.state import Totals
    from dsbert.checkpoint.writer import CheckpointWriter
    from dsbert.cluster import process_group
    from tests import workbench as bench

    engine, masks = bench.engine_and_masks(_recipe(stage, dtype), process_group.init(60))
    engine.prove_layout()
    if start:
        load_checkpoint(Path(start), engine, masks)
    losses = []
    for _ in range(steps):
        losses.append(list(engine.train_step(bench.step_batches(engine, bench.stream(), engine.step)).mean_losses()))
    companions = Path(directory) / "companions"
    companions.mkdir(exist_ok=True)
    writer = CheckpointWriter(Path(directory), companions, attempt="1-test", retention=Retention(9))
    writer.save(engine, masks, bench.run_record(engine.recipe), Totals())
    return losses


def _summed(layer: Any) -> Callable[[Any], Any]:
    """The layer as dense autograd sees it: x (scatter(blocks) + U V)^T + b, and GELU where it is the layer's."""
    from torch.nn import functional

    from tests.sparse.toys import densify

    def forward(x: Any) -> Any:
        weight = densify(layer.shape, layer.blocks, layer.rows, layer.cols) + layer.low_rank_u @ layer.low_rank_v
        y = functional.linear(x, weight, layer.bias)
        return y if layer.activation is None else functional.gelu(y)

    return forward


def _plain() -> tuple[list[list[float]], list[dict[str, Any]]]:
    """The same steps by plain torch in one process: losses, and weights after each step."""
    import torch

    from dsbert.models.construction import build_model
    from dsbert.models.device_batch import DeviceBatch
    from tests import workbench as bench

    recipe = _recipe(0)
    model, layers = build_model(recipe, bench.VOCAB_SIZE)
    for layer in layers.values():
        layer.forward = _summed(layer)  # type: ignore[assignment]  # in place of the method
    matrices = [param for param in model.parameters() if param.dim() > 1]
    vectors = [param for param in model.parameters() if param.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": 1.0}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-6)
    losses, weights = [], []
    for step in range(1, STEPS + FURTHER + 1):
        batch = bench.stream().batch((step - 1) * 12, 12)
        pairs = int((batch.nsp_labels >= 0).sum())
        summed, _ = model.train()(DeviceBatch.of(batch, torch.device("cpu")))
        means = torch.stack([summed[0] / batch.mlm_labels.size, summed[1] / max(pairs, 1)])
        optimizer.zero_grad()
        means.sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (step / 2 if step <= 2 else (21 - step) / 19)
        optimizer.step()
        losses.append(means.tolist())
        weights.append({name: param.detach().clone() for name, param in model.named_parameters()})
    return losses, weights


@pytest.fixture(scope="module")
def plain() -> tuple[list[list[float]], list[dict[str, Any]]]:
    return _plain()


def _saved(directory: Path, step: int, kind: str = "master") -> dict[str, Any]:
    """All parameters of a checkpoint, whole."""
    import torch

    from dsbert.checkpoint.loading import fragment_reader
    from dsbert.models.construction import build_model
    from tests import workbench as bench

    model, _ = build_model(_recipe(0), bench.VOCAB_SIZE)
    reader = fragment_reader(directory / f"step_{step:08d}")
    return {
        name: torch.from_numpy(reader.read(name, kind, 0, param.numel())).view(param.shape)
        for name, param in model.named_parameters()
    }


def _same(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """Adam moves a weight whose gradient is rounding by as much as others: those of a key's bias, which no softmax
    sees."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not name.endswith("key.bias"):
            assert (found[name] - value).norm() < tolerance * max(float(value.norm()), 1e-2), name


@pytest.mark.parametrize(("stage", "world_size"), CELLS)
def test_trains_as_plain_torch_does(stage: int, world_size: int, plain: Any, tmp_path: Path) -> None:
    losses, weights = plain
    ranks = run_distributed(train, world_size, {"stage": stage, "directory": str(tmp_path)})
    for own in ranks:
        for found, expected in zip(own, losses, strict=False):
            assert found == pytest.approx(expected, abs=2e-5)
    saved = _saved(tmp_path, STEPS)
    assert any(name.endswith("low_rank_u") for name in saved)
    _same(saved, weights[STEPS - 1], 2e-3)
    # The term does something: else all this would say nothing of it.
    largest = [float(value.abs().max()) for name, value in saved.items() if name.endswith("low_rank_u")]
    assert len(largest) == 12
    assert min(largest) > 0
    assert sorted(largest)[6] > 5e-3


@pytest.mark.parametrize(
    "stage", [1, pytest.param(3, marks=slow), *(pytest.param(stage, marks=exhaustive) for stage in (0, 2))]
)
def test_trains_in_bf16_about_as_plain_torch_does(stage: int, plain: Any, tmp_path: Path) -> None:
    ranks = run_distributed(train, 2, {"stage": stage, "directory": str(tmp_path), "dtype": "bf16"})
    assert ranks[0] == ranks[1]
    for found, expected in zip(ranks[0], plain[0], strict=False):
        assert found == pytest.approx(expected, abs=4e-2)


def test_goes_on_at_another_stage_and_number_of_ranks(plain: Any, tmp_path: Path) -> None:
    """Stage 3 on 2 ranks, then stage 1 on 1: what was saved is loaded, to the bit, and the steps are the same."""
    import torch

    (tmp_path / "one").mkdir()
    run_distributed(train, 2, {"stage": 3, "directory": str(tmp_path / "one")})
    start = str(tmp_path / "one" / f"step_{STEPS:08d}")
    for steps, name in ((0, "loaded"), (FURTHER, "on")):
        (tmp_path / name).mkdir()
        args = {"stage": 1, "directory": str(tmp_path / name), "start": start, "steps": steps}
        found = run_distributed(train, 1, args)[0]
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        before, after = _saved(tmp_path / "one", STEPS, kind), _saved(tmp_path / "loaded", STEPS, kind)
        assert all(torch.equal(before[name], after[name]) for name in before)
    for own, expected in zip(found, plain[0][STEPS:], strict=True):
        assert own == pytest.approx(expected, abs=1e-4)
    _same(_saved(tmp_path / "on", STEPS + FURTHER), plain[1][-1], 4e-3)


def shrink(stage: int) -> None:
    """A step with a strong Group Lasso and one without: other blocks, the same U and V, which had the same gradient."""
    import torch

    from dsbert.cluster import process_group
    from tests import workbench as bench

    world, found = process_group.init(60), []
    for strength in (0.0, 50.0):
        recipe = _recipe(stage)
        sparsity = recipe.sparsity.model_copy(update={"group_lasso": strength})
        engine, _ = bench.engine_and_masks(recipe.model_copy(update={"sparsity": sparsity}), world)
        engine.train_step(bench.step_batches(engine, bench.stream(), 0))
        found.append({name: shard.master.clone() for name, shard in engine.shards().items()})
    for name, without in found[0].items():
        assert torch.equal(found[1][name], without) != (name.endswith(".blocks") and without.numel() > 0), name


@pytest.mark.parametrize("stage", [3, pytest.param(1, marks=exhaustive)])
def test_group_lasso_pulls_the_blocks_alone(stage: int) -> None:
    run_distributed(shrink, 1, {"stage": stage})


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        (3, "bf16"),
        *(pytest.param(stage, "fp32", marks=slow) for stage in (0, 2)),
        *(
            pytest.param(stage, dtype, marks=exhaustive)
            for stage, dtype in ((1, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"))
        ),
    ],
)
def test_with_mask_updates_it_resumes_to_the_bit(stage: int, dtype: str, tmp_path: Path) -> None:
    """And all but the pruned blocks stand still in an update, U and V among them: `bench.check_update`."""
    args = {"stage": stage, "dtype": dtype, "directory": str(tmp_path), "low_rank": RANK}
    first, second = run_distributed(train_save_resume, 2, args)
    assert first == second
