"""Layers that backward computes again: the same losses to the bit at every ZeRO stage, and less memory."""

from __future__ import annotations

from typing import Any

import pytest

from dsbert.config.recipe import load_recipe
from tests.helpers import run_distributed

STEPS = 4


def losses(stage: int, dtype: str, persist: bool, regrow: str) -> dict[str, list[Any]]:
    """By whether activations are checkpointed: the bits of losses and norms of each step, with dropout and mask
    updates, and how often a layer's forward ran."""
    import torch
    from transformers.models.bert.modeling_bert import BertSelfAttention

    from dsbert.cluster import process_group
    from tests import workbench as bench

    world = process_group.init(60)
    source, found = bench.stream(), {}
    for checkpointed in (False, True):
        section = bench.zero_config(stage, dtype)
        if not persist:
            section["overrides"]["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        recipe = bench.recipe(
            model={"activation_checkpointing": checkpointed},
            sparsity={"regrow": regrow, "update_every_steps": 2, "kernels": "cpu"},
            deepspeed=section,
            batch={"global_batch": 8, "micro_batch": 2},
        )
        engine, masks = bench.engine_and_masks(recipe, world)
        attention = next(m for m in engine.deepspeed_engine.module.modules() if isinstance(m, BertSelfAttention))
        calls: list[int] = []
        attention.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        steps = []
        for step in range(STEPS):
            result = engine.train_step(bench.step_batches(engine, source, step))
            masks.maybe_update(step + 1)
            steps.append([*(loss.hex() for loss in result.losses.tolist()), float(result.grad_norm).hex()])
        weights = [tensor.float().double().sum().item() for tensor in (s.master for s in engine.shards().values())]
        found[str(checkpointed)] = [steps, weights, len(calls)]
        torch.manual_seed(0)
    return found


@pytest.mark.parametrize(
    ("stage", "dtype", "persist", "regrow"),
    [
        (0, "fp32", True, "random"),
        (1, "bf16", True, "gradient"),
        (2, "fp32", True, "random"),
        (3, "fp32", True, "gradient"),
        (3, "bf16", False, "random"),
    ],
)
def test_a_step_is_the_same_to_the_bit(stage: int, dtype: str, persist: bool, regrow: str) -> None:
    args = {"stage": stage, "dtype": dtype, "persist": persist, "regrow": regrow}
    for found in run_distributed(losses, 2, args):
        steps, weights, calls = found["False"]
        again, same, twice = found["True"]
        assert steps == again
        assert weights == same
        assert twice == 2 * calls, "no layer was computed again"


def saved_bytes(checkpointed: bool) -> int:
    """What forward leaves for backward, of a model with four layers."""
    import torch

    from dsbert.models.construction import build_model
    from dsbert.models.device_batch import DeviceBatch
    from tests import workbench as bench

    model, _ = build_model(
        bench.recipe(model={"activation_checkpointing": checkpointed, "num_layers": 4}), bench.VOCAB_SIZE
    )
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = DeviceBatch.of(bench.stream().batch(0, 8), torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses, _ = model(batch)
    losses.sum().backward()
    return sum(kept.values())


def test_less_is_kept_for_backward() -> None:
    assert saved_bytes(True) < 0.35 * saved_bytes(False)


def test_it_is_off_and_no_part_of_the_identity() -> None:
    off = load_recipe("demo")
    on = load_recipe("demo", ["model.activation_checkpointing=true"])
    assert "activation_checkpointing" not in off.model_dump(mode="json")["model"]
    assert on.model_dump(mode="json")["model"]["activation_checkpointing"] is True
    assert on.identity() == off.identity()
