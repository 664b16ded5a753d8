"""What kernels read of a topology, and the shape of a backend.

Shapes: T tokens, K active blocks, B block size, R x C block rows and columns of a weight [out, in] = [R B, C B].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Product = Literal["forward", "dgrad", "wgrad"]
PRODUCTS: tuple[Product, ...] = ("forward", "dgrad", "wgrad")


@dataclass(frozen=True, eq=False)
class KernelIndex:
    """Shape (out, in), B, and the device buffers of one topology, all int32 and of a size that never changes.

    rows, cols [K] say where each SLOT stands; they are the topology. order [R + 1 + K + C + 1 + K] is derived from it:
    `row_ptr` and `row_slots`, `col_ptr` and `col_slots` one after the other. The slots of block row r are
    row_slots[row_ptr[r] : row_ptr[r + 1]], by ascending column; those of block column c are col_slots[col_ptr[c] :
    col_ptr[c + 1]], by ascending row. `rebuild_` rewrites `order` in place after a mask update, once for all products.
    """

    shape: tuple[int, int]
    block_size: int
    rows: Tensor
    cols: Tensor
    order: Tensor

    @classmethod
    def of(cls, shape: tuple[int, int], block_size: int, rows: Tensor, cols: Tensor) -> KernelIndex:
        """The index of a topology given by rows and cols, on their device."""
        size = order_size(*shape, block_size, rows.numel())
        index = cls(shape, block_size, rows, cols, torch.empty(size, dtype=torch.int32, device=rows.device))
        index.rebuild_()
        return index

    @property
    def out_features(self) -> int:
        """R B."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """C B."""
        return self.shape[1]

    @property
    def grid(self) -> tuple[int, int]:
        """(R, C)."""
        return self.shape[0] // self.block_size, self.shape[1] // self.block_size

    @property
    def num_active(self) -> int:
        """K."""
        return self.rows.numel()

    @property
    def row_ptr(self) -> Tensor:
        """int32 [R + 1]."""
        return self._parts()[0]

    @property
    def row_slots(self) -> Tensor:
        """int32 [K]: slots by (row, column)."""
        return self._parts()[1]

    @property
    def col_ptr(self) -> Tensor:
        """int32 [C + 1]."""
        return self._parts()[2]

    @property
    def col_slots(self) -> Tensor:
        """int32 [K]: slots by (column, row)."""
        return self._parts()[3]

    def _parts(self) -> tuple[Tensor, ...]:
        num_rows, num_cols = self.grid
        parts: tuple[Tensor, ...] = self.order.split([num_rows + 1, self.num_active, num_cols + 1, self.num_active])
        return parts

    def addresses(self) -> tuple[int, int, int, int]:
        """Where row_ptr, row_slots, col_ptr and col_slots begin in memory: for kernels that take pointers."""
        num_rows, num_cols = self.grid
        row_ptr, size = self.order.data_ptr(), self.order.element_size()
        row_slots = row_ptr + size * (num_rows + 1)
        col_ptr = row_slots + size * self.num_active
        return row_ptr, row_slots, col_ptr, col_ptr + size * (num_cols + 1)

    def rebuild_(self) -> None:
        """Derive `order` from rows and cols, in place."""
        num_rows, num_cols = self.grid
        rows, cols = self.rows.cpu().numpy().astype(np.int64), self.cols.cpu().numpy().astype(np.int64)
        parts = [
            _pointers(rows, num_rows),
            np.argsort(rows * num_cols + cols, kind="stable"),
            _pointers(cols, num_cols),
            np.argsort(cols * num_rows + rows, kind="stable"),
        ]
        self.order.copy_(torch.from_numpy(np.concatenate(parts).astype(np.int32)))

    def is_consistent(self) -> bool:
        """Whether `order` says the same as rows and cols: every slot once, in the row and column where it stands."""
        rows, cols = self.rows.cpu().numpy(), self.cols.cpu().numpy()
        row_ptr, row_slots, col_ptr, col_slots = (part.cpu().numpy() for part in self._parts())
        every = np.arange(self.num_active)
        for major, minor, ptr, slots in ((rows, cols, row_ptr, row_slots), (cols, rows, col_ptr, col_slots)):
            if not (np.array_equal(np.sort(slots), every) and np.array_equal(ptr, _pointers(major, len(ptr) - 1))):
                return False
            keys = major[slots].astype(np.int64) * (1 << 32) + minor[slots]
            if (np.diff(keys) <= 0).any():
                return False
        return True


def order_size(out_features: int, in_features: int, block_size: int, num_active: int) -> int:
    """Elements of `KernelIndex.order`."""
    return out_features // block_size + in_features // block_size + 2 + 2 * num_active


def _pointers(groups: np.ndarray, num_groups: int) -> np.ndarray:
    """[num_groups + 1]: where each group begins once its members are sorted."""
    return np.concatenate([[0], np.cumsum(np.bincount(groups, minlength=num_groups))])


@dataclass(frozen=True)
class Backend:
    """The three products of one kind of kernel, fp32 accumulation throughout.

    forward(x [T, in], blocks, index, bias or None) -> Y = X W^T + b, [T, out].
    forward_gelu(x, blocks, index, bias or None) -> (gelu(Y), Y), the exact GELU; None: the caller applies it.
    dgrad(dy [T, out], blocks, index) -> dX = dY W, [T, in].
    wgrad(dy, x, index) -> dY^T X at the active blocks, [K, B, B].
    why_not(device, dtype, block_size): why this backend cannot run there, one line, or None if it can.
    """

    name: str
    forward: Callable[[Tensor, Tensor, KernelIndex, Tensor | None], Tensor]
    dgrad: Callable[[Tensor, Tensor, KernelIndex], Tensor]
    wgrad: Callable[[Tensor, Tensor, KernelIndex], Tensor]
    forward_gelu: Callable[[Tensor, Tensor, KernelIndex, Tensor | None], tuple[Tensor, Tensor]] | None = None
    why_not: Callable[[torch.device, torch.dtype, int], str | None] = lambda device, dtype, block_size: None
