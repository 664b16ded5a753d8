"""The block-sparse Triton kernels of torchao, or else of torch, as peers of ours on a card.

Both have X W^T and dY W (`bsr_dense_addmm`, launched as is fastest of a few ways, torchao's own default of four stages
first) and no product at given blocks alone: for that, torch's `sampled_addmm` stands in either case.

Shapes: T tokens, weight [out, in], K blocks [B, B].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import product as combinations
from typing import Any

import torch
from torch import Tensor

from dsbert.sparse.kernels.index import Product
from dsbert.sparse.kernels.triton_gpu.tuning import Problem

Launch = dict[str, int]
_GROUPED_ROWS = 4


@cache
def addmm() -> tuple[str, Callable[..., Tensor]]:
    """("torchao" or "torch_bsr", its bsr_dense_addmm)."""
    try:
        from torchao.kernel.bsr_triton_ops import bsr_dense_addmm
    except Exception:  # one that was made for another torch fails in ways of its own
        from torch.sparse._triton_ops import bsr_dense_addmm

        return "torch_bsr", bsr_dense_addmm
    return "torchao", bsr_dense_addmm


def launches(size: int, tokens: int) -> list[Launch]:
    """What is worth timing: stages, warps, and how many tokens a program has. First what torchao does by itself."""
    widths = [width for width in dict.fromkeys((size, 64, 128)) if tokens % width == 0]
    ways = [*combinations((4, 2), (4,), widths), *((4, 8, width) for width in widths if width >= 128)]
    return [
        {"GROUP_SIZE_ROW": _GROUPED_ROWS, "num_stages": stages, "num_warps": warps, "SPLIT_N": tokens // width}
        for stages, warps, width in ways
    ]


def peer_call(product: Product, problem: Problem, weight: Tensor, launch: Launch | None) -> Callable[[], Tensor]:
    """The product as a call, whose sparse operand is made beforehand; what it returns, `peer_result` turns into ours.

    weight: [out, in], dense, zero outside of the blocks. launch: None takes the library's own.
    """
    size = (problem.index.block_size, problem.index.block_size)
    bsr = (weight.t().contiguous() if product == "dgrad" else weight).to_sparse_bsr(size)
    if product == "wgrad":
        from torch.sparse import _triton_ops as ops

        return lambda: ops.sampled_addmm(bsr, problem.dy.t(), problem.x, beta=0.0, skip_checks=True)
    _, bsr_dense_addmm = addmm()
    inputs = (problem.x if product == "forward" else problem.dy).t()
    nothing = torch.zeros(bsr.shape[0], inputs.shape[1], dtype=inputs.dtype, device=inputs.device)
    return lambda: bsr_dense_addmm(nothing, bsr, inputs, beta=0, meta=dict(launch) if launch else None)


def peer_result(product: Product, result: Tensor, problem: Problem) -> Tensor:
    """What a peer's call returned, as ours does: [T, out], [T, in], or [K, B, B] in slot order."""
    if product == "wgrad":  # in row order, ours in slot order
        return result.values()[torch.argsort(problem.index.row_slots.long())]
    return result.t()


def fastest(
    product: Product, problem: Problem, weight: Tensor, milliseconds: Callable[[Callable[[], Any]], float]
) -> tuple[float, Launch | None]:
    """(milliseconds, launch) of the fastest of `launches`; infinite where none runs. wgrad has no choice."""
    if product == "wgrad":
        return 0.0, None
    found: list[tuple[float, Launch | None]] = [(math.inf, None)]
    for launch in launches(problem.index.block_size, problem.x.shape[0]):
        try:
            call = peer_call(product, problem, weight, launch)
            call()
            found.append((milliseconds(call), launch))
        except Exception:  # triton has no common class for "does not fit" and "does not compile"
            continue
    return min(found, key=lambda pair: pair[0])


def interpret() -> None:
    """Have torch's kernels run in Triton's interpreter on CPU tensors: for a dry run, before torch.sparse is used.

    torch leaves its kernels out where there is no card, and hands Triton a list for a grid where the interpreter wants
    a tuple.
    """
    import torch.utils._triton

    torch.utils._triton.has_triton = lambda: True  # type: ignore[assignment]
    from torch.sparse import _triton_ops as ops

    launch_kernel = ops.launch_kernel
    ops.launch_kernel = lambda kernel, *rest: launch_kernel(lambda grid, *them: kernel(tuple(grid), *them), *rest)
