"""The gradient of a step is that of the mean over the GLOBAL batch, however it is cut (micro-batches of 5 leave short
ones, and an empty one); so is the dense gradient that regrowth looks at. Both against plain autograd on the whole
batch, on the densified model, without DeepSpeed.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import run_distributed

BATCH = 12


def gradients(directory: str, micro_batches: list[int], stage: int = 0) -> None:
    """Per size of the micro-batch: rank 0 writes the step's gradients and the dense gradients of the sparse layers."""
    from safetensors.torch import save_file

    from dsbert.base import collectives
    from dsbert.cluster import process_group
    from tests import workbench as bench

    world = process_group.init(60)
    for size in micro_batches:
        engine, masks = bench.engine_and_masks(_recipe(size, stage), world)
        samples = [micro.first + row for micro in engine.plan() for row in range(micro.count)]
        everything = collectives.gather_json(samples)
        assert sorted(itertools.chain.from_iterable(everything)) == list(range(BATCH))
        assert all(everything), "no rank is without samples"
        found: dict[str, Any] = {}

        def keep(lr: float, engine: Any = engine, found: dict[str, Any] = found) -> float:
            if engine.zero_stage == 0:  # further stages keep only parts
                found.update({name: param.grad.clone() for name, param in engine.parameters.items()})
            return 0.0

        engine._finish_step = keep  # type: ignore[assignment]  # in place of the method
        engine.train_step(bench.step_batches(engine, bench.stream(), 0))
        found |= {f"dense.{name}": gradient for name, gradient in masks.dense_gradients().items()}
        if world.is_main:
            save_file({name: tensor.contiguous() for name, tensor in found.items()}, f"{directory}/{size}.safetensors")


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """From one backward over the batch of 12, dense: by parameter, with "dense.<layer>" beside the blocks."""
    import torch

    from dsbert.models.construction import build_model
    from dsbert.models.device_batch import DeviceBatch
    from tests import workbench as bench

    model, layers = build_model(_recipe(BATCH), bench.VOCAB_SIZE)
    names = {name: param for name, param in model.named_parameters() if not name.endswith(".blocks")}
    sparse = {name: copy.deepcopy(layer) for name, layer in layers.items()}
    linears = {}
    for name, layer in layers.items():
        linear = torch.nn.Linear(layer.in_features, layer.out_features)
        linear.weight.data = layer.to_dense()
        linear.register_parameter("bias", layer.bias)
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, linear)
        if layer.activation == "gelu":  # which the sparse layer applies itself
            owner.intermediate_act_fn = torch.nn.GELU()
        linears[name] = linear
    batch = bench.stream().batch(0, BATCH)
    losses, _ = model(DeviceBatch.of(batch, torch.device("cpu")))
    pairs = int((batch.nsp_labels >= 0).sum())
    assert 0 < pairs < BATCH, "of one sample in the batch nothing is asked: the means are over what is"
    (losses[0] / batch.mlm_labels.size + losses[1] / pairs).backward()
    found = {name: param.grad for name, param in names.items()}
    for name, linear in linears.items():
        layer, size = sparse[name], sparse[name].block_size
        blocked = linear.weight.grad.view(layer.shape[0] // size, size, layer.shape[1] // size, size).transpose(1, 2)
        found[f"{name}.blocks"] = blocked[layer.rows, layer.cols]
        found[f"dense.{name}"] = linear.weight.grad
    return found


@pytest.mark.parametrize(
    ("world_size", "micro_batches"), [(1, [12, 4]), (2, [6, 2, 5]), (3, [4]), (4, [3, 1]), (5, [2])]
)
def test_a_step_has_the_gradient_of_the_global_batch(
    world_size: int, micro_batches: list[int], expected: dict[str, Any], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    run_distributed(gradients, world_size, {"directory": str(tmp_path), "micro_batches": micro_batches})
    for size in micro_batches:
        found = load_file(tmp_path / f"{size}.safetensors")
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            error = (found[name] - gradient).norm() / gradient.norm()
            # The key projections' biases have a gradient of zero but for rounding: softmax does not see them.
            assert error < 1e-6 or gradient.norm() < 1e-7, (name, size, float(error))


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_dense_gradients_at_further_stages(stage: int, expected: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    args = {"directory": str(tmp_path), "micro_batches": [6, 2], "stage": stage}
    run_distributed(gradients, 2, args)
    for size in (6, 2):
        found = load_file(tmp_path / f"{size}.safetensors")
        for name, gradient in found.items():
            assert (gradient - expected[name]).norm() < 1e-6 * expected[name].norm(), (name, size)


def _recipe(micro_batch: int, stage: int = 0) -> Any:
    from tests import workbench as bench

    return bench.recipe(
        model={"dropout": 0.0},
        sparsity={"regrow": "gradient", "num_updates": 20},  # armed from the first step on
        batch={"global_batch": BATCH, "micro_batch": micro_batch},
        deepspeed=bench.zero_config(stage, "fp32"),
    )
