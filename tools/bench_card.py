"""Check and time the Triton kernels on a machine with a CUDA card, in one call of a few minutes.

    python tools/bench_card.py --out runs/card [--quick] [--no-tuning] [--seconds 480]

1. parity: every product, block size and dtype against float64, on awkward topologies; a failure makes the exit code 1.
2. tuning: for bf16, the fastest launch of each product and block size over the layer shapes; used in what follows.
3. times: QKV, O, FF1 and FF2 of H = 768 and 1024 at 16384 tokens, against cuBLAS, and torch's own block-sparse kernels
   for as long as the time lasts.

Writes tables.md, records.json (as tools/bench_kernels.py), parity.json and configs.json. --dry-run goes the same way
with tiny shapes in Triton's interpreter, and says nothing about speed. Exit code 2: no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from card_problems import Shape, Timer

BLOCK_SIZES = (16, 32, 64, 128)


def options_from(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for the tables")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--block", default="16,32,64,128")
    parser.add_argument("--hidden", default="768,1024")
    parser.add_argument("--seconds", type=float, default=480, help="leave out what does not fit into this time")
    parser.add_argument("--quick", action="store_true", help="H = 768 only, no tuning, no peers but cuBLAS")
    parser.add_argument("--no-tuning", action="store_true", help="launch as the table says")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in Triton's interpreter, on the CPU")
    options = parser.parse_args(words)
    options.blocks = [int(size) for size in options.block.split(",")]
    options.hiddens = [int(size) for size in options.hidden.split(",")]
    if options.quick:
        options.hiddens, options.no_tuning = options.hiddens[:1], True
    if options.dry_run:
        options.hiddens, options.tokens, options.blocks = [64], 16, options.blocks[:1]
    return options


def parity(blocks: list[int], device: Any) -> list[dict[str, Any]]:
    """A row per dtype, block size, topology and product, with its error and what is allowed."""
    import torch
    from card_problems import AWKWARD, awkward_problem, exact
    from torch.nn import functional

    from dsbert.sparse.kernels.index import PRODUCTS
    from dsbert.sparse.kernels.triton_gpu import forward_gelu
    from dsbert.sparse.kernels.triton_gpu.tuning import relative_error

    # Sums of products in fp32; rounding of one result, and in the interpreter its truncation, for the half precisions.
    allowed = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
    rows = []
    for dtype, limit in allowed.items():
        for size in blocks:
            for topology in AWKWARD if device.type == "cuda" else AWKWARD[:1]:
                problem = awkward_problem(topology, size, dtype, device)
                errors: dict[str, float] = {
                    name: relative_error(problem.call(name), exact(name, problem)) for name in PRODUCTS
                }
                activated, y = forward_gelu(problem.x, problem.blocks, problem.index, None)
                errors["gelu"] = relative_error(activated, functional.gelu(y.double()))
                for name, error in errors.items():
                    rows.append({"product": name, "dtype": str(dtype)[6:], "block": size, "topology": topology,
                                 "rel_error": error, "allowed": limit, "passed": error <= limit})  # fmt: skip
    return rows


def tuned(blocks: list[int], shapes: list[Shape], options: argparse.Namespace, timer: Timer, until: float) -> list[Any]:
    """Put the fastest launches in place; a row per product and block size that there was time for."""
    import torch
    from card_problems import problem_of

    from dsbert.sparse.kernels.index import PRODUCTS
    from dsbert.sparse.kernels.triton_gpu.configs import set_config
    from dsbert.sparse.kernels.triton_gpu.tuning import candidates, tune

    rows: list[Any] = []
    for size in blocks:
        problems = [problem_of(shape, options.tokens, size, options.density, torch.bfloat16, timer.device)
                    for shape in shapes]  # fmt: skip
        for product in PRODUCTS:
            if time.monotonic() > until:
                return rows
            among = candidates(product, size, "half")[: 2 if options.dry_run else None]
            found = tune(product, problems, timer.one, among)
            set_config(product, size, torch.bfloat16, timer.device, found[0][1])
            for rank, (milliseconds, config) in enumerate(found):
                rows.append({"product": product, "block": size, "rank": rank, "ms": milliseconds,
                             "kind": type(config).__name__, **asdict(config)})  # fmt: skip
    return rows


def main(words: list[str] | None = None) -> int:
    """Run, print, write."""
    options = options_from(words)
    started = time.monotonic()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print("bench_card: expected a CUDA device, found none; --dry-run needs none", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.dry_run else "cuda")
    from dsbert.sparse.kernels.triton_gpu import why_not

    reason = why_not(device, torch.bfloat16, 16)
    if reason:
        print(f"bench_card: {reason}", file=sys.stderr)
        return 2
    import card_tables
    from card_problems import Timer, layer_shapes, measure, rates

    options.out.mkdir(parents=True, exist_ok=True)
    timer = Timer(device)
    rows = parity(options.blocks, device)
    write(options.out / "parity.json", rows)
    failed = [row for row in rows if not row["passed"]]
    for row in failed:
        print(f"bench_card: wrong: {row}", file=sys.stderr)
    shapes = [shape for hidden in options.hiddens for shape in layer_shapes(hidden)][: 2 if options.dry_run else None]
    until = started + options.seconds
    configs = (
        [] if options.no_tuning else tuned(options.blocks, shapes[:4], options, timer, started + 0.55 * options.seconds)
    )
    write(options.out / "configs.json", configs)
    records = measure(shapes, options, timer, until)
    write(options.out / "records.json", records)
    text = card_tables.render(timer, rates(timer), rows, configs, records, time.monotonic() - started)
    (options.out / "tables.md").write_text(text, encoding="utf-8")
    print(text)
    return 1 if failed else 0


def write(path: Path, rows: list[Any]) -> None:
    """JSON, one row a line; what is no finite number is null."""
    lines = [
        json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})
        for row in rows
    ]
    path.write_text("[" + ",\n ".join(lines) + "]\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
