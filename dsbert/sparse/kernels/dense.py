"""Scatter the blocks into one shared dense scratch, then the machine's best dense product.

The scratch holds ONE weight at a time, of the largest layer, per device and dtype: it is never a parameter, a gradient
that is kept, or part of any message or checkpoint. `scratch_bytes` reports it.
"""

import torch
from torch import Tensor
from torch.nn import functional

from dsbert.sparse.kernels.index import Backend, KernelIndex

_scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def scratch_bytes() -> int:
    """Bytes of all scratch buffers now alive."""
    return sum(buffer.numel() * buffer.element_size() for buffer in _scratch.values())


def scatter(blocks: Tensor, index: KernelIndex) -> Tensor:
    """The dense weight [out, in], in the scratch: valid until the next call."""
    weight = _take(index.shape, blocks.dtype, blocks.device).zero_()
    _blocked(weight, index)[index.rows, index.cols] = blocks
    return weight


def forward(x: Tensor, blocks: Tensor, index: KernelIndex, bias: Tensor | None) -> Tensor:
    """X W^T + b: [T, out]."""
    return functional.linear(x, scatter(blocks, index), bias)


def dgrad(dy: Tensor, blocks: Tensor, index: KernelIndex) -> Tensor:
    """dY W: [T, in]."""
    return dy @ scatter(blocks, index)


def wgrad(dy: Tensor, x: Tensor, index: KernelIndex) -> Tensor:
    """dY^T X at the active blocks: [K, B, B]."""
    weight = _take(index.shape, dy.dtype, dy.device)
    torch.mm(dy.t(), x, out=weight)
    return _blocked(weight, index)[index.rows, index.cols]


def _take(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    numel = shape[0] * shape[1]
    buffer = _scratch.get((device, dtype))
    if buffer is None or buffer.numel() < numel:
        buffer = _scratch[device, dtype] = torch.empty(numel, dtype=dtype, device=device)
    return buffer[:numel].view(shape)


def _blocked(weight: Tensor, index: KernelIndex) -> Tensor:
    """[out, in] seen as [R, C, B, B]."""
    num_rows, num_cols = index.grid
    return weight.view(num_rows, index.block_size, num_cols, index.block_size).transpose(1, 2)


BACKEND = Backend("dense", forward, dgrad, wgrad)
