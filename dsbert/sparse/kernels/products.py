"""The products of a block-sparse linear layer, each by the backend that was chosen for it; no gradients.

Shapes: T tokens, K active blocks, B block size. All raise RuntimeError for operands of other shapes, or of unlike
dtypes or devices: kernels take pointers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsbert.sparse.kernels.backends import BACKENDS
from dsbert.sparse.kernels.index import KernelIndex
from dsbert.sparse.kernels.record import Choice


def linear(x: Tensor, blocks: Tensor, bias: Tensor | None, index: KernelIndex, choice: Choice) -> Tensor:
    """X W^T + b: [T, out]."""
    _check(index.in_features, x, blocks, bias)
    return BACKENDS[choice.forward].forward(x, blocks, index, bias)


def linear_gelu(
    x: Tensor, blocks: Tensor, bias: Tensor | None, index: KernelIndex, choice: Choice
) -> tuple[Tensor, Tensor]:
    """(gelu(Y), Y) of Y = X W^T + b: [T, out] each."""
    _check(index.in_features, x, blocks, bias)
    backend = BACKENDS[choice.forward]
    if backend.forward_gelu is not None:
        return backend.forward_gelu(x, blocks, index, bias)
    y = backend.forward(x, blocks, index, bias)
    return torch.nn.functional.gelu(y), y


def dgrad(dy: Tensor, blocks: Tensor, index: KernelIndex, choice: Choice) -> Tensor:
    """dY W: [T, in]."""
    _check(index.out_features, dy, blocks)
    return BACKENDS[choice.dgrad].dgrad(dy, blocks, index)


def wgrad(dy: Tensor, x: Tensor, index: KernelIndex, choice: Choice) -> Tensor:
    """dY^T X at the active blocks: [K, B, B]."""
    _check(index.out_features, dy, x)
    return BACKENDS[choice.wgrad].wgrad(dy, x, index)


def _check(features: int, x: Tensor, *others: Tensor | None) -> None:
    if x.dim() != 2 or x.shape[1] != features:
        raise RuntimeError(f"expected [tokens, {features}], found {list(x.shape)}")
    for other in others:
        if other is not None and (other.dtype != x.dtype or other.device != x.device):
            found = f"{x.dtype} on {x.device} and {other.dtype} on {other.device}"
            raise RuntimeError(f"expected activations and weights of one dtype on one device, found {found}")
