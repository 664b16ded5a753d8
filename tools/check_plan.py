"""`dsbert plan` beside what it is about: small runs are planned, and then trained through `dsbert pretrain`'s own loop.

    python tools/check_plan.py [--data DIR] [--only NAME] [--json]

Five runs of the recipe `demo`, changed a little, on 1 to 4 ranks of this machine, ZeRO stages 0 to 3; each is planned
with `--card cpu` right before it and
right after it, as other work on the machine changes from minute to minute; the mean of both counts. Measured on rank 0:

    step        median seconds from one step's begin to the next's; with --clock cpu those of rank 0's process, where
                others have the cores as well
    memory      tensors that stay between two steps, and the most that a step adds, by torch's profiler: the mean of
                two steps and all ranks, planned for the very micro-batches of those, which differ in their tokens
    sent        bytes handed to each kind of collective in a step, by counting calls
    loopback    bytes over the interface `lo` in a step, all ranks together; whoever else uses it counts as well
    checkpoint  bytes of fragments and topology

Exits with 1 where a step is further than 15 % from its plan, or memory, bytes or checkpoints are further than 5 %.
Without --data, `dsbert prepare --source sotu` makes some, in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from on_ranks import is_rank, markdown, on_ranks
from resident import bytes_of_tensors, most_within
from sent_bytes import count_sent_bytes

from dsbert.config.recipe import Recipe, load_recipe
from dsbert.data.manifest import load_manifest

_BYTES_STEP, _MEMORY_STEPS, _WARM, _STEPS = 4, (5, 6), 8, 24
_COMMON = (
    "model.hidden_size=256", "model.num_layers=3", "optim.total_steps=24", "optim.warmup_steps=4",
    "sparsity.num_updates=4", "eval.every_steps=1000", "eval.sequences=0", "checkpoint.every_steps=1000",
    "log.every_steps=10", "log.wandb=false", "batch.global_batch=32",
)  # fmt: skip
_STAGE = "deepspeed.overrides={zero_optimization: {stage: %d}}"
# name -> (ranks, overrides)
CONFIGURATIONS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1 rank, stage 0, fp32": (1, ("deepspeed.config=zero0_fp32", "batch.micro_batch=32")),
    "2 ranks, stage 1, fp32": (2, ("deepspeed.config=zero1_fp32", "batch.micro_batch=16")),
    "2 ranks, stage 2, fp32, dense": (
        2, ("deepspeed.config=zero0_fp32", _STAGE % 2, "sparsity.pattern=dense", "batch.micro_batch=16"),
    ),
    "2 ranks, stage 3, fp32, low rank": (
        2, ("deepspeed.config=zero0_fp32", _STAGE % 3, "sparsity.low_rank=8", "batch.micro_batch=16"),
    ),
    "4 ranks, stage 1, bf16": (4, ("deepspeed.config=zero1_bf16", "batch.micro_batch=4")),
}  # fmt: skip
_LIMITS = {"step s": 0.15, "memory MB": 0.05, "checkpoint MB": 0.05}  # of all others, bytes: 5 %


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """One rank of a run."""
    sent = count_sent_bytes()
    from dsbert.engine.train_engine import TrainEngine
    from dsbert.jobs.capacity.timing_worker import CLOCKS
    from dsbert.training.pretrain import pretrain

    found: dict[str, Any] = {"memory": [], "lengths": []}
    began: list[float] = []
    clock = CLOCKS[arguments["clock"]]
    take_step = TrainEngine.train_step

    def watched(engine: TrainEngine, *args: Any, **options: Any) -> Any:
        results: list[Any] = []
        step = engine.step + 1
        began.append(clock())
        if step == _BYTES_STEP:
            sent.clear()
        if step in _MEMORY_STEPS:
            stay = bytes_of_tensors()
            most = most_within(lambda: results.append(take_step(engine, *args, **options)))
            found["memory"].append(stay + most)
            longest = max(args[0], key=lambda batch: batch.num_tokens)
            found["lengths"].append(longest.attention_mask.sum(1).tolist())
        else:
            results.append(take_step(engine, *args, **options))
        if step == _BYTES_STEP:
            found["sent"] = {name: size for name, size in sent.items() if size}
        if step in (_WARM, _STEPS):
            found[f"loopback {step}"] = _loopback()
        return results[0]

    TrainEngine.train_step = watched  # type: ignore[assignment]  # for this process alone, to read its clock
    recipe = load_recipe(arguments["recipe"], arguments["overrides"])
    code = pretrain(recipe, Path(arguments["run_dir"]))
    assert code == 0, code
    steps = [after - before for before, after in zip(began[_WARM:], began[_WARM + 1 :], strict=False)]
    loopback = (found[f"loopback {_STEPS}"] - found[f"loopback {_WARM}"]) / (_STEPS - _WARM)
    return found | {"step_s": statistics.median(steps), "loopback": loopback}


def planned_memory(recipe: Recipe, ranks: int, vocab_size: int, lengths: list[int]) -> float:
    """Bytes of tensors that a rank holds at most with a micro-batch of these lengths."""
    import numpy as np

    from dsbert.engine.ds_config import load_ds_config
    from dsbert.jobs.capacity.figures import Part
    from dsbert.jobs.capacity.model_size import ModelSize
    from dsbert.jobs.capacity.rank_memory import rank_memory
    from dsbert.jobs.capacity.workload import Samples, Workload
    from dsbert.jobs.capacity.zero_layout import ZeroLayout

    samples = Samples(np.sort(np.array(lengths, dtype=np.int64)), None, vocab_size, "measured", "")
    work = Workload.of(recipe, ranks, samples)
    config = load_ds_config(recipe, ranks, work.accumulation_steps)
    layout = ZeroLayout(ModelSize.of(recipe, vocab_size), config, ranks)
    memory: Part = rank_memory(layout, work, on_card=False, widened=layout.precision != "fp32" and is_widened())
    return memory["tensors"].value


def is_widened() -> bool:
    """Whether half precisions are multiplied in fp32 here."""
    import torch

    from dsbert.sparse.half_precision import multiplies

    return not multiplies(torch.bfloat16)


def plan_of(recipe: Recipe, ranks: int, run_dir: Path, clock: Literal["wall", "cpu"]) -> dict[str, float]:
    """What `dsbert plan` says of it."""
    from dsbert.jobs.capacity.run_plan import Question, make_plan

    plan = make_plan(Question(recipe, 1, ranks, run_dir, card="cpu", clock=clock))
    sent = {figure.name: figure.value for figure in plan["wire"].figures if "a step" in figure.name}
    kinds: dict[str, float] = {}
    for figure in plan["wire"].figures:
        if figure.name.endswith("a step: handed in"):
            kind = figure.how.partition(":")[0]
            kinds[kind] = kinds.get(kind, 0.0) + figure.value
    return {
        "step s": plan["time"]["step"].value,
        **{f"{kind} kB": size / 1e3 for kind, size in kinds.items()},
        "loopback kB": ranks * sum(size for name, size in sent.items() if name.endswith("sent")) / 1e3,
        "checkpoint MB": plan["saves"]["checkpoint"].value / 1e6,
    }


def found_in(ranks: list[dict[str, Any]], run_dir: Path) -> dict[str, float]:
    """What was measured, under the same names."""
    run = ranks[0]
    kinds: dict[str, float] = {}
    for name, size in run["sent"].items():
        kind = next(
            (kind for kind in ("all_reduce", "all_gather", "reduce_scatter", "exchange") if name.startswith(kind)), name
        )
        kinds[kind] = kinds.get(kind, 0.0) + size
    (checkpoint,) = (run_dir / "checkpoints").glob("step_*[0-9]")
    files = [path for path in checkpoint.iterdir() if path.suffix == ".safetensors"]
    return {
        "step s": run["step_s"],
        "memory MB": statistics.mean(size for rank in ranks for size in rank["memory"]) / 1e6,
        **{f"{kind} kB": size / 1e3 for kind, size in kinds.items()},
        "loopback kB": run["loopback"] / 1e3,
        "checkpoint MB": sum(path.stat().st_size for path in files) / 1e6,
    }


def rows_of(name: str, planned: dict[str, float], measured: dict[str, float]) -> list[dict[str, Any]]:
    """A line for each figure that was planned."""
    rows = []
    for what, value in planned.items():
        found = measured.get(what, 0.0)
        limit = _LIMITS.get(what, 0.05)
        counts = what != "loopback kB" and (found > 1.0 or "kB" not in what)  # few bytes are control alone
        ratio = value / found if found else float("nan")
        fits = not counts or abs(ratio - 1) <= limit
        rows.append(
            {
                "run": name, "what": what, "plan": f"{value:,.4g}", "measured": f"{found:,.4g}",
                "ratio": f"{ratio:.3f}", "within": f"{limit:.0%}" if counts else "", "": "" if fits else "NO",
            }
        )  # fmt: skip
    return rows


def compared(name: str, data: Path, folder: Path, clock: Literal["wall", "cpu"]) -> list[dict[str, Any]]:
    """Plan, train, plan once more."""
    ranks, overrides = CONFIGURATIONS[name]
    run_dir = folder / name.replace(" ", "-")
    words = [*_COMMON, *overrides, f"data.path={data}"]
    recipe = load_recipe("demo", words)
    plans = [plan_of(recipe, ranks, run_dir, clock)]
    arguments = {"recipe": "demo", "overrides": words, "run_dir": str(run_dir), "clock": clock}
    found = on_ranks(measure, arguments, ranks)
    plans.append(plan_of(recipe, ranks, folder, clock))
    planned = {what: statistics.mean(plan[what] for plan in plans) for what in plans[0]}
    vocab_size = load_manifest(data).tokenizer.vocab_size
    every = [lengths for rank in found for lengths in rank["lengths"]]
    planned["memory MB"] = statistics.mean(planned_memory(recipe, ranks, vocab_size, one) for one in every) / 1e6
    return rows_of(name, planned, found_in(found, run_dir))


def main() -> None:
    """All of them, as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", help="a part of the names of the runs to take")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if is_rank():
        on_ranks(measure, {}, 0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or _prepared(Path(folder) / "data")
        for name in CONFIGURATIONS:
            if not options.only or options.only in name:
                rows += compared(name, data, Path(folder), options.clock)
    print(json.dumps(rows) if options.json else markdown(rows))
    sys.exit(any(row[""] for row in rows))


def _prepared(to: Path) -> Path:
    command = [sys.executable, "-m", "dsbert", "prepare", "--source", "sotu", "--to", str(to), "--vocab-size", "2048"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return to


def _loopback() -> int:
    """Bytes that `lo` has carried since the machine started."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name.strip() == "lo":
            return int(rest.split()[0])
    return 0


if __name__ == "__main__":
    main()
