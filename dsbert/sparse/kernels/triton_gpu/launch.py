"""From tensors and an index to kernel launches. Importing this module imports triton.

Nothing here waits for the card, reads the index on the host, or allocates a size that depends on where blocks stand:
the launches can be captured in a CUDA graph, and the graph stays right after a mask update.

Shapes: T tokens, K active blocks, B block size, R x C block rows and columns of a weight [out, in] = [R B, C B].
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import cast

import torch
from torch import Tensor

from dsbert.sparse.kernels.index import KernelIndex, Product
from dsbert.sparse.kernels.triton_gpu.availability import interpreting
from dsbert.sparse.kernels.triton_gpu.configs import LinearConfig, WgradConfig, config_of
from dsbert.sparse.kernels.triton_gpu.linear_kernel import linear_kernel
from dsbert.sparse.kernels.triton_gpu.wgrad_kernel import sum_parts_kernel, wgrad_kernel

# fp32 products on the tensor cores, as three products of TF32: the error is that of fp32, about 1e-6. torch's switch
# for TF32 is not asked: a sparse layer must not lose digits because a dense one may.
PRECISION = "tf32x3"
SUM_SIZE = 1024
_NOTHING = nullcontext()
_INTERPRETING = interpreting()
# What a card has where the interpreter stands in for one.
_INTERPRETED_PROCESSORS = 4


def forward(x: Tensor, blocks: Tensor, index: KernelIndex, bias: Tensor | None) -> Tensor:
    """X W^T + b: [T, out]."""
    y = x.new_empty(x.shape[0], index.shape[0])
    _linear("forward", x, blocks, index, bias, y, None)
    return y


def forward_gelu(x: Tensor, blocks: Tensor, index: KernelIndex, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(gelu(Y), Y) with Y = X W^T + b, both [T, out]."""
    y = x.new_empty(x.shape[0], index.shape[0])
    activated = torch.empty_like(y)
    _linear("forward", x, blocks, index, bias, y, activated)
    return activated, y


def dgrad(dy: Tensor, blocks: Tensor, index: KernelIndex) -> Tensor:
    """dY W: [T, in]."""
    dx = dy.new_empty(dy.shape[0], index.shape[1])
    _linear("dgrad", dy, blocks, index, None, dx, None)
    return dx


def wgrad(dy: Tensor, x: Tensor, index: KernelIndex) -> Tensor:
    """dY^T X at the active blocks: [K, B, B]."""
    num_tokens, num_rows, num_active, size = x.shape[0], index.grid[0], index.num_active, index.block_size
    config = cast(WgradConfig, config_of("wgrad", size, x.dtype, x.device))
    out = x.new_empty(num_active, size, size)
    if not num_active:
        return out
    # A row of n blocks has ceil(n / per_chunk) chunks: at most this many in all, wherever the blocks stand.
    per_chunk = config.width // size
    num_chunks = min(num_active, num_active // per_chunk + num_rows)
    parts, tokens_per_part = _split(num_tokens, num_active // per_chunk + 1, config, x.device)
    target = out if parts == 1 else out.new_empty(parts, *out.shape, dtype=torch.float32)
    dy, x = _rows_in_place(dy), _rows_in_place(x)
    with _on(x.device):
        wgrad_kernel[(num_chunks * parts,)](
            dy, x, index.order, index.cols, target,
            num_tokens, tokens_per_part, num_chunks, num_rows, num_active, dy.stride(0), x.stride(0),
            B=size, WIDTH=config.width, DEPTH=config.depth, ROWS=1 << (num_rows - 1).bit_length(),
            CACHE=config.cache, PRECISION=PRECISION, UPCAST=_INTERPRETING,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        if parts > 1:
            grid = (_cdiv(out.numel(), SUM_SIZE),)
            sum_parts_kernel[grid](target, out, parts, out.numel(), SIZE=SUM_SIZE, num_warps=4)
    return out


def _linear(
    product: Product, x: Tensor, blocks: Tensor, index: KernelIndex, bias: Tensor | None, y: Tensor, gelu: Tensor | None
) -> None:
    """y = x W^T + bias, or x W for dgrad, and its GELU if asked for."""
    forwards = product == "forward"
    size = index.block_size
    num_rows, num_cols = index.grid
    num_lines = num_rows if forwards else num_cols
    # Where the row or the column order begins in index.order.
    line_begin = 0 if forwards else num_rows + 1 + index.num_active
    config = cast(LinearConfig, config_of(product, size, x.dtype, x.device))
    num_programs = _cdiv(x.shape[0], config.tokens) * _cdiv(num_lines, config.lines)
    if not num_programs:
        return
    x = _rows_in_place(x)
    with _on(x.device):
        linear_kernel[(num_programs,)](
            x, blocks.contiguous(), index.order, index.cols if forwards else index.rows,
            y if bias is None else bias.contiguous(), y, y if gelu is None else gelu,
            x.shape[0], num_lines, line_begin, line_begin + num_lines + 1, x.stride(0), y.stride(0),
            B=size, TOKENS=config.tokens, DEPTH=config.depth, LINES=config.lines,
            TRANSPOSED=not forwards, HAS_BIAS=bias is not None, GELU=gelu is not None,
            CACHE=config.cache, PRECISION=PRECISION, UPCAST=_INTERPRETING,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip


def _cdiv(amount: int, size: int) -> int:
    """Rounded up. triton's own is made for kernels, and takes microseconds on the host."""
    return -(-amount // size)


def _rows_in_place(x: Tensor) -> Tensor:
    """x if its rows are contiguous, wherever they lie; else a copy."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _split(num_tokens: int, num_chunks: int, config: WgradConfig, device: torch.device) -> tuple[int, int]:
    """(parts, tokens per part), a multiple of the tile: a function of shapes and card only, so that sums repeat."""
    wanted = max(1, _num_processors(device) * config.programs // num_chunks)
    steps = max(1, _cdiv(num_tokens, config.depth))
    steps_per_part = _cdiv(steps, min(wanted, steps))
    return _cdiv(steps, steps_per_part), steps_per_part * config.depth


@cache
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever its arguments are on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)
