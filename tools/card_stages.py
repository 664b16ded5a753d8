"""The stages of tools/card_suite.py, each of which runs in a process of its own:

    python tools/card_stages.py STAGE --records FILE --work DIR --seconds 60 [--text DIR] [--dry-run]

parity    every kernel against float64, on awkward topologies; what the card itself does
tests     tests/test_gpu.py
products  QKV, O, FF1 and FF2 of H = 768 and 1024 at 16384 tokens: ours, cuBLAS and a peer
steps     whole steps of BERT-Base and Large at B = 64 and 32, dense, sparse and transformers
training  card_training.py
tuning    the fastest launch of each product and block size, and the products with it

Exit code 3: left out, and why on the last line. Any other but 0: failed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import product as combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from card_records import Skipped, Stage

if TYPE_CHECKING:
    import torch
    from card_problems import Shape
    from card_products import Setting

    from dsbert.sparse.kernels.index import Product

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = 3
# The order in which products are timed: first the size at which most is to be gained.
SIZES = (64, 32, 16)
_TEST_LINE = re.compile(r"^(\S+::\S+) (PASSED|FAILED|ERROR|SKIPPED)")


def parity(stage: Stage) -> None:
    """A record per dtype, block size, topology and product, with its error and what is allowed; then one of the card.

    A process per block size: what takes the time is to compile the kernels.
    """
    import card_problems

    device = _device(stage)
    if stage.dry_run:
        wrong = _wrong(stage, 16)
    else:
        with ProcessPoolExecutor(4, multiprocessing.get_context("spawn")) as pool:
            wrong = sum(pool.map(partial(_wrong, stage), (16, 32, 64, 128)))
    stage.record("rates", **card_problems.rates(card_problems.Timer(device)))
    if wrong:
        raise RuntimeError(f"{wrong} products are further from float64 than their precision allows")


def _wrong(stage: Stage, size: int) -> int:
    """Check the kernels of one block size; how many are wrong. bf16, which is trained in, comes first."""
    import card_problems
    import torch
    from torch.nn import functional

    from dsbert.sparse.kernels.index import PRODUCTS
    from dsbert.sparse.kernels.triton_gpu import forward_gelu
    from dsbert.sparse.kernels.triton_gpu.tuning import relative_error

    # Sums of products in fp32; rounding of one result, and in the interpreter its truncation, for the half precisions.
    allowed = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}
    wrong = 0
    for dtype, limit in allowed.items():
        for topology in card_problems.AWKWARD[: 1 if stage.dry_run else None]:
            problem = card_problems.awkward_problem(topology, size, dtype, _device(stage))
            errors: dict[str, float] = {
                name: relative_error(problem.call(name), card_problems.exact(name, problem)) for name in PRODUCTS
            }
            activated, y = forward_gelu(problem.x, problem.blocks, problem.index, None)
            errors["gelu"] = relative_error(activated, functional.gelu(y.double()))
            for name, error in errors.items():
                wrong += not error <= limit
                stage.record("check", product=name, dtype=str(dtype)[6:], block=size, topology=topology,
                             rel_error=error, allowed=limit, passed=error <= limit)  # fmt: skip
    return wrong


def tests(stage: Stage) -> None:
    """A record per test of tests/test_gpu.py, as soon as it has ended."""
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-v", "-m", "gpu", "-p", "no:cacheprovider"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    began, outcomes = time.monotonic(), []
    for line in process.stdout:
        sys.stdout.write(line)
        if found := _TEST_LINE.match(line):
            outcomes.append(found[2])
            stage.record("test", test=found[1], outcome=found[2].lower(), seconds=round(time.monotonic() - began, 1))
            began = time.monotonic()
    if process.wait() or not outcomes:
        raise RuntimeError(f"pytest ended with {process.returncode} after {len(outcomes)} tests")
    if {*outcomes} == {"SKIPPED"}:
        raise Skipped("no CUDA device: all tests were skipped")


def products(stage: Stage) -> None:
    """Ours beside cuBLAS at every size, then the peer with the time that is left."""
    import card_peers
    import card_products

    if stage.dry_run:
        card_peers.interpret()
    shapes, sizes, setting = _layers(stage)
    failed = 0
    for record in card_products.ours(shapes, sizes, setting):
        failed += "error" in record
        stage.record("product", **record)
    for record in card_products.peers(shapes, sizes, setting):
        stage.record("product", **record)
    if failed:
        raise RuntimeError(f"{failed} products could not be computed")


def steps(stage: Stage) -> None:
    """Whole steps through DeepSpeed: tools/bench_step.py with all ranks of one, per recipe and block size."""
    import gc

    import bench_step
    import torch

    from dsbert.cluster import process_group
    from dsbert.config.recipe import load_recipe
    from dsbert.models.construction import recipe_flops

    world = process_group.init()
    longest = 0.0
    shape = "--batch 2 --seq 16 --vocab-size 64 --rounds 1" if stage.dry_run else "--batch 128 --seq 128 --rounds 10"
    for recipe in ("demo",) if stage.dry_run else ("bert-base", "bert-large"):
        for size in (16,) if stage.dry_run else (64, 32):
            if stage.left_s() < 1.2 * longest:
                return
            began = time.monotonic()
            words = f"--recipe {recipe} {shape} --dtype {'fp32' if stage.dry_run else 'bf16'} --peer transformers"
            overrides = [f"sparsity.block_size={size}"]
            options = bench_step.options_from([*words.split(), *overrides])
            found = bench_step.measure(options, world)
            tflop = {}
            for name, pattern in (("dense", "dense"), ("sparse", "static")):
                more = [f"data.seq_len={options.seq}", f"sparsity.pattern={pattern}"]
                kept = recipe_flops(load_recipe(recipe, [*overrides, *more]))
                tflop[f"{name}_tflop"] = options.batch * kept / 1e12
            stage.record("step", block=size, **found, **tflop)
            longest = max(longest, time.monotonic() - began)
            gc.collect()  # models and optimizers of this turn
            torch.cuda.empty_cache()


def training(stage: Stage) -> None:
    """Text, a run on it, a kill, and what comes after."""
    import card_training

    card_training.train(stage)


def tuning(stage: Stage) -> None:
    """A record per launch that was tried, fastest first, and the products by the fastest ones.

    Launches are compiled by many processes before one times them: that is most of the work.
    """
    import card_products
    import torch
    from card_problems import problem_of

    from dsbert.sparse.kernels.index import PRODUCTS
    from dsbert.sparse.kernels.triton_gpu.configs import set_config
    from dsbert.sparse.kernels.triton_gpu.tuning import candidates, tune

    shapes, sizes, setting = _layers(stage)
    if not stage.dry_run:
        with ProcessPoolExecutor(len(sizes) * len(PRODUCTS), multiprocessing.get_context("spawn")) as pool:
            list(pool.map(partial(_compile, stage), *zip(*combinations(PRODUCTS, sizes), strict=True)))
    for size in sizes:
        problems = [problem_of(shape, setting.tokens, size, setting.density, setting.dtype, setting.timer.device)
                    for shape in shapes[:4]]  # fmt: skip
        for product in PRODUCTS:
            if not setting.go_on():
                return
            among = candidates(product, size, "half")[: 2 if stage.dry_run else None]
            found = tune(product, problems, setting.timer.one, among)
            set_config(product, size, torch.bfloat16, setting.timer.device, found[0][1])
            for rank, (milliseconds, config) in enumerate(found):
                stage.record("launch", product=product, block=size, rank=rank, ms=milliseconds,
                             config=type(config).__name__, values=asdict(config))  # fmt: skip
        for record in card_products.ours(shapes, [size], setting, "triton_tuned"):
            stage.record("product", **record)


def _compile(stage: Stage, product: Product, size: int) -> None:
    """Leave every launch of a product in Triton's cache on the disk; what cannot be compiled is left out later, too."""
    import torch
    from card_problems import problem_of

    from dsbert.sparse.kernels.triton_gpu.configs import set_config
    from dsbert.sparse.kernels.triton_gpu.tuning import candidates

    shapes, _, setting = _layers(stage)
    device = setting.timer.device
    problems = [problem_of(shape, setting.tokens, size, setting.density, setting.dtype, device) for shape in shapes[:4]]
    for config in candidates(product, size, "half"):
        set_config(product, size, torch.bfloat16, device, config)
        for problem in problems:
            with suppress(Exception):  # triton has no common class for "does not fit" and "does not compile"
                problem.call(product)


