"""The three sparse products beside dense ones, in one run: milliseconds, GFLOP/s on kept FLOPs, ratios and errors.

    python tools/bench_kernels.py [--device cpu|cuda] [--in 768] [--out 3072] [--tokens 2048] [--block 16,32]
        [--density 0.1] [--dtype fp32,bf16] [--threads N] [--backend cpu,reference,...] [--rounds 9] [--peers] [--json]

Dense contenders multiply a weight that is dense already: F.linear and its two gradients (`linear`: the ratio
speedup_vs_dense), oneDNN (`onednn`), F.linear in fp32 around half precisions (`linear_fp32`), torch's block-sparse
product (`torch_bsr`, forward only). --peers: MKL's too, where it is installed (`mkl_bsr`: fp32, forward and dgrad).
speedup_vs_best_dense is against the fastest dense one of the run. All contenders of a product take turns, and each time
is the median of the turns (what takes over 3 seconds has one); a ratio above 1 / density says that the dense side is
lame: look at its GFLOP/s. rel_error: Frobenius norm of the difference to
float64 over that of the result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from on_ranks import markdown
from torch import Tensor
from torch.nn import functional

from dsbert.base.malloc import keep_freed_pages
from dsbert.sparse import BlockTopology, DrawKey
from dsbert.sparse.kernels.backends import BACKENDS, DENSE
from dsbert.sparse.kernels.index import PRODUCTS, KernelIndex

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DENSE = ("linear", "onednn", "linear_fp32")
Call = Callable[[], Tensor]


class Case:
    """One weight, one batch of tokens: operands, contenders by product, and float64 results."""

    def __init__(self, options: argparse.Namespace, block: int, dtype: torch.dtype) -> None:
        device, shape = torch.device(options.device), (options.out_features, options.in_features)
        topology = BlockTopology.random(shape, block, options.density, DrawKey(0, "init", 0, "bench"))
        self.index = KernelIndex.of(shape, block, topology.rows.to(device), topology.cols.to(device))
        generator = torch.Generator(device).manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device).to(dtype)

        self.x, self.dy = random(options.tokens, shape[1]), random(options.tokens, shape[0])
        self.blocks, self.bias = random(topology.num_active, block, block), random(shape[0])
        num_rows, num_cols = self.index.grid
        dense = torch.zeros(num_rows, num_cols, block, block, dtype=dtype, device=device)
        dense[self.index.rows.long(), self.index.cols.long()] = self.blocks
        self.weight = dense.transpose(1, 2).reshape(shape)
        self.flops = 2 * options.tokens * self.blocks.numel()
        self.peers = options.peers

    def exact(self, product: str) -> Tensor:
        """The product in float64."""
        x, dy, weight = self.x.double(), self.dy.double(), self.weight.double()
        if product == "forward":
            return x @ weight.t() + self.bias.double()
        return dy @ weight if product == "dgrad" else self.active(dy.t() @ x)

    def active(self, dense: Tensor) -> Tensor:
        """[out, in] -> the active blocks [K, B, B]."""
        (num_rows, num_cols), size = self.index.grid, self.index.block_size
        blocked = dense.view(num_rows, size, num_cols, size).transpose(1, 2)
        return blocked[self.index.rows.long(), self.index.cols.long()]

    def contenders(self, product: str, backends: list[str]) -> dict[str, Call]:
        """Name -> a call that computes the product."""
        place = (self.x.device, self.x.dtype, self.index.block_size)
        x, dy, blocks, index = self.x, self.dy, self.blocks, self.index
        calls: dict[str, Call] = {}
        for name in backends:
            backend = BACKENDS[name]
            if backend.why_not(*place) is None:
                calls[name] = {
                    "forward": lambda b=backend: b.forward(x, blocks, index, self.bias),
                    "dgrad": lambda b=backend: b.dgrad(dy, blocks, index),
                    "wgrad": lambda b=backend: b.wgrad(dy, x, index),
                }[product]
        return calls | self._dense(product) | self._bsr(product) | self._mkl(product)

    def _dense(self, product: str) -> dict[str, Call]:
        def three(linear: Callable[..., Tensor], dtype: torch.dtype) -> Call:
            def cast(tensor: Tensor) -> Tensor:
                return tensor.to(dtype)

            return {
                "forward": lambda: linear(cast(self.x), cast(self.weight), cast(self.bias)).to(self.x.dtype),
                "dgrad": lambda: linear(cast(self.dy), cast(self.weight).t(), None).to(self.x.dtype),
                "wgrad": lambda: linear(cast(self.dy).t(), cast(self.x).t(), None).to(self.x.dtype),
            }[product]

        calls = {"linear": three(functional.linear, self.x.dtype)}
        place = (self.x.device, self.x.dtype, self.index.block_size)
        if BACKENDS["dense_fp32"].why_not(*place) is None:
            calls["linear_fp32"] = three(functional.linear, torch.float32)
        if (
            self.x.device.type == "cpu"
            and self.x.dtype == torch.float32
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        ):

            def onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, "none", [], "")

            calls["onednn"] = three(onednn, torch.float32)
        return calls

    def _bsr(self, product: str) -> dict[str, Call]:
        """torch's own block-sparse product, where it has one for this device and dtype."""
        if product != "forward":
            return {}
        try:
            weight = self.weight.to_sparse_bsr((self.index.block_size, self.index.block_size))
            if self.x.device.type == "cuda":
                from torch.sparse._triton_ops import bsr_dense_addmm

                empty = self.x.new_zeros(self.weight.shape[0], self.x.shape[0])
                bsr_dense_addmm(empty, weight, self.x.t(), beta=0)
                return {"torch_bsr": lambda: bsr_dense_addmm(empty, weight, self.x.t(), beta=0).t() + self.bias}
            weight @ self.x.t()
            return {"torch_bsr": lambda: (weight @ self.x.t()).t() + self.bias}
        except (RuntimeError, ImportError):
            return {}

    def _mkl(self, product: str) -> dict[str, Call]:
        """MKL's block-sparse product, where it has one."""
        if not self.peers or self.x.device.type != "cpu" or self.x.dtype != torch.float32:
            return {}
        import peer_mkl

        if peer_mkl.why_not():
            return {}
        calls = peer_mkl.products(self.weight, self.index.block_size, self.x, self.dy, self.bias)
        return {"mkl_bsr": calls[product]} if product in calls else {}


