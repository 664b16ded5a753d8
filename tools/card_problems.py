"""Layers of an encoder and their products on a card, in float64 and dense as well, and a clock for a card."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dsbert.sparse.kernels.index import KernelIndex, Product
from dsbert.sparse.kernels.triton_gpu.tuning import Problem

AWKWARD = ("scattered", "one block", "full", "one row")


@dataclass(frozen=True)
class Shape:
    """A weight [outs, ins] of a layer of hidden size `hidden`."""

    name: str
    hidden: int
    ins: int
    outs: int


def layer_shapes(hidden: int) -> list[Shape]:
    """The four sparse weights of an encoder layer, Q, K and V as one."""
    sizes = {
        "QKV": (hidden, 3 * hidden),
        "O": (hidden, hidden),
        "FF1": (hidden, 4 * hidden),
        "FF2": (4 * hidden, hidden),
    }
    return [Shape(name, hidden, ins, outs) for name, (ins, outs) in sizes.items()]


class Timer:
    """Median milliseconds of calls on a device: inside a CUDA graph, so that no launch is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def one(self, call: Callable[[], Any]) -> float:
        """Of one call, again and again on the same inputs."""
        return self.several([call] * 10)

    def several(self, calls: list[Callable[[], Any]], repeats: int = 9) -> float:
        """Of one call, when they follow each other."""
        if self.device.type != "cuda":
            begun = time.perf_counter()
            calls[0]()
            return 1e3 * (time.perf_counter() - begun)
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        run = self._captured(calls)
        times = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / len(calls))
        return statistics.median(times)

    def _captured(self, calls: list[Callable[[], Any]]) -> Callable[[], Any]:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
        except Exception:  # a peer that waits for the card cannot be captured: its launches are timed with it
            torch.cuda.synchronize()
            return lambda: [call() for call in calls]
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay


def problem_of(
    shape: Shape, tokens: int, size: int, density: float, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Problem:
    """Random blocks at a density, random inputs."""
    generator = torch.Generator().manual_seed(seed)
    rows, cols = shape.outs // size, shape.ins // size
    chosen = torch.randperm(rows * cols, generator=generator)[: max(1, round(density * rows * cols))]
    index = KernelIndex.of(
        (shape.outs, shape.ins), size, (chosen // cols).int().to(device), (chosen % cols).int().to(device)
    )
    made = torch.Generator(device).manual_seed(seed)
    x, dy, blocks = (
        torch.randn(*sizes, generator=made, device=device, dtype=dtype)
        for sizes in ((tokens, shape.ins), (tokens, shape.outs), (len(chosen), size, size))
    )
    return Problem(index, x, dy, blocks)


def awkward_problem(topology: str, size: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """Empty lines, a full one, a number of tokens that no tile divides; rows of the inputs lie apart."""
    rows, cols = {
        "scattered": ([2, 0, 2, 2, 0, 2], [3, 1, 0, 2, 3, 1]),
        "one block": ([1], [2]),
        "full": ([r for c in range(4) for r in range(3)], [c for c in range(4) for r in range(3)]),
        "one row": ([1, 1, 1, 1], [3, 2, 1, 0]),
    }[topology]
    index = KernelIndex.of(
        (3 * size, 4 * size), size, *(torch.tensor(p, dtype=torch.int32, device=device) for p in (rows, cols))
    )
    tokens = 777 if device.type == "cuda" else 33
    generator = torch.Generator(device).manual_seed(size)

    def apart(width: int) -> Tensor:
        around = torch.full((2 * tokens + 512, width + 32), float("nan"), device=device, dtype=dtype)
        around[: 2 * tokens : 2, 16:-16] = torch.randn(tokens, width, generator=generator, device=device, dtype=dtype)
        return around[: 2 * tokens : 2, 16:-16]

    blocks = torch.randn(len(rows), size, size, generator=generator, device=device, dtype=dtype)
    return Problem(index, apart(4 * size), apart(3 * size), blocks)


def dense_weight(problem: Problem, dtype: torch.dtype) -> Tensor:
    """[out, in]."""
    index = problem.index
    rows, cols = index.grid
    weight = torch.zeros(rows, cols, index.block_size, index.block_size, dtype=dtype, device=problem.x.device)
    weight[index.rows.long(), index.cols.long()] = problem.blocks.to(dtype)
    return weight.transpose(1, 2).reshape(index.shape)


def at_blocks(weight: Tensor, index: KernelIndex) -> Tensor:
    """[out, in] -> [K, B, B]."""
    (rows, cols), size = index.grid, index.block_size
    return weight.view(rows, size, cols, size).transpose(1, 2)[index.rows.long(), index.cols.long()]


def exact(product: Product, problem: Problem) -> Tensor:
    """The product in float64."""
    x, dy, weight = problem.x.double(), problem.dy.double(), dense_weight(problem, torch.float64)
    if product == "wgrad":
        return at_blocks(dy.t() @ x, problem.index)
    return x @ weight.t() if product == "forward" else dy @ weight


def dense_call(product: Product, problem: Problem, weight: Tensor) -> Callable[[], Tensor]:
    """The same product of a dense layer."""
    if product == "forward":
        return lambda: functional.linear(problem.x, weight)
    elif product == "dgrad":
        return lambda: problem.dy @ weight
    return lambda: problem.dy.t() @ problem.x


def rates(timer: Timer) -> dict[str, float]:
    """What the card itself does: TB/s of a copy and of reads that stay in L2, TFLOP/s of a large bf16 product."""
    if timer.device.type != "cuda":
        return {}
    large = torch.empty(1 << 30, dtype=torch.uint8, device=timer.device)
    near = torch.zeros(4 << 20, dtype=torch.float32, device=timer.device)
    square = torch.randn(8192, 8192, dtype=torch.bfloat16, device=timer.device)
    copy = timer.one(lambda: large[: 1 << 29].copy_(large[1 << 29 :]))
    return {
        "copy_tb_s": 2 * (1 << 29) / copy / 1e9,
        "l2_read_tb_s": near.numel() * 4 / timer.one(near.sum) / 1e9,
        "bf16_tflop_s": 2 * 8192**3 / timer.one(lambda: square @ square) / 1e9,
    }