def _device(stage: Stage) -> torch.device:
    """The card, or in a dry run the CPU. Raises Skipped where the kernels cannot run on it."""
    import torch

    from dsbert.sparse.kernels.triton_gpu import why_not

    device = torch.device("cpu" if stage.dry_run else "cuda")
    if reason := why_not(device, torch.bfloat16, 16):
        raise Skipped(reason)
    return device


def _layers(stage: Stage) -> tuple[list[Shape], tuple[int, ...], Setting]:
    """Shapes, block sizes, and what else is the same of all products: of a dry run, as few as go all the way."""
    import torch
    from card_problems import Timer, layer_shapes
    from card_products import Setting

    timer = Timer(_device(stage))
    if stage.dry_run:  # the interpreter multiplies the bits of bf16, in kernels that do not know of it
        return layer_shapes(64)[1:2], (32,), Setting(64, 0.25, torch.float16, timer, lambda: True)
    setting = Setting(16384, 0.1, torch.bfloat16, timer, lambda: stage.left_s() > 3.0)
    return [shape for hidden in (768, 1024) for shape in layer_shapes(hidden)], SIZES, setting


STAGES: dict[str, Callable[[Stage], None]] = {
    "parity": parity,
    "tests": tests,
    "products": products,
    "steps": steps,
    "training": training,
    "tuning": tuning,
}
# In a dry run: those whose kernels are Triton's.
INTERPRETED = ("parity", "products", "tuning")


def main(words: list[str] | None = None) -> int:
    """Run one stage."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    options: Any = parser.parse_args(words)
    if options.dry_run:  # before torch and triton are imported: both look once
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = str(int(options.stage in INTERPRETED))
    stage = Stage(options.stage, options.records, options.work, began + options.seconds, options.text, options.dry_run)
    try:
        STAGES[options.stage](stage)
    except Skipped as reason:
        print(reason, file=sys.stderr)
        return SKIPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
