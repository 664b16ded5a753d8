"""Seconds that saving and resuming take, and the share of a run's time that goes into saving.

    python tools/bench_checkpoint.py [--recipe bert-base] [--ds zero1_fp32] [--nproc 2] [--folder DIR] [--json]

The model is built and given moments, not trained. Saved several times, the first not counted: `snapshot` is what
training waits for at a save (agreement on weights and topology, and the copy); what follows is written and published
in the background; `in a hurry`: all of it with somebody waiting, as after a signal. Resume: `verify` reads every byte,
shared over the ranks, `load` puts it into shards. Medians. The share assumes one save in ten minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from on_ranks import markdown, on_ranks

from dsbert.config.recipe import load_recipe

_SAVES = 5
_BETWEEN_SAVES_S = 600.0


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """One rank."""
    import torch

    from dsbert.base import collectives
    from dsbert.base.collectives import assert_replicas_agree
    from dsbert.checkpoint.loading import load_checkpoint, newest_checkpoint
    from dsbert.checkpoint.publisher import Retention
    from dsbert.checkpoint.state import IdentityRecord, LayerRecord, RecipeRecord, RunRecord, Totals
    from dsbert.checkpoint.writer import CheckpointWriter
    from dsbert.cluster import process_group
    from dsbert.engine.train_engine import TrainEngine
    from dsbert.engine.zero_shards import set_adam_step
    from dsbert.models.construction import build_model, layer_shapes
    from dsbert.models.spec import model_spec
    from dsbert.sparse import MaskManager

    world = process_group.init(300)
    recipe = load_recipe(arguments["recipe"], arguments["overrides"])
    model, layers = build_model(recipe, arguments["vocab_size"], world.device)
    engine = TrainEngine(recipe, model, layers, world)
    set_adam_step(engine.deepspeed_engine, 1)
    masks = MaskManager(layers, recipe.sparsity, total_steps=1000, editor=engine, seed=recipe.seed)
    run = RunRecord(
        recipe=RecipeRecord.from_json(recipe.model_dump(mode="json")),
        identity=IdentityRecord.from_json({"data_digest": "none"}),
        vocab_size=arguments["vocab_size"],
        layers={
            name: LayerRecord.from_json(shape) for name, shape in layer_shapes(model, model_spec(recipe.model)).items()
        },
        params={name: list(getattr(param, "ds_shape", param.shape)) for name, param in engine.parameters.items()},
    )
    folder = Path(arguments["folder"])
    root, companions = folder / "checkpoints", folder / "companions"
    companions.mkdir(exist_ok=True)
    writer = CheckpointWriter(root, companions, attempt="1-bench", retention=Retention(2))
    seconds: dict[str, list[float]] = {name: [] for name in ("snapshot", "saved", "hurry", "verify", "load")}

    def timed(name: str, work: Any) -> Any:
        collectives.all_reduce(torch.zeros(1))  # the ranks begin together
        start = time.perf_counter()
        result = work()
        seconds[name].append(time.perf_counter() - start)
        return result

    def begin() -> None:
        masks.verify_replicas()
        assert_replicas_agree("the weights", engine.replica_digests())
        writer.begin(engine, masks, run, Totals())

    saved = None
    for _ in range(_SAVES):
        engine.step += 1
        timed("snapshot", begin)
        saved = timed("saved", writer.finish)
        engine.step += 1
        timed("hurry", lambda: (begin(), writer.finish()))
    assert saved is not None
    for _ in range(_SAVES):
        newest = timed("verify", lambda: newest_checkpoint(root, world.rank, world.world_size))[0]
        timed("load", lambda newest=newest: load_checkpoint(newest, engine, masks))
    return {
        "seconds": {name: statistics.median(found[1:]) for name, found in seconds.items()},
        "nbytes": saved.nbytes,
        "buffer": writer.buffer_bytes,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Print one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="bert-base")
    parser.add_argument("--ds", default="zero1_fp32", help="a name in ds_configs")
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=30522)
    parser.add_argument("--folder", type=Path, help="on the file system to be measured; default: the temporary one")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        overrides = [f"deepspeed.config={options.ds}"]
        arguments = {
            "recipe": options.recipe,
            "overrides": overrides,
            "folder": folder,
            "vocab_size": options.vocab_size,
        }
        ranks = on_ranks(measure, arguments, options.nproc)
    slowest = {name: max(rank["seconds"][name] for rank in ranks) for name in ranks[0]["seconds"]}
    row = {
        "recipe": options.recipe,
        "DeepSpeed": options.ds,
        "ranks": options.nproc,
        "threads": ranks[0]["threads"],
        "MB": round(ranks[0]["nbytes"] / 1e6, 1),
        "snapshot memory MB per rank": round(max(rank["buffer"] for rank in ranks) / 1e6, 1),
        "snapshot s": round(slowest["snapshot"], 3),
        "then in the background s": round(slowest["saved"], 3),
        "in a hurry s": round(slowest["hurry"], 3),
        "verify s": round(slowest["verify"], 3),
        "load s": round(slowest["load"], 3),
        "share of time at a save in 10 minutes": f"{slowest['snapshot'] / _BETWEEN_SAVES_S:.3%}",
    }
    print(json.dumps([row]) if options.json else markdown([row]))


if __name__ == "__main__":
    main()
