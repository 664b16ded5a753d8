"""The yardstick: gather, small batched products, scatter-add, all in plain torch. No dense weight at any time."""

import torch
from torch import Tensor

from dsbert.sparse.kernels.index import Backend, KernelIndex


def forward(x: Tensor, blocks: Tensor, index: KernelIndex, bias: Tensor | None) -> Tensor:
    """X W^T + b: [T, out]."""
    num_rows, num_cols = index.grid
    gathered = _gather(x, num_cols, index.cols)  # [K, T, B]
    y = _scatter_add(torch.bmm(gathered, blocks.transpose(1, 2)), num_rows, index.rows)
    return y if bias is None else y + bias


def dgrad(dy: Tensor, blocks: Tensor, index: KernelIndex) -> Tensor:
    """dY W: [T, in]."""
    num_rows, num_cols = index.grid
    return _scatter_add(torch.bmm(_gather(dy, num_rows, index.rows), blocks), num_cols, index.cols)


def wgrad(dy: Tensor, x: Tensor, index: KernelIndex) -> Tensor:
    """dY^T X at the active blocks: [K, B, B]."""
    num_rows, num_cols = index.grid
    return torch.bmm(_gather(dy, num_rows, index.rows).transpose(1, 2), _gather(x, num_cols, index.cols))


def _gather(x: Tensor, num_groups: int, groups: Tensor) -> Tensor:
    """x [T, G B] -> [K, T, B]: the columns that each slot touches."""
    return x.reshape(x.shape[0], num_groups, x.shape[1] // num_groups).transpose(0, 1).index_select(0, groups)


def _scatter_add(products: Tensor, num_groups: int, groups: Tensor) -> Tensor:
    """products [K, T, B] -> [T, G B]: sum the slots of each group, in fp32 for the half precisions."""
    accumulate = torch.float32 if products.dtype in (torch.bfloat16, torch.float16) else products.dtype
    _, tokens, block_size = products.shape
    out = torch.zeros(num_groups, tokens, block_size, dtype=accumulate, device=products.device)
    out.index_add_(0, groups, products.to(accumulate))
    return out.transpose(0, 1).reshape(tokens, num_groups * block_size).to(products.dtype)


BACKEND = Backend("reference", forward, dgrad, wgrad)
