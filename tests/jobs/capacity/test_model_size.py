"""What a plan takes a model, its state and its activations to be, against the model itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dsbert.config.recipe import Recipe
from dsbert.jobs.capacity.activation_memory import MicroBatchShape, activation_bytes
from dsbert.jobs.capacity.model_size import ModelSize
from dsbert.jobs.capacity.timing_worker import made_up
from dsbert.models.construction import build_model, recipe_flops
from dsbert.models.device_batch import DeviceBatch
from dsbert.sparse import MaskManager, TorchBlockEditor
from dsbert.sparse.flops import sequence_flops
from tests import workbench

VOCAB_SIZE = 211
VARIANTS: dict[str, dict[str, Any]] = {
    "bert": {},
    "bert with dropout": {"model": {"dropout": 0.1}},
    "bert, dense": {"sparsity": {"pattern": "dense"}},
    "bert, low rank": {"sparsity": {"low_rank": 4}},
    "modernbert": {"model": {"architecture": "modernbert"}, "data": {"nsp": False}},
}


def recipe_of(variant: str) -> Recipe:
    shape = {"num_layers": 3, "hidden_size": 64, "num_heads": 2, "max_positions": 64, "dropout": 0.0}
    changes = VARIANTS[variant]
    return workbench.recipe(
        model=shape | changes.get("model", {}),
        sparsity={"kernels": "cpu"} | changes.get("sparsity", {}),
        data={"seq_len": 48} | changes.get("data", {}),
    )


def built(variant: str) -> tuple[Recipe, nn.Module, dict[str, Any], ModelSize]:
    recipe = recipe_of(variant)
    model, layers = build_model(recipe, VOCAB_SIZE)
    return recipe, model, layers, ModelSize.of(recipe, VOCAB_SIZE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_of_the_model(variant: str) -> None:
    recipe, model, layers, size = built(variant)
    assert size.parameters == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {name: layer.num_active for name, layer in size.layers.items()} == {
        name: layer.num_active for name, layer in layers.items()
    }
    pairs = size.spec.attention_pairs(recipe.model, [recipe.data.seq_len])
    found = sequence_flops(recipe.data.seq_len, recipe.model.hidden_size, pairs, [size.kept])
    assert found == recipe_flops(recipe)


@pytest.mark.parametrize("fresh", ["zero", "count"])
def test_topology_takes_as_many_bytes(fresh: str) -> None:
    recipe = workbench.recipe(sparsity={"fresh_moments": fresh})
    model, layers = build_model(recipe, VOCAB_SIZE)
    size = ModelSize.of(recipe, VOCAB_SIZE)
    editor = TorchBlockEditor(torch.optim.AdamW(model.parameters()))
    masks = MaskManager(layers, recipe.sparsity, total_steps=20, editor=editor)
    state = sum(tensor.nbytes for tensor in masks.state_dict().values())
    assert sum(layer.state_bytes(fresh) for layer in size.layers.values()) == state
    indices = sum(b.nbytes for layer in layers.values() for b in (layer.rows, layer.cols, layer.order))
    records = sum(t.rows.nbytes + t.cols.nbytes for t in masks.topologies.values())
    assert sum(layer.index_bytes for layer in size.layers.values()) == indices + records


def kept_for_backward(model: nn.Module, batch: DeviceBatch) -> int:
    """Bytes of all storages that autograd holds on to at the end of forward, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()
        model(batch)
    inputs = {value.untyped_storage().data_ptr() for value in vars(batch).values()}
    return sum(t.untyped_storage().nbytes() for place, t in held.items() if place not in own | inputs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_keeps_what_was_planned(variant: str) -> None:
    recipe, model, _, size = built(variant)
    lengths = np.array([40, 48, 21, 33, 48, 46, 9, 30])
    batch = made_up(lengths, 48, VOCAB_SIZE, 0.15, recipe.data.nsp)
    predictions = len(batch.mlm_labels)
    shape = MicroBatchShape(len(lengths), int(lengths.sum()), predictions, 4)
    planned = activation_bytes(size, shape)
    found = kept_for_backward(model, DeviceBatch.of(batch, torch.device("cpu")))
    assert planned.kept + planned.head == pytest.approx(found, rel=0.02)
