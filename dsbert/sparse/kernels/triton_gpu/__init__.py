"""Triton kernels for CUDA cards: Hopper first, any card from compute capability 8.0 on.

    availability    why the kernels cannot run somewhere, in one line
    configs         how each product is launched: a table by (product, B, kind of dtype, architecture)
    linear_kernel   forward and dgrad
    wgrad_kernel    wgrad and the sum of its parts
    launch          from tensors and an index to launches
    tuning          the best entry of the table for one card, by measurement

`triton` itself is imported when a kernel is first launched, so that this package loads where there is none.
docs/kernels_gpu.md explains the design.
"""

from torch import Tensor

from dsbert.sparse.kernels.index import Backend, KernelIndex
from dsbert.sparse.kernels.triton_gpu.availability import why_not


def forward(x: Tensor, blocks: Tensor, index: KernelIndex, bias: Tensor | None) -> Tensor:
    """X W^T + b: [T, out]."""
    from dsbert.sparse.kernels.triton_gpu import launch

    return launch.forward(x, blocks, index, bias)


def forward_gelu(x: Tensor, blocks: Tensor, index: KernelIndex, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(gelu(Y), Y) with Y = X W^T + b, both [T, out]."""
    from dsbert.sparse.kernels.triton_gpu import launch

    return launch.forward_gelu(x, blocks, index, bias)


def dgrad(dy: Tensor, blocks: Tensor, index: KernelIndex) -> Tensor:
    """dY W: [T, in]."""
    from dsbert.sparse.kernels.triton_gpu import launch

    return launch.dgrad(dy, blocks, index)


def wgrad(dy: Tensor, x: Tensor, index: KernelIndex) -> Tensor:
    """dY^T X at the active blocks: [K, B, B]."""
    from dsbert.sparse.kernels.triton_gpu import launch

    return launch.wgrad(dy, x, index)


BACKEND = Backend("triton", forward, dgrad, wgrad, forward_gelu, why_not)

__all__ = ["BACKEND", "dgrad", "forward", "forward_gelu", "wgrad", "why_not"]
