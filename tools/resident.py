"""How much memory a rank of a recipe holds, beside what its tensors need: what tools/footprint.py prints last."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from pathlib import Path
from typing import Any

from dsbert.config.recipe import load_recipe

STEPS = 30  # enough for the heap to find its size
_MB = 1e6


def measure_resident(arguments: dict[str, Any]) -> dict[str, Any]:
    """One rank, on a CPU. arguments: recipe, overrides, vocab_size; allocator: "kept" for what dsbert sets of the C
    library's, "default" for torch's own.

    fixed: resident before there is a model, and the code of libraries that is read from then on; peak: the most that
    was resident, ever; needed: tensors that stay, and the most that a step adds to them. All in bytes.
    """
    import deepspeed  # noqa: F401  # before the model, as all imports

    from dsbert.cluster import process_group
    from dsbert.engine.train_engine import TrainEngine
    from dsbert.models.construction import build_model
    from dsbert.models.spec import model_spec

    if arguments["allocator"] == "default":
        # Where it was imported to, which is nobody's to use but here.
        process_group.keep_freed_pages = lambda: None  # type: ignore[attr-defined]
    world = process_group.init(120)
    recipe = load_recipe(arguments["recipe"], arguments["overrides"])
    model_spec(recipe.model)  # imports the encoder's module
    imports, code = _status("VmRSS"), _status("RssFile")
    model, layers = build_model(recipe, arguments["vocab_size"], world.device)
    engine = TrainEngine(recipe, model, layers, world)
    batches = random_batches(engine, arguments["vocab_size"], recipe.data.seq_len)
    seconds, faults = [], []
    for _ in range(STEPS):
        start, before = time.process_time(), _faults()
        engine.train_step(batches)
        seconds.append(time.process_time() - start)
        faults.append(_faults() - before)
    peak = _status("VmHWM")
    stay = bytes_of_tensors()
    return {
        "fixed": imports + _status("RssFile") - code,
        "peak": peak,
        "stay": stay,
        "needed": stay + most_within(lambda: engine.train_step(batches)),
        "step_cpu_s": statistics.median(seconds[STEPS // 2 :]),
        "faults": statistics.median(faults[STEPS // 2 :]),
    }


def random_batches(engine: Any, vocab_size: int, seq_len: int) -> list[Any]:
    """A step's micro-batches of this rank, of random tokens, masked at 1/7 of the positions."""
    import numpy as np

    from dsbert.data.stream import Batch

    rng = np.random.default_rng(engine.step)
    rows = engine.recipe.batch.micro_batch
    return [
        Batch(
            input_ids=rng.integers(5, vocab_size, (rows, seq_len)),
            token_type_ids=np.zeros((rows, seq_len), np.int64),
            attention_mask=np.ones((rows, seq_len), np.int64),
            mlm_positions=np.arange(0, rows * seq_len, 7),
            mlm_labels=rng.integers(5, vocab_size, len(range(0, rows * seq_len, 7))),
            nsp_labels=rng.integers(0, 2, rows),
            num_tokens=rows * seq_len,
        )
        for _ in engine.plan()
    ]


def most_within(step: Any) -> int:
    """The most bytes of tensors that `step` holds beyond those at its start, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def rows(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A line of a table for each allocator."""
    return [
        {
            "freed memory": name,
            "imports and code, MB": round(one["fixed"] / _MB),
            "peak resident, MB": round(one["peak"] / _MB),
            "beyond them, MB": round((one["peak"] - one["fixed"]) / _MB),
            "tensors need, MB": round(one["needed"] / _MB),
            "ratio": f"{(one['peak'] - one['fixed']) / one['needed']:.2f}",
            "CPU s a step": f"{one['step_cpu_s']:.3f}",
            "page faults a step": round(one["faults"]),
        }
        for name, one in found.items()
    ]


def bytes_of_tensors() -> int:
    """Of all tensors that are alive, each storage once."""
    import torch

    gc.collect()
    alive: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            alive[storage.data_ptr()] = storage.nbytes()
    return sum(alive.values())


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes. VmHWM is this program's own; getrusage would begin with its parent's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