def measure(case: Case, product: str, backends: list[str], rounds: int) -> dict[str, float]:
    """Median milliseconds of every contender; they take turns."""
    calls = case.contenders(product, backends)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            if sum(seconds[name]) > 3.0 and (len(seconds[name]) >= 3 or seconds[name][0] > 3.0):
                continue  # out of the race, and slow
            _synchronize(case)
            start = time.perf_counter()
            call()
            _synchronize(case)
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def _synchronize(case: Case) -> None:
    if case.x.device.type == "cuda":
        torch.cuda.synchronize(case.x.device)


def records(options: argparse.Namespace, block: int, dtype: str) -> list[dict[str, Any]]:
    """A record per product and contender."""
    case = Case(options, block, DTYPES[dtype])
    found = []
    for product in PRODUCTS:
        times = measure(case, product, options.backend, options.rounds)
        exact = case.exact(product)
        best_dense = min(times[name] for name in times if name in _DENSE)
        calls = case.contenders(product, options.backend)
        for name, ms in times.items():
            result = calls[name]().double()
            dense = name in _DENSE or name in DENSE
            if product == "wgrad" and name in _DENSE:
                result = case.active(result)
            flops = case.flops / options.density if dense else case.flops
            found.append(
                {
                    "product": product,
                    "in": options.in_features,
                    "out": options.out_features,
                    "tokens": options.tokens,
                    "block": block,
                    "density": options.density,
                    "dtype": dtype,
                    "threads": torch.get_num_threads(),
                    "device": _device_name(options.device),
                    "backend": name,
                    "ms": round(ms, 4),
                    "dense_ms": round(times["linear"], 4),
                    "best_dense_ms": round(best_dense, 4),
                    "gflops": round(flops / ms / 1e6, 1),
                    "speedup_vs_dense": round(times["linear"] / ms, 2),
                    "speedup_vs_best_dense": round(best_dense / ms, 2),
                    "rel_error": float(f"{((result - exact).norm() / exact.norm()).item():.2g}"),
                }
            )
    return found


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    from dsbert.sparse.kernels.cpu.build import instruction_set

    return f"cpu {instruction_set()}"


def main() -> None:
    """One table, or one list of records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--in", dest="in_features", type=int, default=768)
    parser.add_argument("--out", dest="out_features", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--block", default="16")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--dtype", default="fp32", help="of fp32, bf16, fp16, with commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", help="with commas. Default: those made for the device, and what dispatch weighs")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peers", action="store_true", help="MKL's block-sparse product as well, if it is installed")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(_complain("expected a CUDA device for --device cuda, found none"))
    unknown = {*options.dtype.split(",")} - {*DTYPES} or {*(options.backend or "cpu").split(",")} - {*BACKENDS}
    if unknown:
        raise SystemExit(
            _complain(f"expected dtypes of {', '.join(DTYPES)} and backends of {', '.join(BACKENDS)}, found {unknown}")
        )
    options.backend = (
        options.backend.split(",") if options.backend else [name for name in BACKENDS if name != "reference"]
    )
    torch.set_num_threads(options.threads)
    keep_freed_pages()  # as in training: for all contenders alike
    if options.peers:
        import peer_mkl

        if reason := peer_mkl.why_not():
            _complain(reason)
    try:
        rows = [
            record
            for dtype in options.dtype.split(",")
            for block in map(int, options.block.split(","))
            for record in records(options, block, dtype)
        ]
    except ValueError as error:
        raise SystemExit(_complain(str(error))) from None
    print(json.dumps(rows) if options.json else markdown(rows))


def _complain(line: str) -> int:
    print(f"bench_kernels: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
