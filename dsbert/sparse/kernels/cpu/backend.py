"""The products of block_sparse.cpp, called through ctypes: Python's lock is free meanwhile."""

from __future__ import annotations

from typing import NamedTuple

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


class NormDropout(NamedTuple):
    """Which elements fall, by seed and position, each with probability p; after: those of the norm's result, and not of
    what is added to the residual."""

    seed: int
    p: float
    after: bool


def norm(
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor,
    beta: Tensor | None,
    eps: float,
    dropout: NormDropout,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, sum, statistics) of LayerNorm(dropout(x) + residual) over the last dimension, or dropout(LayerNorm(x)).

    x, residual [..., H]; gamma, beta [H], all of one dtype. sum:
    what is normalized, like x; statistics: mean and 1 / sqrt(variance + eps) of every row, fp32 [2, rows].
    """
    seed, p, after = dropout
    x, gamma = x.contiguous(), gamma.contiguous()
    residual, beta = (None if tensor is None else tensor.contiguous() for tensor in (residual, beta))
    is_sum = residual is None and (after or not p)
    y, total = torch.empty_like(x), x if is_sum else torch.empty_like(x)
    statistics = torch.empty(2, x.numel() // x.shape[-1], dtype=torch.float32)
    load().dsbert_norm(
        DTYPES[x.dtype], x.data_ptr(), _address(residual), gamma.data_ptr(),
        _address(beta), None if is_sum else total.data_ptr(), y.data_ptr(),
        statistics[0].data_ptr(), statistics[1].data_ptr(), statistics.shape[1], x.shape[-1], eps, seed % 2**64, p,
        int(after), torch.get_num_threads(),
    )  # fmt: skip
    return y, total, statistics


def norm_gradient(
    dy: Tensor,
    total: Tensor,
    statistics: Tensor,
    gamma: Tensor,
    has: tuple[bool, bool],
    dropout: NormDropout,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dx, dresidual, dgamma, dbeta) of `norm`, from its sum and statistics; has: whether there were a residual and a
    beta. Where nothing fell before the sum, dresidual is dx itself."""
    seed, p, after = dropout
    dy, gamma = dy.contiguous(), gamma.contiguous()
    dx, dgamma = torch.empty_like(dy), torch.empty_like(gamma)
    dresidual = torch.empty_like(dy) if has[0] and p and not after else None
    dbeta = torch.empty_like(gamma) if has[1] else None
    load().dsbert_norm_gradient(
        DTYPES[dy.dtype], dy.data_ptr(), total.data_ptr(), gamma.data_ptr(), statistics[0].data_ptr(),
        statistics[1].data_ptr(), dx.data_ptr(), _address(dresidual), dgamma.data_ptr(), _address(dbeta),
        statistics.shape[1], dy.shape[-1], seed % 2**64, p, int(after), torch.get_num_threads(),
    )  # fmt: skip
    return dx, dx if dresidual is None else dresidual, dgamma, dbeta


def cross_entropy_(logits: Tensor, labels: Tensor, gradient: bool) -> Tensor:
    """The cross-entropy of every row of logits, fp32 [n, classes] and contiguous: fp32 [n], 0 where the label (int64
    [n]) is negative. gradient: logits become softmax(logits) - one_hot(label), 0 in such rows."""
    labels, losses = labels.contiguous(), torch.empty(logits.shape[0], dtype=torch.float32)
    load().dsbert_cross_entropy(
        logits.data_ptr(), labels.data_ptr(), losses.data_ptr(), logits.shape[0], logits.shape[1],
        int(gradient), torch.get_num_threads(),
    )  # fmt: skip
    return losses


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
        DTYPES[x.dtype], x.data_ptr(), x.stride(0), blocks.data_ptr(), _address(bias),
        y.data_ptr(), _address(activated), ptr, slots,
        groups.data_ptr(), x.shape[0], out_groups, in_groups, index.block_size, int(by_row), torch.get_num_threads(),
    )  # fmt: skip


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _rows(x: Tensor) -> Tensor:
    """With the elements of a token side by side: what the kernels need."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


BACKEND = Backend("cpu", forward, dgrad, wgrad, forward_gelu, why_not)
