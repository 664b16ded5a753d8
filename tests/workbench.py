"""What many tests train: a small BERT on made-up text, under any DeepSpeed configuration. Imported by ranks only."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsbert.checkpoint.state import IdentityRecord, RecipeRecord, RunRecord
from dsbert.cluster.process_group import World, init
from dsbert.config.recipe import Recipe, recipe_from_dict
from dsbert.data.shards import TokenStore
from dsbert.data.spans import SpanIndex
from dsbert.data.stream import Batch, SampleStream
from dsbert.data.tokenizer import Vocabulary
from dsbert.engine.train_engine import TrainEngine
from dsbert.engine.zero_shards import forward_copies, full_shape
from dsbert.models.construction import build_model
from dsbert.sparse import MaskManager, MaskUpdate

VOCAB_SIZE = 67
SEQ_LEN = 16


def recipe(**sections: Any) -> Recipe:
    """A recipe of seconds; `sections` are merged over it one level deep."""
    base: dict[str, Any] = {
        "name": "test",
        "seed": 7,
        "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "max_positions": 32, "dropout": 0.1},
        "sparsity": {"sparsity": 0.75, "block_size": 8, "num_updates": 5},
        "data": {"path": "unused", "seq_len": SEQ_LEN},
        "batch": {"global_batch": 12, "micro_batch": 2},
        "optim": {"total_steps": 20, "warmup_steps": 2, "lr": 1e-3},
        "eval": {"every_steps": 10, "sequences": 24},
        "checkpoint": {"every_steps": 10},
        "log": {"every_steps": 1, "wandb": False},
        "deepspeed": {"config": "zero1_fp32"},
    }
    for name, values in sections.items():
        base[name] = base[name] | values if isinstance(values, dict) else values
    return recipe_from_dict(base)


@functools.cache
def world() -> World:
    """Of this process, which joins the others only once."""
    return init(60)


def zero_config(stage: int, dtype: str) -> dict[str, Any]:
    """The deepspeed section for a ZeRO stage and fp32 or bf16."""
    overrides: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    if dtype != "fp32":
        overrides[dtype] = {"enabled": True}
    return {"config": "zero0_fp32", "overrides": overrides}


def stream(seed: int = 7, num_documents: int = 40) -> SampleStream:
    """Made-up documents: sentences of words, some of two tokens, with a pattern that can be learnt."""
    rng = np.random.default_rng(0)
    word_start = np.arange(VOCAB_SIZE) < 50
    documents = []
    for _ in range(num_documents):
        start = int(rng.integers(5, 40))
        documents.append(
            [
                [5 + (start + 3 * i + int(rng.integers(0, 3))) % 62 for i in range(int(rng.integers(3, 9)))]
                for _ in range(8)
            ]
        )
    vocab = Vocabulary(VOCAB_SIZE, 0, 1, 2, 3, 4, word_start)
    store = TokenStore.from_documents(documents)
    return SampleStream(store, SpanIndex.build(store, SEQ_LEN), vocab=vocab, seq_len=SEQ_LEN, seed=seed)


def padded(batch: Batch, *left_out: str) -> dict[str, Tensor]:
    """The rows of a batch as transformers' models take them, with their padding."""
    names = ("input_ids", "token_type_ids", "attention_mask")
    return {name: torch.from_numpy(getattr(batch, name)) for name in names if name not in left_out}


def step_batches(engine: Any, source: SampleStream, step: int) -> list[Batch]:
    """This rank's micro-batches of optimizer step `step` (0 = the first)."""
    start = step * engine.recipe.batch.global_batch
    return [source.batch(start + micro.first, micro.count) for micro in engine.plan()]


def engine_and_masks(recipe: Recipe, world: World) -> tuple[TrainEngine, MaskManager]:
    """A fresh model in a fresh engine, and the manager of its masks."""
    model, layers = build_model(recipe, VOCAB_SIZE)
    engine = TrainEngine(recipe, model, layers, world)
    total_steps = recipe.optim.total_steps
    return engine, MaskManager(layers, recipe.sparsity, total_steps=total_steps, editor=engine, seed=recipe.seed)


def run_record(recipe: Recipe) -> RunRecord:
    """What a checkpoint says of a run, of which nothing but the recipe is read."""
    whole = recipe.model_dump(mode="json")
    identity = IdentityRecord.from_json({"data_digest": "none"})
    return RunRecord(recipe=RecipeRecord.from_json(whole), identity=identity, vocab_size=1, layers={}, params={})


def held_elements(engine: TrainEngine) -> dict[str, dict[str, tuple[int, Tensor]]]:
    """Copies of all that this rank holds of every parameter: {name: {kind: (offset in the parameter, elements)}}."""
    held: dict[str, dict[str, tuple[int, Tensor]]] = {}
    for name, param in engine.parameters.items():
        shard = engine.shard(name)
        held[name] = {kind: (shard.offset, tensor.clone()) for kind, tensor in shard.moments.items()}
        held[name]["master"] = (shard.offset, shard.master.clone())
        for number, (tensor, offset) in enumerate(forward_copies(param)):
            held[name][f"copy {number}"] = (offset, tensor.clone())
    return held


def check_update(engine: TrainEngine, before: dict[str, dict[str, tuple[int, Tensor]]], update: MaskUpdate) -> None:
    """Survivors are untouched to the bit; re-pointed slots are zero in master, moments and every copy."""
    after = held_elements(engine)
    assert update.num_pruned > 0
    for name, tensors in after.items():
        change = update.layers.get(name.removesuffix(".blocks"))
        shape = full_shape(engine.parameters[name])
        assert "copy 0" in tensors
        assert {"exp_avg", "exp_avg_sq"} <= tensors.keys() or not tensors["master"][1].numel()
        for kind, (offset, tensor) in tensors.items():
            old = before[name][kind][1]
            if change is None or not name.endswith(".blocks"):
                assert torch.equal(tensor, old), (name, kind)
                continue
            slots = (torch.arange(tensor.numel()) + offset) // (shape[1] * shape[2])
            pruned = torch.isin(slots, change.slots)
            assert torch.equal(tensor[~pruned], old[~pruned]), f"a survivor of {name} moved in {kind}"
            assert not tensor[pruned].any(), f"a re-pointed slot of {name} is not zero in {kind}"
