"""`dsbert plan` beside what it is about: small runs are planned, and then trained through `dsbert pretrain`'s own loop.

    python tools/check_plan.py [--data DIR] [--only NAME] [--json]

Five runs of the recipe `demo`, changed a little, on 1 to 4 ranks of this machine, ZeRO stages 0 to 3; each is planned
with `--card cpu` right before it, as other work on the machine changes from minute to minute. Measured on rank 0:

    step        median seconds from one step's begin to the next's
    memory      tensors that stay between two steps, and the most that a step adds, by torch's profiler
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
import time
from pathlib import Path
from typing import Any

from on_ranks import is_rank, markdown, on_ranks
from resident import bytes_of_tensors, most_within
from sent_bytes import count_sent_bytes

from dsbert.config.recipe import load_recipe

_WARM, _BYTES_STEP, _MEMORY_STEP, _STEPS = 6, 4, 5, 40
_COMMON = (
    "model.hidden_size=256", "model.num_layers=3", "optim.total_steps=40", "optim.warmup_steps=4",
    "sparsity.num_updates=4", "eval.every_steps=1000", "eval.sequences=0", "checkpoint.every_steps=1000",
    "log.every_steps=10", "log.wandb=false", "batch.global_batch=32",
)  # fmt: skip
_STAGE = "deepspeed.overrides={zero_optimization: {stage: %d}}"
# name -> (ranks, overrides)
CONFIGURATIONS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1 rank, stage 0, fp32": (1, ("deepspeed.config=zero0_fp32", "batch.micro_batch=32")),
    "2 ranks, stage 1, fp32": (2, ("deepspeed.config=zero1_fp32", "batch.micro_batch=16")),
    "2 ranks, stage 2, fp32, dense": (
        2, ("deepspeed.config=zero0_fp32", _STAGE % 2, "sparsity.pattern=dense", "batch.micro_batch=8"),
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
    from dsbert.training.pretrain import pretrain

    found: dict[str, Any] = {}
    began: list[float] = []
    take_step = TrainEngine.train_step

    def watched(engine: TrainEngine, *args: Any, **options: Any) -> Any:
        results: list[Any] = []
        step = engine.step + 1
        began.append(time.perf_counter())
        if step == _BYTES_STEP:
            sent.clear()
        if step == _MEMORY_STEP:
            stay = bytes_of_tensors()
            found["memory"] = stay + most_within(lambda: results.append(take_step(engine, *args, **options)))
            found["stay"] = stay
        else:
            results.append(take_step(engine, *args, **options))
        if step == _BYTES_STEP:
            found["sent"] = {name: size for name, size in sent.items() if size}
        if step in (_WARM, _STEPS):
            found[f"loopback {step}"] = _loopback()
        return results[0]

    TrainEngine.train_step = watched  # type: ignore[method-assign,assignment]
    recipe = load_recipe(arguments["recipe"], arguments["overrides"])
    code = pretrain(recipe, Path(arguments["run_dir"]))
    assert code == 0, code
    steps = [after - before for before, after in zip(began[_WARM:], began[_WARM + 1 :], strict=False)]
    loopback = (found[f"loopback {_STEPS}"] - found[f"loopback {_WARM}"]) / (_STEPS - _WARM)
    return found | {"step_s": statistics.median(steps), "loopback": loopback}


def plan_of(recipe: Any, ranks: int, run_dir: Path) -> dict[str, float]:
    """What `dsbert plan` says of it."""
    from dsbert.capacity.run_plan import Question, make_plan

    plan = make_plan(Question(recipe, 1, ranks, run_dir, card="cpu"))
    sent = {figure.name: figure.value for figure in plan["wire"].figures if "a step" in figure.name}
    kinds: dict[str, float] = {}
    for figure in plan["wire"].figures:
        if figure.name.endswith("a step: handed in"):
            kind = figure.how.partition(":")[0]
            kinds[kind] = kinds.get(kind, 0.0) + figure.value
    return {
        "step s": plan["time"]["step"].value,
        "memory MB": plan["memory of a rank"]["tensors"].value / 1e6,
        **{f"{kind} kB": size / 1e3 for kind, size in kinds.items()},
        "loopback kB": ranks * sum(size for name, size in sent.items() if name.endswith("sent")) / 1e3,
        "checkpoint MB": plan["saves"]["checkpoint"].value / 1e6,
    }


def found_in(run: dict[str, Any], run_dir: Path) -> dict[str, float]:
    """What was measured, under the same names."""
    kinds: dict[str, float] = {}
    for name, size in run["sent"].items():
        kind = next((kind for kind in ("all_reduce", "all_gather", "reduce_scatter") if name.startswith(kind)), name)
        kinds[kind] = kinds.get(kind, 0.0) + size
    (checkpoint,) = (run_dir / "checkpoints").glob("step_*[0-9]")
    files = [path for path in checkpoint.iterdir() if path.suffix == ".safetensors"]
    return {
        "step s": run["step_s"],
        "memory MB": run["memory"] / 1e6,
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
        counts = what != "loopback kB" and found > 1.0  # of nothing but control nobody plans the bytes
        ratio = value / found if found else float("nan")
        fits = not counts or abs(ratio - 1) <= limit
        rows.append(
            {
                "run": name, "what": what, "plan": f"{value:,.4g}", "measured": f"{found:,.4g}",
                "ratio": f"{ratio:.3f}", "within": f"{limit:.0%}" if counts else "", "": "" if fits else "NO",
            }
        )  # fmt: skip
    return rows


def main() -> None:
    """Plan, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", help="a part of the names of the runs to take")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if is_rank():
        on_ranks(measure, {}, 0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or _prepared(Path(folder) / "data")
        for name, (ranks, overrides) in CONFIGURATIONS.items():
            if options.only and options.only not in name:
                continue
            run_dir = Path(folder) / name.replace(" ", "-")
            words = [*_COMMON, *overrides, f"data.path={data}"]
            recipe = load_recipe("demo", words)
            planned = plan_of(recipe, ranks, run_dir)
            arguments = {"recipe": "demo", "overrides": words, "run_dir": str(run_dir)}
            run = on_ranks(measure, arguments, ranks)[0]
            rows += rows_of(name, planned, found_in(run, run_dir))
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
