"""Runs the Triton kernels in Triton's interpreter, on CPU tensors, and says how far they are from float64.

    TRITON_INTERPRET=1 python -m tests.sparse.triton_interpreted

A process of its own: Triton binds its interpreter when it is imported. Prints {case: {what: largest error, as a share
of the largest entry of the float64 result}} as JSON.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from dsbert.sparse.kernels.index import KernelIndex
from dsbert.sparse.kernels.reference import forward as reference
from dsbert.sparse.kernels.triton_gpu import dgrad, forward, forward_gelu, wgrad
from dsbert.sparse.kernels.triton_gpu.configs import LinearConfig, WgradConfig, forget_measured, set_config
from tests.sparse.toys import densify

MAP_NORESERVE = 0x4000  # Linux; mmap has no name for it before Python 3.13
CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Rows and columns of the active blocks, in slot order (which is no order), on a grid of 3 x 4.
TOPOLOGIES = {
    "scattered": ([2, 0, 2, 2, 0, 2], [3, 1, 0, 2, 3, 1]),  # row 1 is empty, row 2 full
    "one block": ([1], [2]),
    "full": ([row for col in range(4) for row in range(3)], [col for col in range(4) for row in range(3)]),
    "one column": ([1, 0], [3, 3]),
}
GRID = (3, 4)


def inputs(topology: str, block_size: int, dtype: torch.dtype, num_tokens: int) -> tuple[KernelIndex, list[Tensor]]:
    """(index, [x, dy, blocks, bias])."""
    rows, cols = (torch.tensor(part, dtype=torch.int32) for part in TOPOLOGIES[topology])
    shape = (GRID[0] * block_size, GRID[1] * block_size)
    generator = torch.Generator().manual_seed(block_size + num_tokens)
    where = KernelIndex.of(shape, block_size, rows, cols)
    index = KernelIndex(shape, block_size, *(guarded(part) for part in (rows, cols, where.order)))
    sizes = ((num_tokens, shape[1]), (num_tokens, shape[0]), (len(rows), block_size, block_size), (shape[0],))
    return index, [guarded(torch.randn(size, generator=generator).to(dtype)) for size in sizes]


def guarded(tensor: Tensor) -> Tensor:
    """A copy that ends where a page begins that nobody may touch: who reads beyond it does not live to tell."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return tensor
    whole_pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, whole_pages + mmap.PAGESIZE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(begin + whole_pages), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=whole_pages - size)
    return copy.view(tensor.shape).copy_(tensor)


def error(found: Tensor, expected: Tensor) -> float:
    """Infinite where shapes differ or something is not a number, which JSON can say."""
    if found.shape != expected.shape or not found.isfinite().all():
        return float("inf")
    if not expected.numel():
        return 0.0
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def errors(index: KernelIndex, x: Tensor, dy: Tensor, blocks: Tensor, bias: Tensor | None) -> dict[str, float]:
    weight = densify(index.shape, blocks.double(), index.rows, index.cols)
    y = functional.linear(x.double(), weight, None if bias is None else bias.double())
    dense = (dy.double().t() @ x.double()).view(GRID[0], index.block_size, GRID[1], index.block_size)
    dw = dense.transpose(1, 2)[index.rows.long(), index.cols.long()]
    results = {
        "forward": (forward(x, blocks, index, bias), y),
        "dgrad": (dgrad(dy, blocks, index), dy.double() @ weight),
        "wgrad": (wgrad(dy, x, index), dw),
    }
    assert {found.dtype for found, _ in results.values()} == {x.dtype}
    return {name: error(found, expected) for name, (found, expected) in results.items()}


def gelu_errors(index: KernelIndex, x: Tensor, blocks: Tensor, bias: Tensor) -> dict[str, float]:
    """The fused epilogue: exact, of the output as it was rounded, and that output bit by bit."""
    activated, y = forward_gelu(x, blocks, index, bias)
    assert activated.dtype == y.dtype == x.dtype
    exact = functional.gelu(y.double())
    return {
        "gelu": error(activated, exact),
        # GELU of what was not rounded before would often be a neighbour of this.
        "unequal": float((activated != exact.to(y.dtype)).float().mean()) if y.dtype == torch.float16 else 0.0,
        "repeated": float(not torch.equal(y, forward(x, blocks, index, bias))),
    }


