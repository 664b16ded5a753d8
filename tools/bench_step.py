"""Seconds of a whole training step, sparse beside dense, in one run: where they go, and how far sparsity can get.

    python tools/bench_step.py [--recipe bert-base] [--batch 32] [--seq 128] [--dtype fp32|bf16] [--threads 2]
        [--rounds 3] [--vocab-size 30522] [--data DIR] [--peer transformers] [--json] [a.b=value ...]

One rank, through DeepSpeed (ZeRO 1), the whole BERT with heads and dropout as in the recipe; dense is the same code
with sparsity.pattern=dense. Random tokens, masked at 1/7 of the positions, in sequences that are full; with --data the
first samples of prepared text, as long as they are; tokens_per_s are of real tokens. The two take turns; each time is
the median of the turns after a warm one. The breakdown is the median of up to three more turns under torch's profiler:
self times by what an operator is part of, on a card of what the operator had it do; `python` is what no operator
accounts for, DeepSpeed's own work included.

amdahl_limit: the dense step over everything in the sparse step but its sparse products, as if those were free.
density_limit: the same as if they took the density's share of the time of the dense products.

--peer transformers: BertForPreTraining of transformers under plain torch takes turns with both, on the same batches
(peer_transformers.py); *_vs_transformers: how many times its tokens a second.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from on_ranks import markdown

PRODUCTS = "encoder products"
# What an operator is part of, by its name or that of an operator around it; the first that fits.
_PARTS = (
    ("optimizer", ("Optimizer.step", "aten::_fused_adamw_", "Optimizer.zero_grad")),
    (PRODUCTS, ("BlockSparseProduct", "dsbert::linear", "dsbert::dgrad", "dsbert::wgrad",
                "GeneratedBackwardFor_dsbert_linear")),
    ("GELU", ("dsbert::gelu_gradient", "aten::gelu")),
    ("dropout", ("dsbert::dropout", "GeneratedBackwardFor_dsbert_dropout", "aten::dropout", "aten::bernoulli_",
                 "aten::native_dropout")),
    ("attention", ("VarlenAttention", "dsbert::varlen_attention", "GeneratedBackwardFor_dsbert_varlen_attention",
                   "aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::softmax", "aten::scaled_dot_product",
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


def breakdown(step: Any, vocab_size: int, device: Any) -> dict[str, float]:
    """Seconds of one step by part."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_card = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_card], record_shapes=True) as profiler:
        start = time.perf_counter()
        step()
        if on_card:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    parts: defaultdict[str, float] = defaultdict(float)
    for event in profiler.events():
        if event.device_type == DeviceType.CPU:  # kernels on a card are told once more, as the time of their operators
            time_us = event.self_device_time_total if on_card else event.self_cpu_time_total
            parts[part_of(event, vocab_size)] += time_us / 1e6
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
        self.density, self.device = recipe.sparsity.density, world.device
        self.batches = _samples(options, recipe.seed) if options.data else _random_batches(options)

    def step(self) -> None:
        """One optimizer step of the whole batch."""
        self.engine.train_step(self.batches)


def in_turns(steps: dict[str, Callable[[], object]], rounds: int, device: Any) -> dict[str, float]:
    """Median seconds of every step; they take turns, after a warm one each. A card has done all of one before the next
    begins."""
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _samples(options: argparse.Namespace, seed: int) -> list[Any]:
    from dsbert.data.stream import SampleStream

    return [SampleStream.open(options.data, "train", options.seq, seed).batch(0, options.batch)]


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
        num_tokens=masked.size * 7,
    )
    return [batch]


def measure(options: argparse.Namespace, world: Any) -> dict[str, Any]:
    """Both sides, in turns. world: a world of one (process_group.init)."""
    import torch

    from dsbert.data.manifest import load_manifest

    torch.set_num_threads(options.threads)
    if options.data:
        options.vocab_size = load_manifest(options.data).tokenizer.vocab_size
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
    steps: dict[str, Callable[[], object]] = {name: side.step for name, side in sides.items()}
    steps |= _peers(options, sides["dense"], world.device)
    seconds = in_turns(steps, options.rounds, world.device)
    parts = _median_parts(sides, options)
    dense_s, sparse_s = seconds["dense"], seconds["sparse"]
    # By their shares of the profiled steps, which are a little slower than the timed ones.
    share = {name: found[PRODUCTS] / sum(found.values()) for name, found in parts.items()}
    tokens = sum(batch.num_tokens for batch in sides["dense"].batches)
    rest, density = sparse_s * (1 - share["sparse"]), sides["sparse"].density
    return {
        "recipe": options.recipe,
        "dtype": options.dtype,
        "tokens": tokens,
        "dense_tokens_per_s": round(tokens / dense_s),
        "sparse_tokens_per_s": round(tokens / sparse_s),
        "dense_step_s": round(dense_s, 4),
        "sparse_step_s": round(sparse_s, 4),
        "speedup": round(dense_s / sparse_s, 3),
        "amdahl_limit": round(dense_s / rest, 3),
        "density_limit": round(dense_s / (rest + density * dense_s * share["dense"]), 3),
        **_rates(seconds, sides["dense"].batches),
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


def _peers(options: argparse.Namespace, dense: Side, device: Any) -> dict[str, Callable[[], object]]:
    """Name -> a step of it, of what is asked for beside our own sides, on the batches of the dense one."""
    if options.peer is None:
        return {}
    from peer_transformers import TransformersPeer

    peer = TransformersPeer(dense.engine.recipe, options.vocab_size, dense.batches, device, options.dtype)
    return {options.peer: peer.step}


def _rates(seconds: dict[str, float], batches: list[Any]) -> dict[str, float]:
    """Tokens a second, padding not counted, of every side, and how many times those of a peer ours are."""
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    found: dict[str, float] = {"tokens": tokens}
    found |= {f"{name}_tokens_per_s": round(tokens / s) for name, s in seconds.items()}
    for peer in sorted({*seconds} - {"dense", "sparse"}):
        found[f"{peer}_step_s"] = round(seconds[peer], 4)
        found |= {f"{ours}_vs_{peer}": round(seconds[peer] / seconds[ours], 3) for ours in ("dense", "sparse")}
    return found


def _median_parts(sides: dict[str, Side], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The breakdown of both sides, profiled in turns."""
    turns = [
        {name: breakdown(side.step, options.vocab_size, side.device) for name, side in sides.items()}
        for _ in range(min(options.rounds, 3))
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


def options_from(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="bert-base")
    parser.add_argument("--batch", type=int, default=32, help="sequences of a step")
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=30522)
    parser.add_argument("--peer", choices=["transformers"], help="what takes turns with dsbert")
    parser.add_argument("--data", help="a directory that dsbert prepare has made")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    return parser.parse_args(words)


def main() -> None:
    """Seconds and ratios, then the breakdown."""
    options = options_from()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": str(options.threads)}
    from dsbert.base.errors import DsbertError
    from dsbert.cluster import process_group

    try:
        found = measure(options, process_group.init())
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
