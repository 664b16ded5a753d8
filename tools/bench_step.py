"""Seconds of a whole training step, sparse beside dense, in one run: where they go, and how far sparsity can get.

    python tools/bench_step.py [--recipe bert-base] [--batch 32] [--seq 128] [--dtype fp32|bf16] [--threads 2]
        [--rounds 3] [--vocab-size 30522] [--json] [a.b=value ...]

One rank, through DeepSpeed (ZeRO 1), the whole BERT with heads and dropout as in the recipe; dense is the same code
with sparsity.pattern=dense. Random tokens, masked at 1/7 of the positions. The two take turns; each time is the median
of the turns after a warm one. The breakdown is the median of as many more turns under torch's profiler: self times by
what an operator is part of; `python` is what no operator accounts for, DeepSpeed's own work included.

amdahl_limit: the dense step over everything in the sparse step but its sparse products, as if those were free.
density_limit: the same as if they took the density's share of the time of the dense products.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from typing import Any

from on_ranks import markdown

PRODUCTS = "encoder products"
# What an operator is part of, by its name or that of an operator around it; the first that fits.
_PARTS = (
    ("optimizer", ("Optimizer.step", "aten::_fused_adamw_", "Optimizer.zero_grad")),
    (PRODUCTS, ("dsbert::linear", "dsbert::dgrad", "dsbert::wgrad", "GeneratedBackwardFor_dsbert_linear")),
    ("GELU", ("dsbert::gelu_gradient", "aten::gelu")),
    ("dropout", ("dsbert::dropout", "GeneratedBackwardFor_dsbert_dropout", "aten::dropout", "aten::bernoulli_",
                 "aten::native_dropout")),
    ("attention", ("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::softmax", "aten::scaled_dot_product",
                   "aten::_scaled_dot_product")),
    ("LayerNorm", ("ResidualNorm", "aten::native_layer_norm", "aten::layer_norm")),
    ("embedding", ("aten::embedding", "EmbeddingBackward")),
    ("losses", ("VocabularyLoss", "aten::_log_softmax", "aten::nll_loss", "aten::cross_entropy", "aten::log_softmax")),
)  # fmt: skip
_MATMULS = ("aten::mm", "aten::addmm")


def part_of(event: Any, vocab_size: int) -> str:
    """The part of the step that a profiler's event belongs to."""
    if event.name in _MATMULS:
        head = any(vocab_size in shape for shape in event.input_shapes or [])
        return "MLM head" if head else PRODUCTS
    around = event
    while around is not None:
        for part, names in _PARTS:
            if around.name.removeprefix("autograd::engine::evaluate_function: ").startswith(names):
                return part
        around = around.cpu_parent
    return "element by element, copies"


