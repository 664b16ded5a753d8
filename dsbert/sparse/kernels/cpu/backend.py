"""The products of block_sparse.cpp, called through ctypes: Python's lock is free meanwhile."""

from __future__ import annotations

import torch
from torch import Tensor

from dsbert.sparse.kernels.cpu.build import load, unavailable
from dsbert.sparse.kernels.index import Backend, KernelIndex

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def forward(x: Tensor, blocks: Tensor, index: KernelIndex, bias: Tensor | None) -> Tensor:
    """X W^T + b: [T, out]."""
    y = x.new_empty(x.shape[0], index.shape[0])
    _product(x, blocks, index, bias, y, None, by_row=True)
    return y


def forward_gelu(x: Tensor, blocks: Tensor, index: KernelIndex, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(gelu(Y), Y) of Y = X W^T + b: [T, out] each."""
    y = x.new_empty(x.shape[0], index.shape[0])
    activated = torch.empty_like(y)
    _product(x, blocks, index, bias, y, activated, by_row=True)
    return activated, y


def dgrad(dy: Tensor, blocks: Tensor, index: KernelIndex) -> Tensor:
    """dY W: [T, in]."""
    dx = dy.new_empty(dy.shape[0], index.shape[1])
    _product(dy, blocks, index, None, dx, None, by_row=False)
    return dx


def wgrad(dy: Tensor, x: Tensor, index: KernelIndex) -> Tensor:
    """dY^T X at the active blocks: [K, B, B]."""
    dy, x = _rows(dy), _rows(x)
    dw = x.new_empty(index.num_active, index.block_size, index.block_size)
    num_rows, num_cols = index.grid
    load().dsbert_gradient(
        DTYPES[x.dtype], dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0), dw.data_ptr(),
        index.rows.data_ptr(), index.cols.data_ptr(), index.addresses()[1], index.num_active, x.shape[0],
        num_rows, num_cols, index.block_size, torch.get_num_threads(),
    )  # fmt: skip
    return dw


def gelu_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dY gelu'(X), element by element; all of one shape."""
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    threads = torch.get_num_threads()
    load().dsbert_gelu_gradient(DTYPES[x.dtype], dy.data_ptr(), x.data_ptr(), dx.data_ptr(), x.numel(), threads)
    return dx


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """dropout(X), with what falls drawn from (seed, position)."""
    x = x.contiguous()
    y = torch.empty_like(x)
    load().dsbert_dropout(
        DTYPES[x.dtype], x.data_ptr(), y.data_ptr(), x.numel(), seed % 2**64, p, torch.get_num_threads(),
    )  # fmt: skip
    return y


def why_not(device: torch.device, dtype: torch.dtype, block_size: int) -> str | None:
    """Why these kernels cannot run there, one line; None if they can. Compiles them if need be."""
    if device.type != "cpu":
        return f"the cpu kernels do not run on {device.type}"
    if dtype not in DTYPES:
        return f"the cpu kernels do not compute in {dtype}"
    return unavailable()


def _product(
    x: Tensor,
    blocks: Tensor,
    index: KernelIndex,
    bias: Tensor | None,
    y: Tensor,
    activated: Tensor | None,
    by_row: bool,
) -> None:
    x, blocks = _rows(x), blocks.contiguous()
    bias = None if bias is None else bias.contiguous()
    num_rows, num_cols = index.grid
    row_ptr, row_slots, col_ptr, col_slots = index.addresses()
    if by_row:
        ptr, slots, groups, out_groups, in_groups = row_ptr, row_slots, index.cols, num_rows, num_cols
    else:
        ptr, slots, groups, out_groups, in_groups = col_ptr, col_slots, index.rows, num_cols, num_rows
    load().dsbert_product(
        DTYPES[x.dtype], x.data_ptr(), x.stride(0), blocks.data_ptr(), None if bias is None else bias.data_ptr(),
        y.data_ptr(), None if activated is None else activated.data_ptr(), ptr, slots,
        groups.data_ptr(), x.shape[0], out_groups, in_groups, index.block_size, int(by_row), torch.get_num_threads(),
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """With the elements of a token side by side: what the kernels need."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


BACKEND = Backend("cpu", forward, dgrad, wgrad, forward_gelu, why_not)
