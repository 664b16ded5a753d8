"""Attention on a CPU, forward and backward: torch in a few passes, torch's fused one, and dsbert's kernel, in one run.

    python tools/bench_attention.py [--positions 64,128,512] [--head-size 32,64] [--hidden 768] [--tokens 4096]
        [--dtype fp32,bf16] [--dropout 0.1] [--threads N] [--rounds 9] [--json]

GFLOP/s count what is useful: of S positions and heads of size d, 4 S^2 d forward and 8 S^2 d backward for each head
and sequence; scores that are computed again count nothing. share: of the rate of a large dense product of the run, the
best of this dtype and fp32 (a CPU may multiply half precisions number by number). passes: products, softmax and dropout
one by one, in fp32 where half precisions are slow, as dsbert computed before it had a kernel. sdpa: torch's fused
attention, which does not know dropout on a CPU: without it. All contenders take turns; times are medians of the turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from on_ranks import markdown
from torch import Tensor
from torch.nn import functional

from dsbert.base.malloc import keep_freed_pages
from dsbert.models import fast_layers
from dsbert.models.varlen_attention import has_kernel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DENSE = 1024  # rows and columns of the dense product
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _seconds() -> float:
    """Of this process with one thread, so that who shares its core counts as little as he can; else of the clock."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class _Encoder(torch.nn.Module):
    is_causal = False


def contenders(dropout: float) -> dict[str, Attend]:
    """Name -> attention of q, k, v [b, h, S, d]: [b, S, h, d]."""

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fast_layers.attention(_Encoder(), q, k, v, None, dropout=dropout)[0]

    def passes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with mock.patch.object(fast_layers, "has_kernel", return_value=False):
            return kernel(q, k, v)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return {"passes": passes, "sdpa": sdpa, "kernel": kernel}


def dense_seconds(dtype: torch.dtype) -> Callable[[], float]:
    """Times one large dense product."""
    x, y = (torch.randn(_DENSE, _DENSE).to(dtype) for _ in range(2))

    def timed() -> float:
        start = _seconds()
        x @ y
        return _seconds() - start

    return timed


def timed(attend: Attend, operands: list[Tensor], dout: Tensor) -> tuple[float, float]:
    """Seconds of forward and of backward."""
    start = _seconds()
    out = attend(*(x.transpose(1, 2) for x in operands))
    middle = _seconds()
    torch.autograd.grad(out, operands, dout)
    return middle - start, _seconds() - middle


def records(options: argparse.Namespace, dtype: str, positions: int, size: int) -> list[dict[str, Any]]:
    """A record per contender."""
    heads, sequences = max(1, options.hidden // size), max(1, options.tokens // positions)
    shape = (sequences, positions, heads, size)
    operands = [torch.randn(shape).to(DTYPES[dtype]).requires_grad_() for _ in range(3)]
    dout = torch.randn(shape).to(DTYPES[dtype])
    dense = {name: dense_seconds(DTYPES[name]) for name in {dtype, "fp32"}}
    seconds: dict[str, list[tuple[float, ...]]] = {name: [] for name in (*contenders(0.0), *dense)}
    for turn in range(options.rounds + 1):
        for name, product in dense.items():
            if turn < 2 or seconds[name][0][0] < 1.0:  # out of the race, and slow
                seconds[name].append((product(),))
        for name, attend in contenders(options.dropout).items():
            if name != "sdpa" or turn < 2 or sum(seconds[name][0]) < 5.0:
                seconds[name].append(timed(attend, operands, dout))
    medians = {
        name: [statistics.median(part) for part in zip(*times[1:], strict=True)] for name, times in seconds.items()
    }
    dense_rate = max(2 * _DENSE**3 / medians[name][0] for name in dense)
    flops = positions**2 * size * heads * sequences
    return [
        {
            "positions": positions,
            "head_size": size,
            "dtype": dtype,
            "dropout": 0.0 if name == "sdpa" else options.dropout,
            "threads": torch.get_num_threads(),
            "attention": name,
            "forward_ms": round(1e3 * medians[name][0], 3),
            "backward_ms": round(1e3 * medians[name][1], 3),
            "gflops": round(12 * flops / sum(medians[name]) / 1e9, 1),
            "dense_gflops": round(dense_rate / 1e9, 1),
            "share": round(12 * flops / sum(medians[name]) / dense_rate, 2),
            "times_passes": round(sum(medians["passes"]) / sum(medians[name]), 2),
        }
        for name in contenders(0.0)
    ]


def main() -> None:
    """One table, or one list of records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", default="64,128,512", help="of a sequence, with commas")
    parser.add_argument("--head-size", default="32,64", help="with commas")
    parser.add_argument("--hidden", type=int, default=768, help="of all heads")
    parser.add_argument("--tokens", type=int, default=4096, help="of all sequences")
    parser.add_argument("--dtype", default="fp32", help="of fp32, bf16, fp16, with commas")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    unknown = {*options.dtype.split(",")} - {*DTYPES}
    if unknown:
        raise SystemExit(_complain(f"expected dtypes of {', '.join(DTYPES)}, found {', '.join(unknown)}"))
    if not has_kernel(torch.zeros(1, 1, 16)):
        raise SystemExit(_complain("dsbert's kernels cannot be had here: dsbert inspect --kernels says why"))
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    keep_freed_pages()  # as in training: for all contenders alike
    rows = [
        record
        for dtype in options.dtype.split(",")
        for positions in map(int, options.positions.split(","))
        for size in map(int, options.head_size.split(","))
        for record in records(options, dtype, positions, size)
    ]
    print(json.dumps(rows) if options.json else markdown(rows))


def _complain(line: str) -> int:
    print(f"bench_attention: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
