"""What many tests train: a small BERT on made-up text, under any DeepSpeed configuration. Imported by ranks only."""

from __future__ import annotations

from typing import Any

import numpy as np

from dsbert.config import Recipe, recipe_from_dict
from dsbert.data.shards import TokenStore
from dsbert.data.spans import SpanIndex
from dsbert.data.stream import Batch, SampleStream
from dsbert.data.tokenizer import Vocabulary

VOCAB_SIZE = 67
SEQ_LEN = 16


def recipe(**sections: Any) -> Recipe:
    """A recipe of seconds; `sections` are merged over it one level deep."""
    base: dict[str, Any] = {
        "name": "test",
        "seed": 7,
        "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "max_positions": 32, "dropout": 0.0},
        "sparsity": {"sparsity": 0.75, "block_size": 8, "num_updates": 5},
        "data": {"path": "unused", "seq_len": SEQ_LEN},
        "batch": {"global_batch": 12, "micro_batch": 3},
        "optim": {"total_steps": 20, "warmup_steps": 2, "lr": 1e-3},
        "eval": {"every_steps": 10, "sequences": 24},
        "checkpoint": {"every_steps": 10},
        "log": {"every_steps": 1, "wandb": False},
        "deepspeed": {"config": "zero1_fp32"},
    }
    for name, values in sections.items():
        base[name] = base[name] | values if isinstance(values, dict) else values
    return recipe_from_dict(base)


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


def step_batches(engine: Any, source: SampleStream, step: int) -> list[Batch]:
    """This rank's micro-batches of optimizer step `step` (0 = the first)."""
    start = step * engine.recipe.batch.global_batch
    rows = engine.recipe.batch.micro_batch
    return [source.batch(start + micro.first, micro.count, rows) for micro in engine.plan()]
