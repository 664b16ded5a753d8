"""The products of a layer on a card: ours, cuBLAS and a peer, side by side on the same problems.

Shapes: T tokens, weight [out, in], K blocks [B, B].
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import card_peers
import torch
from card_problems import Shape, Timer, at_blocks, dense_call, dense_weight, exact, problem_of
from torch import Tensor

from dsbert.sparse.kernels.index import PRODUCTS, Product
from dsbert.sparse.kernels.triton_gpu.tuning import Problem, relative_error

# As many bytes of inputs as this are used in turn, so that none of them waits in L2 from the time before.
_ROTATED_BYTES = 256 << 20
_MOST_PROBLEMS, _PEER_PROBLEMS = 16, 4


@dataclass(frozen=True)
class Setting:
    """What all products of a stage share. go_on: asked before each; False where the time is up."""

    tokens: int
    density: float
    dtype: torch.dtype
    timer: Timer
    go_on: Callable[[], bool]


def ours(shapes: Sequence[Shape], sizes: Sequence[int], setting: Setting, name: str = "triton") -> Iterator[Any]:
    """A record of cuBLAS and one of our kernels, called `name`, per size, shape and product; where ours fails, the
    record has an "error" in place of figures."""
    for shape, size, product in _all(shapes, sizes, setting):
        problems = _problems(shape, size, setting, _MOST_PROBLEMS)
        weight = dense_weight(problems[0], setting.dtype)
        dense = [dense_call(product, problem, weight) for problem in problems]
        dense_ms = setting.timer.several(dense)
        described = {"layer": shape.name, "hidden": shape.hidden}
        if name == "triton":
            result = at_blocks(dense[0](), problems[0].index) if product == "wgrad" else dense[0]()
            yield described | _record(product, "dense", problems[0], result, dense_ms, dense_ms, setting)
        calls = [partial(problem.call, product) for problem in problems]
        try:
            result, milliseconds = calls[0](), setting.timer.several(calls)
        except Exception as error:  # triton has no common class for what it cannot compile or launch
            yield described | {"product": product, "block": size, "backend": name, "error": str(error).splitlines()[0]}
            continue
        yield described | _record(product, name, problems[0], result, milliseconds, dense_ms, setting)


def peers(shapes: Sequence[Shape], sizes: Sequence[int], setting: Setting) -> Iterator[Any]:
    """A record of the peer per size, shape and product that it can compute; a line on standard error where it cannot.

    How it is launched is looked for once per size and product, on the first shape.
    """
    name, _ = card_peers.addmm()
    best: dict[tuple[int, Product], card_peers.Launch | None] = {}
    for shape, size, product in _all(shapes, sizes, setting):
        problems = _problems(shape, size, setting, _PEER_PROBLEMS)
        weights = [dense_weight(problem, setting.dtype) for problem in problems]
        try:
            if (size, product) not in best:
                best[size, product] = card_peers.fastest(product, problems[0], weights[0], setting.timer.one)[1]
            launch = best[size, product]
            calls = [card_peers.peer_call(product, *pair, launch) for pair in zip(problems, weights, strict=True)]
            result = card_peers.peer_result(product, calls[0](), problems[0])
            milliseconds = setting.timer.several(calls)
        except Exception as error:  # triton has no common class for what it cannot compile or launch
            print(f"{name} {product} {shape.name} B={size}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        dense_ms = setting.timer.several([dense_call(product, problem, weights[0]) for problem in problems])
        record = _record(product, name, problems[0], result, milliseconds, dense_ms, setting)
        yield {"layer": shape.name, "hidden": shape.hidden} | record | {"launch": launch}


def _all(shapes: Sequence[Shape], sizes: Sequence[int], setting: Setting) -> Iterator[tuple[Shape, int, Product]]:
    """Size by size, so that what is cut off leaves whole layers."""
    for size in sizes:
        for shape in shapes:
            for product in PRODUCTS:
                if not setting.go_on():
                    return
                yield shape, size, product


def _problems(shape: Shape, size: int, setting: Setting, most: int) -> list[Problem]:
    bytes_each = 2 * setting.tokens * (shape.ins + shape.outs)
    count = max(2, min(most, _ROTATED_BYTES // bytes_each)) if setting.timer.device.type == "cuda" else 1
    return [
        problem_of(shape, setting.tokens, size, setting.density, setting.dtype, setting.timer.device, seed)
        for seed in range(count)
    ]


def _record(
    product: Product, backend: str, problem: Problem, result: Tensor, milliseconds: float, dense_ms: float,
    setting: Setting,
) -> dict[str, Any]:  # fmt: skip
    outs, ins = problem.index.shape
    flops, device = 2 * setting.tokens * problem.blocks.numel(), problem.x.device
    return {
        "product": product, "in": ins, "out": outs, "tokens": setting.tokens, "block": problem.index.block_size,
        "density": setting.density, "dtype": str(setting.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter",
        "backend": backend, "ms": milliseconds, "dense_ms": dense_ms, "gflops": flops / milliseconds / 1e6,
        "speedup_vs_dense": dense_ms / milliseconds, "rel_error": relative_error(result, exact(product, problem)),
    }  # fmt: skip
