"""What moves the last bits of a result, or its meaning, without being part of the run's identity: recorded in every
checkpoint, and said where it has changed when a run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dsbert.base.collectives import gather_json
from dsbert.base.jsonl import value_differences
from dsbert.base.records import JsonObject
from dsbert.checkpoint.state import CheckpointState, RunRecord
from dsbert.cluster.process_group import World
from dsbert.config.recipe import Recipe
from dsbert.training.provenance import NUMERICS


def numerics(recipe: Recipe, world: World) -> JsonObject:
    """{torch, device, cpu: instruction set, threads, ranks, micro_batch, arithmetic: its revision}; a list where ranks
    differ. Collective."""
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else world.device.type
    mine = {
        "torch": torch.__version__,
        "device": device,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    everybody = gather_json(mine)
    found = {key: sorted({one[key] for one in everybody}) for key in mine}
    return {key: values[0] if len(values) == 1 else values for key, values in found.items()} | {
        "ranks": world.world_size,
        "micro_batch": recipe.batch.micro_batch,
        "arithmetic": NUMERICS,
    }


def why_bits_may_differ(found: JsonObject) -> str | None:
    """Why two ranks may compute other bits from the same numbers; None where they must be the same. found: of
    `numerics`. Collective."""
    models = sorted(set(gather_json(_cpu_model())))
    if found["device"] != "cpu":
        return f"kernels of {found['device']} need not give the same bits twice"
    parts: JsonObject = {"model of CPU": models[0] if len(models) == 1 else models}
    different = [(what, value) for what, value in (found | parts).items() if isinstance(value, list)]
    if different:
        return "ranks differ in " + " and ".join(f"{what} ({', '.join(map(str, value))})" for what, value in different)
    return None


def _cpu_model() -> str:
    """As Linux calls it: libraries choose kernels by it. Empty where nobody says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def changes(before: CheckpointState, now: RunRecord, since: str) -> Iterator[str]:
    """Lines for people: a line per changed key of the DeepSpeed configuration, and one for all that moves bits.

    before: of the checkpoint `since`, which may be older than these records; now: of this attempt.
    """
    if before.deepspeed is not None:
        for one in value_differences(before.deepspeed, now.deepspeed):
            yield f"DeepSpeed's {one.key} has changed since {since}: {_word(one.before)} -> {_word(one.after)}"
    if before.numerics is not None:
        moved = [
            f"{one.key} {_word(one.before)} -> {_word(one.after)}"
            for one in value_differences(before.numerics, now.numerics)
        ]
        if moved:
            yield f"not bit for bit as before {since}, but as good: {', '.join(moved)}"


def _word(value: Any) -> str:
    return "none" if value is None else str(value)