def repeated(index: KernelIndex, x: Tensor, dy: Tensor, blocks: Tensor) -> dict[str, float]:
    """The same bits again."""
    again = torch.equal(wgrad(dy, x, index), wgrad(dy, x, index))
    return {"repeated": float(not (again and torch.equal(dgrad(dy, blocks, index), dgrad(dy, blocks, index))))}


def strays() -> dict[str, float]:
    """What is no number may reach only what it is a factor of: what fills up a stacked tile is a factor of nothing."""
    index, (x, _, blocks, bias) = inputs("scattered", 16, torch.float16, 20)
    x[:, :16] = float("nan")  # column 0: block row 0, with two blocks for a tile of four, has none there
    blocks[0] = float("nan")  # at (2, 3)
    return {
        "forward": error(forward(x, blocks, index, bias)[:, :16], reference(x, blocks, index, bias)[:, :16].double())
    }


def surrounded(tensor: Tensor) -> Tensor:
    """The same values in every other row of a larger tensor that holds no numbers elsewhere."""
    around = torch.full((2 * tensor.shape[0] + 300, tensor.shape[1] + 32), float("nan"), dtype=tensor.dtype)
    view = around[: 2 * tensor.shape[0] : 2, 16:-16]
    view.copy_(tensor)
    return view


def far_apart(tensor: Tensor) -> Tensor:
    """The same values in rows 2^24 apart: later tiles begin beyond 2^31. Only what is touched takes memory."""
    stride = 1 << 24
    size = tensor.shape[0] * stride * tensor.element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    whole = torch.frombuffer(mmap.mmap(-1, size, flags), dtype=tensor.dtype)
    return whole.as_strided(tuple(tensor.shape), (stride, 1)).copy_(tensor)


def cases() -> Iterator[tuple[str, dict[str, float]]]:
    for block_size in (16, 32, 64, 128):
        for dtype in DTYPES:
            index, tensors = inputs("scattered", block_size, DTYPES[dtype], 150 if dtype == "fp32" else 40)
            yield f"{dtype} B={block_size}", errors(index, *tensors)
            if dtype == "fp16":
                x, dy, blocks, bias = tensors
                yield f"fp16 B={block_size} gelu", gelu_errors(index, x, blocks, bias)
    yield "fp16 B=128 again", repeated(index, x, dy, blocks)
    for topology in list(TOPOLOGIES)[1:]:
        for block_size, num_tokens in ((16, 33), (64, 1)):
            index, (x, dy, blocks, _) = inputs(topology, block_size, torch.float32, num_tokens)
            yield f"fp32 B={block_size} {topology}, no bias", errors(index, x, dy, blocks, None)
    index, (x, dy, blocks, bias) = inputs("scattered", 32, torch.float16, 140)
    yield "fp16 rows far apart", errors(index, far_apart(x), far_apart(dy), blocks, bias)
    index, (x, dy, blocks, bias) = inputs("scattered", 32, torch.float32, 0)
    yield "fp32 no tokens", errors(index, x, dy, blocks, bias)
    yield "fp16 strays", strays()
    index, (x, dy, blocks, bias) = inputs("scattered", 16, torch.float32, 20)
    yield "fp32 gelu", gelu_errors(index, x, blocks, bias)
    yield "fp32 rows apart", errors(index, surrounded(x), surrounded(dy), blocks, bias)
    yield "fp32 transposed", errors(index, x.t().contiguous().t(), dy.t().contiguous().t(), blocks, bias)
    yield "fp32 one row for all tokens", errors(index, x[:1].expand(20, -1), dy[:1].expand(20, -1), blocks, bias)
    # Launches that only measurement would choose: several lines in a program, with a group that is not full; one part.
    for block_size in (16, 128):
        linear = LinearConfig(tokens=64, depth=64, lines=2, cache=".ca")
        set_config("forward", block_size, torch.float32, CPU, linear)
        set_config("dgrad", block_size, torch.float32, CPU, linear)
        set_config("wgrad", block_size, torch.float32, CPU, WgradConfig(width=128, depth=16, programs=0))
        index, tensors = inputs("scattered", block_size, torch.float32, 70)
        yield f"fp32 B={block_size} other launches", errors(index, *tensors)
        set_config("wgrad", block_size, torch.float32, CPU, WgradConfig(width=128, depth=16, programs=99))
        yield f"fp32 B={block_size} many parts", errors(index, *tensors)
    forget_measured()


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump(dict(cases()), sys.stdout)
