"""One short run per ZeRO stage and precision, on the same data: final loss, and the topology digest of every rank.

    python tools/stage_table.py --data data/sotu [--nproc 2] [--steps 16] [--json]

Three mask updates happen in each run. The fp32 rows must agree with each other, and all ranks of a row must.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from on_ranks import markdown, on_ranks

from dsbert.config.recipe import load_recipe


def train(arguments: dict[str, Any]) -> dict[str, Any]:
    """One rank of one run."""
    from dsbert.cluster import process_group
    from dsbert.data.manifest import load_manifest
    from dsbert.data.stream import SampleStream
    from dsbert.engine.train_engine import TrainEngine
    from dsbert.models.construction import build_model
    from dsbert.sparse import MaskManager

    world = process_group.init(120)
    recipe = load_recipe("demo", arguments["overrides"])
    data = recipe.data
    model, layers = build_model(recipe, load_manifest(data.path).tokenizer.vocab_size, world.device)
    engine = TrainEngine(recipe, model, layers, world)
    steps = recipe.optim.total_steps
    masks = MaskManager(layers, recipe.sparsity, total_steps=steps, editor=engine, seed=recipe.seed)
    stream = SampleStream.open(data.path, "train", data.seq_len, recipe.seed)
    updates = 0
    loss = 0.0
    for step in range(steps):
        start = step * recipe.batch.global_batch
        batches = [stream.batch(start + micro.first, micro.count) for micro in engine.plan()]
        loss = sum(engine.train_step(batches).mean_losses())
        updates += masks.maybe_update(step + 1) is not None
    return {"loss": loss, "updates": updates, "digest": masks.digest()}


def main() -> None:
    """Print one row per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/sotu"))
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for stage in (0, 1, 2, 3):
        for dtype in ("fp32", "bf16"):
            overrides = [
                f"data.path={options.data}", f"optim.total_steps={options.steps}", "optim.warmup_steps=2",
                "sparsity.num_updates=4", "batch.global_batch=16", "batch.micro_batch=4", "deepspeed.config=zero0_fp32",
                f"deepspeed.overrides.zero_optimization.stage={stage}",
                *(["deepspeed.overrides.bf16.enabled=true"] if dtype == "bf16" else []),
            ]  # fmt: skip
            ranks = on_ranks(train, {"overrides": overrides}, options.nproc)
            row = {"stage": stage, "dtype": dtype, "updates": ranks[0]["updates"], "final loss": ranks[0]["loss"]}
            rows.append(row | {f"digest of rank {rank}": found["digest"] for rank, found in enumerate(ranks)})
    print(json.dumps(rows) if options.json else markdown(rows))


if __name__ == "__main__":
    main()
