"""What kernels read of a topology, and the shape of a backend.

Shapes: T tokens, K active blocks, B block size, R x C block rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class KernelIndex:
    """Shape (out, in), B, and the device buffers rows, cols int32 [K]. The buffers are rewritten in place by a mask
    update and never change size."""

    shape: tuple[int, int]
    block_size: int
    rows: Tensor
    cols: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """(R, C)."""
        return self.shape[0] // self.block_size, self.shape[1] // self.block_size


@dataclass(frozen=True)
class Backend:
    """forward(x [T, in], blocks, index, bias or None) -> [T, out]; dgrad(dy [T, out], blocks, index) -> [T, in];
    wgrad(dy, x, index) -> [K, B, B]."""

    name: str
    forward: Callable[[Tensor, Tensor, KernelIndex, Tensor | None], Tensor]
    dgrad: Callable[[Tensor, Tensor, KernelIndex], Tensor]
    wgrad: Callable[[Tensor, Tensor, KernelIndex], Tensor]
