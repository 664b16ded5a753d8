"""One process of a short timing on this machine: `start.py dsbert.jobs.capacity.timing_worker WHAT REQUEST FOLDER`.

WHAT: "steps", a world of its own that takes a few steps of the recipe's micro-batch, beside as many others as will
train side by side; or "collectives", one of several ranks. REQUEST: a JSON file; what was found goes to
FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dsbert.base.collectives import MOST_EXCHANGED_BYTES, all_reduce
from dsbert.base.durable import write_and_read_back
from dsbert.cluster import process_group
from dsbert.cluster.launcher import die_with_parent
from dsbert.cluster.ranks import rank_variables
from dsbert.config.recipe import Recipe, recipe_from_dict
from dsbert.data.stream import Batch

_MICRO_BATCHES = 3  # of a step: one in the middle is neither the first nor the last
_WARM, _STEPS, _SPAN_S = 2, 7, 4.0
_SIDE = 1024  # of the matrices whose product is the peak
_WRITTEN_BYTES = 1 << 25
# "cpu": of the process, which does not count the time that others have the cores.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
_SMALL, _MOST_BULK_BYTES = 8, 1 << 25


def made_up(lengths: NDArray[np.int64], seq_len: int, vocab_size: int, mask_fraction: float, nsp: bool) -> Batch:
    """Rows of so many random tokens, int64 [b], of which as many are asked for as of real ones."""
    rng = np.random.default_rng(1)
    rows = len(lengths)
    real = np.arange(seq_len) < lengths[:, None]
    text = np.maximum(lengths - 3, 1)
    counts = np.maximum(1, np.rint(mask_fraction * text)).astype(np.int64)
    places = [np.sort(rng.permutation(int(n))[:count]) + 1 for n, count in zip(text, counts, strict=True)]
    positions = np.concatenate([row * seq_len + np.minimum(place, seq_len - 1) for row, place in enumerate(places)])
    return Batch(
        input_ids=rng.integers(5, vocab_size, (rows, seq_len)) * real,
        token_type_ids=np.zeros((rows, seq_len), np.int64),
        attention_mask=real.astype(np.int64),
        mlm_positions=positions,
        mlm_labels=rng.integers(5, vocab_size, len(positions)),
        nsp_labels=rng.integers(0, 2, rows) if nsp else np.full(rows, -100),
        num_tokens=int(lengths.sum()),
    )


def time_steps(request: dict[str, Any], folder: Path) -> dict[str, float]:
    """micro_batch_s: of one between others; fixed_s: of a step beside its micro-batches. The rest: see `Timings`."""
    for name in (*rank_variables(), "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    from dsbert.checkpoint.fragments import FragmentBuffer
    from dsbert.engine.train_engine import TrainEngine
    from dsbert.models.construction import build_model
    from dsbert.sparse import MaskManager

    lengths = np.array(request["lengths"], dtype=np.int64)
    recipe = _alone(recipe_from_dict(request["recipe"]), len(lengths))
    world = process_group.init(300)
    model, layers = build_model(recipe, request["vocab_size"], world.device)
    engine = TrainEngine(recipe, model, layers, world)
    data = recipe.data
    batch = made_up(lengths, data.seq_len, request["vocab_size"], data.mask_fraction, data.nsp)
    began: list[float] = []
    clock = CLOCKS[request["clock"]]
    engine.on_progress = lambda: began.append(clock())
    micro: list[float] = []
    fixed: list[float] = []
    deadline = time.perf_counter() + 60.0
    while len(micro) < _WARM + _STEPS and (len(micro) < _WARM + 2 or time.perf_counter() < deadline):
        began.clear()
        start = clock()
        engine.train_step([batch] * _MICRO_BATCHES)
        whole = clock() - start
        micro.append(began[2] - began[1])
        fixed.append(whole - _MICRO_BATCHES * micro[-1])
    found = {"micro_batch_s": statistics.median(micro[_WARM:]), "fixed_s": max(0.0, statistics.median(fixed[_WARM:]))}
    masks = MaskManager(layers, recipe.sparsity, total_steps=recipe.optim.total_steps, editor=engine, seed=1)
    updates = [masks.maybe_update(step) for step in (1, 2, 3)]
    seconds = [update.seconds for update in updates if update]
    found["update_s"] = statistics.median(seconds) if seconds else 0.0
    buffer = FragmentBuffer()
    buffer.fill(engine.shards())  # which takes its memory
    found["snapshot_s"] = _timed(lambda: buffer.fill(engine.shards()), 3, clock)
    found["digests_s"] = _timed(engine.replica_digests, 3, clock)
    found["finite_s"] = _timed(engine.nonfinite_parameters, 3, clock)
    found["part_s_per_element"] = _part(engine.precision != "fp32", clock)
    found["peak_flops_per_s"] = 2 * _SIDE**3 / _timed(_product(), 9, clock)
    found["threads"] = torch.get_num_threads()
    path = folder / f"written-{os.getpid()}"
    data_bytes = np.random.default_rng(0).bytes(_WRITTEN_BYTES)
    found["write_bytes_per_s"] = _WRITTEN_BYTES / _timed(
        lambda: write_and_read_back(path, data_bytes), 3, time.perf_counter
    )
    path.unlink()
    return found


def time_collectives(request: dict[str, Any]) -> dict[str, float]:
    """exchange_s: of a sum of a few numbers; small_s: of the smallest that goes round a ring; bulk_bytes_per_s: on the
    wire of a rank, of a sum of many."""
    world = process_group.init(120)
    numel = min(_MOST_BULK_BYTES, request["bulk_bytes"]) // 4
    bulk, small = torch.zeros(max(1, numel)), torch.zeros(_SMALL, dtype=torch.int64)
    ring = torch.zeros(MOST_EXCHANGED_BYTES // 8 + 1, dtype=torch.int64)
    for tensor in (small, ring, bulk):
        all_reduce(tensor)
    clock = CLOCKS[request["clock"]]
    exchange_s = _timed(lambda: all_reduce(small), 30, clock)
    small_s = _timed(lambda: all_reduce(ring), 30, clock)
    bulk_s = _timed(lambda: all_reduce(bulk), 9, clock)
    sent = 2 * (world.world_size - 1) / world.world_size * bulk.numel() * 4
    return {"exchange_s": exchange_s, "small_s": small_s, "bulk_bytes_per_s": sent / max(bulk_s - small_s, 1e-9)}


def _alone(recipe: Recipe, rows: int) -> Recipe:
    """A step of three such micro-batches on one rank, with a mask update after each of the first steps."""
    batch = recipe.batch.model_copy(update={"micro_batch": rows, "global_batch": rows * _MICRO_BATCHES})
    optim = recipe.optim.model_copy(update={"total_steps": 4, "warmup_steps": 1})
    whole = {
        "update_every_steps": None,
        "num_updates": 4,
        "update_from": 0.0,
        "update_until": 1.0,
        "min_age_updates": 0,
    }
    sparsity = recipe.sparsity.model_copy(update={**whole, "regrow": "random"})
    return recipe.model_copy(update={"batch": batch, "optim": optim, "sparsity": sparsity})


def _part(half: bool, clock: Callable[[], float]) -> float:
    """Seconds for an element of a rank's part: AdamW, the norm, and copies to where it is wanted."""
    numel = 1 << 21
    master, copy = torch.zeros(numel, requires_grad=True), torch.zeros(numel, dtype=torch.bfloat16 if half else None)
    gradient = torch.randn(numel)
    optimizer = torch.optim.AdamW([master], lr=0.0, fused=True)

    @torch.no_grad()
    def work() -> None:
        master.grad = torch.cat([gradient.clone()])
        torch.linalg.vector_norm(master.grad)
        master.grad.mul_(1.0)
        optimizer.step()
        copy.copy_(master)

    work()
    return _timed(work, 5, clock) / numel


def _product() -> Callable[[], object]:
    a, b, c = (torch.randn(_SIDE, _SIDE) for _ in range(3))
    return lambda: torch.mm(a, b, out=c)


def _timed(work: Callable[[], object], count: int, clock: Callable[[], float]) -> float:
    """Median seconds of so many times, fewer where they take long."""
    seconds: list[float] = []
    deadline = time.perf_counter() + _SPAN_S
    while len(seconds) < count and (len(seconds) < 2 or time.perf_counter() < deadline):
        start = clock()
        work()
        seconds.append(clock() - start)
    return statistics.median(seconds)


def main() -> None:
    """A rank of the launch."""
    die_with_parent()
    what, request, folder = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    rank = os.environ["RANK"]
    found = time_steps(request, Path(request["folder"])) if what == "steps" else time_collectives(request)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a communicator may hang in the interpreter's teardown


if __name__ == "__main__":
    main()