def breakdown(step: Any, vocab_size: int) -> dict[str, float]:
    """Seconds of one step by part."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
    parts: defaultdict[str, float] = defaultdict(float)
    for event in profiler.events():
        parts[part_of(event, vocab_size)] += event.self_cpu_time_total / 1e6
    parts["python"] = max(0.0, seconds - sum(parts.values()))
    return dict(parts)


class Side:
    """The dense model or the sparse one, ready to step."""

    def __init__(self, options: argparse.Namespace, world: Any, overrides: list[str]) -> None:
        from dsbert.config.recipe import load_recipe
        from dsbert.engine.train_engine import TrainEngine
        from dsbert.models.construction import build_model

        recipe = load_recipe(options.recipe, [*overrides, *options.overrides])
        model, layers = build_model(recipe, options.vocab_size, world.device)
        self.engine = TrainEngine(recipe, model, layers, world)
        self.density = recipe.sparsity.density
        self.batches = _random_batches(options)
        self.seconds: list[float] = []

    def step(self) -> None:
        """One optimizer step of the whole batch."""
        self.engine.train_step(self.batches)

    def timed(self) -> None:
        """The same, with its seconds kept."""
        start = time.perf_counter()
        self.step()
        self.seconds.append(time.perf_counter() - start)


def _random_batches(options: argparse.Namespace) -> list[Any]:
    import numpy as np

    from dsbert.data.stream import Batch

    rng, shape = np.random.default_rng(0), (options.batch, options.seq)
    masked = np.arange(0, options.batch * options.seq, 7)
    batch = Batch(
        input_ids=rng.integers(5, options.vocab_size, shape),
        token_type_ids=np.zeros(shape, np.int64),
        attention_mask=np.ones(shape, np.int64),
        mlm_positions=masked,
        mlm_labels=rng.integers(5, options.vocab_size, masked.size),
        nsp_labels=rng.integers(0, 2, options.batch),
        num_samples=options.batch,
        num_tokens=masked.size * 7,
    )
    return [batch]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both sides, in turns."""
    import torch

    from dsbert.cluster import process_group

    torch.set_num_threads(options.threads)
    world = process_group.init()
    common = [
        f"batch.micro_batch={options.batch}",
        f"batch.global_batch={options.batch}",
        f"data.seq_len={options.seq}",
        f"deepspeed.config=zero1_{options.dtype}",
    ]
    sides = {
        "dense": Side(options, world, [*common, "sparsity.pattern=dense"]),
        "sparse": Side(options, world, [*common, "sparsity.pattern=static"]),
    }
    for turn in range(options.rounds + 1):
        for side in sides.values():
            side.timed() if turn else side.step()
    parts = _median_parts(sides, options)
    dense_s, sparse_s = (statistics.median(side.seconds) for side in sides.values())
    # By their shares of the profiled steps, which are a little slower than the timed ones.
    share = {name: found[PRODUCTS] / sum(found.values()) for name, found in parts.items()}
    rest, density = sparse_s * (1 - share["sparse"]), sides["sparse"].density
    return {
        "recipe": options.recipe,
        "dtype": options.dtype,
        "dense_step_s": round(dense_s, 4),
        "sparse_step_s": round(sparse_s, 4),
        "speedup": round(dense_s / sparse_s, 3),
        "amdahl_limit": round(dense_s / rest, 3),
        "density_limit": round(dense_s / (rest + density * dense_s * share["dense"]), 3),
        "breakdown": {
            part: {f"{name}_s": round(parts[name].get(part, 0.0), 4) for name in sides}
            for part in sorted({*parts["dense"], *parts["sparse"]}, key=lambda part: -parts["dense"].get(part, 0.0))
        },
        "batch": options.batch,
        "seq": options.seq,
        "threads": options.threads,
        "density": density,
        "device": _device_name(world.device),
        "kernels": list(sides["sparse"].engine.kernels.lines()),
    }


def _median_parts(sides: dict[str, Side], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The breakdown of both sides, profiled in turns."""
    turns = [
        {name: breakdown(side.step, options.vocab_size) for name, side in sides.items()} for _ in range(options.rounds)
    ]
    return {
        name: {
            part: statistics.median(turn[name].get(part, 0.0) for turn in turns)
            for part in {part for turn in turns for part in turn[name]}
        }
        for name in sides
    }


def _device_name(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from dsbert.sparse.kernels.cpu.build import instruction_set

    return f"cpu {instruction_set()}"


def main() -> None:
    """Seconds and ratios, then the breakdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="bert-base")
    parser.add_argument("--batch", type=int, default=32, help="sequences of a step")
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=30522)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    options = parser.parse_args()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": str(options.threads)}
    from dsbert.base.errors import DsbertError

    try:
        found = measure(options)
    except DsbertError as error:
        print(f"bench_step: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    if options.json:
        print(json.dumps(found))
        return
    kernels, parts = found.pop("kernels"), found.pop("breakdown")
    print(markdown([found]))
    print()
    print(markdown([{"part": part} | seconds for part, seconds in parts.items()]))
    print("\n" + "\n".join(kernels))


if __name__ == "__main__":
    main()
