"""Milliseconds of a whole mask update through DeepSpeed: scores, all-reduce, decision, zeroing, check of replicas.

    python tools/bench_mask_update.py [--recipe bert-base] [--block 16,1] [--ds zero1_fp32] [--nproc 2] [--json]

No step is trained: the optimizer's moments are made, and the updates of a short schedule run one after another. Median,
least and most over the updates after the first one; OMP_NUM_THREADS threads per rank.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from on_ranks import markdown, on_ranks

from dsbert.config.recipe import load_recipe

_UPDATES = 8


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """One rank."""
    import torch

    from dsbert.cluster import process_group
    from dsbert.engine.train_engine import TrainEngine
    from dsbert.engine.zero_shards import set_adam_step
    from dsbert.models.construction import build_model
    from dsbert.sparse import MaskManager

    world = process_group.init(300)
    recipe = load_recipe(arguments["recipe"], arguments["overrides"])
    model, layers = build_model(recipe, 1024, world.device)
    engine = TrainEngine(recipe, model, layers, world)
    set_adam_step(engine.deepspeed_engine, 1)
    masks = MaskManager(layers, recipe.sparsity, total_steps=_UPDATES, editor=engine, seed=recipe.seed)
    updates = [masks.maybe_update(step) for step in range(1, _UPDATES)]
    return {
        "seconds": [update.seconds for update in updates[1:] if update],
        "blocks": sum(layer.num_active for layer in layers.values()),
        "pruned": [update.num_pruned for update in updates if update],
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Print one row per block size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="bert-base")
    parser.add_argument("--block", default="16,1")
    parser.add_argument("--ds", default="zero1_fp32", help="a name in ds_configs")
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for block in options.block.split(","):
        overrides = [f"sparsity.block_size={block}", f"sparsity.num_updates={_UPDATES}", "optim.warmup_steps=0",
                     f"optim.total_steps={_UPDATES}", f"deepspeed.config={options.ds}"]  # fmt: skip
        ranks = on_ranks(measure, {"recipe": options.recipe, "overrides": overrides}, options.nproc)
        seconds = ranks[0]["seconds"]
        rows.append(
            {
                "recipe": options.recipe, "block": block, "blocks": ranks[0]["blocks"],
                "pruned at most": max(ranks[0]["pruned"]),
                "ranks": options.nproc, "threads": ranks[0]["threads"], "DeepSpeed": options.ds,
                "median ms": round(1000 * statistics.median(seconds), 1), "min ms": round(1000 * min(seconds), 1),
                "max ms": round(1000 * max(seconds), 1),
            }
        )  # fmt: skip
    print(json.dumps(rows) if options.json else markdown(rows))


if __name__ == "__main__":
    main()
