"""Memory and bytes sent of real ranks at every ZeRO stage, against what was planned for them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers import run_distributed

_VOCAB_SIZE, _SEQ_LEN = 1009, 64


def recipe_of(stage: int, dtype: str, accumulation: int, pattern: str) -> Any:
    from tests import workbench

    return workbench.recipe(
        model={"num_layers": 2, "hidden_size": 128, "num_heads": 2, "max_positions": 64, "dropout": 0.1},
        sparsity={"kernels": "cpu", "pattern": pattern},
        data={"seq_len": _SEQ_LEN, "nsp": True},
        batch={"global_batch": 16 * accumulation, "micro_batch": 8},
        deepspeed=workbench.zero_config(stage, dtype),
    )


def ranks(**options: Any) -> dict[str, Any]:
    """What this rank holds and sends, and what the plan says of it."""
    import gc

    from resident import bytes_of_tensors, most_within
    from sent_bytes import count_sent_bytes

    sent = count_sent_bytes()
    import numpy as np

    from dsbert.cluster import process_group
    from dsbert.engine.train_engine import TrainEngine
    from dsbert.jobs.capacity.model_size import ModelSize
    from dsbert.jobs.capacity.rank_memory import rank_memory
    from dsbert.jobs.capacity.timing_worker import made_up
    from dsbert.jobs.capacity.wire_traffic import step_messages
    from dsbert.jobs.capacity.workload import Samples, Workload
    from dsbert.jobs.capacity.zero_layout import ZeroLayout
    from dsbert.models.construction import build_model
    from dsbert.sparse.half_precision import multiplies

    world = process_group.init(60)
    recipe = recipe_of(**options)
    model, layers = build_model(recipe, _VOCAB_SIZE)
    engine = TrainEngine(recipe, model, layers, world)
    lengths = np.arange(50, 50 + 8)
    batch = made_up(lengths, _SEQ_LEN, _VOCAB_SIZE, recipe.data.mask_fraction, recipe.data.nsp)
    batches = [batch] * engine.accumulation_steps
    for _ in range(3):
        sent.clear()
        engine.train_step(batches)
    handed = dict(sent)
    engine.on_progress = gc.collect  # what DeepSpeed leaves in circles is not needed
    stay = bytes_of_tensors()
    needed = stay + most_within(lambda: engine.train_step(batches))
    work = Workload.of(recipe, world.world_size, Samples(lengths, None, _VOCAB_SIZE, "measured", ""))
    layout = ZeroLayout(ModelSize.of(recipe, _VOCAB_SIZE), engine.ds_config, world.world_size)
    widened = not multiplies(next(model.parameters()).dtype)
    planned: dict[str, float] = {}
    for message in step_messages(layout, work):
        planned[message.collective] = planned.get(message.collective, 0.0) + message.handed_bytes
    memory = rank_memory(layout, work, on_card=False, widened=widened)
    held = {
        kind: sum(4 * tensor.numel() for name in engine.parameters for tensor in (engine.shard(name).moments.values()))
        for kind in ("moments",)
    }
    return {
        "sent": handed,
        "planned": planned,
        "needed": needed,
        "stay": stay,
        "memory": memory["tensors"].value,
        "moments": (held["moments"], memory["moments"].value),
    }


@pytest.mark.parametrize(
    ("stage", "dtype", "accumulation", "pattern"),
    [
        (1, "fp32", 1, "dynamic"),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in [
                (0, "fp32", 1, "dynamic"), (1, "fp32", 2, "dynamic"), (2, "fp32", 2, "dense"),
                (3, "fp32", 1, "dynamic"), (1, "bf16", 1, "dynamic"), (2, "bf16", 1, "dynamic"),
                (2, "bf16", 2, "dense"), (3, "bf16", 2, "dynamic"), (0, "bf16", 1, "dense"),
            ]
        ),
    ],
)  # fmt: skip
def test_ranks_hold_and_send_what_was_planned(stage: int, dtype: str, accumulation: int, pattern: str) -> None:
    args = {"stage": stage, "dtype": dtype, "accumulation": accumulation, "pattern": pattern}
    for found in run_distributed(ranks, 2, args):
        sent: dict[str, float] = {}
        for name, size in found["sent"].items():
            kind = next(
                kind for kind in ("all_reduce", "all_gather", "reduce_scatter", "exchange") if name.startswith(kind)
            )
            sent[kind] = sent.get(kind, 0.0) + size
        planned = dict.fromkeys(sent, 0.0) | found["planned"]
        # DeepSpeed's own few scalars are not planned.
        assert planned == pytest.approx(dict.fromkeys(planned, 0.0) | sent, rel=0.05, abs=200)
        # What DeepSpeed still holds when the next micro-batch's gradients come differs from run to run at these stages.
        most = 1.15 if stage >= 2 and accumulation > 1 else 1.05
        assert 0.95 < found["memory"] / found["needed"] < most
        assert found["moments"][1] == pytest.approx(found["moments"][0], rel=0.02)
