"""Decoupled Group Lasso over blocks (paper, figure 6): pulls whole blocks towards zero, beside the optimizer."""

import math

import torch
from torch import Tensor

_EPS = 1e-6


def shrink_factors(squared_norms: Tensor, *, strength: float, weight_std: float, block_size: int, lr: float) -> Tensor:
    """What every weight of a block is multiplied by in a step: float32 [K].

    squared_norms: [K], sum of w^2 over each block. strength: lambda_group. The update of w is
    - strength * weight_std * sqrt(B) * lr * w / sqrt(sum w^2 + 1e-6).
    """
    pull = strength * weight_std * math.sqrt(block_size) * lr
    return (1.0 - pull / (squared_norms.double() + _EPS).sqrt()).float()


@torch.no_grad()
def shrink_slice_(flat: Tensor, offset: int, block_numel: int, factors: Tensor) -> None:
    """Apply `factors` [K] to the elements [offset, offset + n) of a flattened [K, B, B] parameter."""
    if flat.numel():
        first, last = offset // block_numel, (offset + flat.numel() - 1) // block_numel
        spread = factors[first : last + 1].repeat_interleave(block_numel)
        flat.mul_(spread[offset - first * block_numel :][: flat.numel()])
