"""What sparsity saves in bytes, measured: encoder weights and optimizer state, and what a step sends.

    python tools/footprint.py [--recipe bert-small] [--ds zero1_fp32] [--nproc 2]
        [--batch 8] [--seq 128] [--json]

Trains the recipe's model for three steps on random tokens, dense and sparse. Weights and moments are counted on the
live tensors that the ranks own; bytes sent are what rank 0 hands to each kind of collective in the third step.

Then the most that one rank of the recipe ever holds in memory, in steps of --batch x --seq tokens, beside what its
tensors need: with freed memory that stays with the process, as dsbert sets it, and with torch's own settings. The ratio
is of what is held beyond the imports. CPU seconds and page faults of a step say what either costs.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from on_ranks import markdown, on_ranks
from resident import measure_resident, random_batches, rows
from sent_bytes import count_sent_bytes

from dsbert.config.recipe import load_recipe


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """One rank of one run."""
    if "allocator" in arguments:
        return measure_resident(arguments)
    from dsbert.cluster import process_group
    from dsbert.engine.train_engine import TrainEngine
    from dsbert.models.construction import build_model, encoder_linears
    from dsbert.models.spec import model_spec
    from dsbert.sparse.kernels.dense import scratch_bytes
    from dsbert.sparse.low_rank import PARTS

    world = process_group.init(120)
    recipe = load_recipe(arguments["recipe"], arguments["overrides"])
    model, layers = build_model(recipe, arguments["vocab_size"], world.device)
    names = {
        f"{name}.{part}"
        for name in encoder_linears(model, model_spec(recipe.model))
        for part in ("weight", "blocks", *PARTS)
    }
    sent = count_sent_bytes()
    engine = TrainEngine(recipe, model, layers, world)
    for _ in range(3):
        sent.clear()
        engine.train_step(random_batches(engine, arguments["vocab_size"], recipe.data.seq_len))
    owned = {name: shard for name, shard in engine.shards().items() if name in names}
    coordinates = sum(2 * 4 * layer.num_active for layer in layers.values()) // world.world_size
    active = sum(layer.num_active * layer.block_size**2 for layer in layers.values())
    positions = sum(layer.shape[0] * layer.shape[1] for layer in layers.values())
    return {
        "scratch": scratch_bytes(),
        "density": active / positions if layers else 1.0,
        "encoder_weights": sum(4 * shard.numel for shard in owned.values()) + coordinates,
        "encoder_optimizer": sum(4 * tensor.numel() for shard in owned.values() for tensor in shard.moments.values()),
        "sent": dict(sent),
        "all_parameters": sum(4 * shard.numel for shard in engine.shards().values()),
    }


def main() -> None:
    """Print dense, sparse and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="bert-small")
    parser.add_argument("--ds", default="zero1_fp32", help="a name in ds_configs")
    parser.add_argument("--vocab-size", type=int, default=30522)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="sequences of a micro-batch, for the memory that is held")
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = {}
    for pattern in ("dense", "dynamic"):
        overrides = [f"sparsity.pattern={pattern}", f"deepspeed.config={options.ds}", "data.seq_len=16",
                     "batch.micro_batch=1", f"batch.global_batch={options.nproc}"]  # fmt: skip
        arguments = {"recipe": options.recipe, "overrides": overrides, "vocab_size": options.vocab_size}
        ranks = on_ranks(measure, arguments, options.nproc)
        found[pattern] = {
            "density": ranks[0]["density"],
            "encoder weights": sum(rank["encoder_weights"] for rank in ranks),
            "encoder optimizer state": sum(rank["encoder_optimizer"] for rank in ranks),
            "dense scratch of the kernels, per rank": ranks[0]["scratch"],
            "all weights": sum(rank["all_parameters"] for rank in ranks),
            **{f"{name}, handed in per rank and step": size for name, size in ranks[0]["sent"].items() if size > 1000},
        }
    sizes = [
        {
            "bytes": key,
            "dense": found["dense"].get(key, 0),
            "sparse": value,
            "ratio": _ratio(found["dense"].get(key), value),
        }
        for key, value in found["dynamic"].items()
    ]
    held = rows({"stays": _resident(options, "kept"), "goes back": _resident(options, "default")})
    print(json.dumps([sizes, held]) if options.json else f"{markdown(sizes)}\n\n{markdown(held)}")


def _resident(options: argparse.Namespace, allocator: str) -> dict[str, Any]:
    """What a sparse rank of the recipe holds; see resident.py."""
    overrides = [f"deepspeed.config={options.ds}", f"data.seq_len={options.seq}", "sparsity.pattern=static",
                 f"batch.micro_batch={options.batch}", f"batch.global_batch={options.batch}"]  # fmt: skip
    arguments = {"recipe": options.recipe, "overrides": overrides, "vocab_size": options.vocab_size}
    found: dict[str, Any] = on_ranks(measure, arguments | {"allocator": allocator}, 1)[0]
    return found


def _ratio(dense: float | None, sparse: float) -> str:
    return f"{sparse / dense:.4f}" if dense else ""


if __name__ == "__main__":
    main()
