"""Where the active blocks of one weight stand.

Shapes: K active blocks, B block size, R x C block rows and columns of a weight [out, in] = [R B, C B].
A topology is a value: it never changes, a mask update makes a new one. A SLOT is an index 0..K-1 into the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import xxhash
from torch import Tensor

from dsbert.sparse.balance import blocks_per_row, draw_evenly, draw_in_rows
from dsbert.sparse.draw import DrawKey, draw_positions


@dataclass(frozen=True, eq=False)
class TopologyUpdate:
    """Slots that are re-pointed (int64 [n], ascending) and where they point now (rows, cols: int32 [n])."""

    slots: Tensor
    rows: Tensor
    cols: Tensor

    @property
    def num_pruned(self) -> int:
        return self.slots.numel()


@dataclass(frozen=True, eq=False)
class BlockTopology:
    """shape (out, in), block size B, rows and cols int32 [K] on the CPU: block row and column of every slot.

    Raises ValueError if the coordinates are not K distinct blocks of the shape.
    """

    shape: tuple[int, int]
    block_size: int
    rows: Tensor
    cols: Tensor

    def __post_init__(self) -> None:
        for name, tensor in (("rows", self.rows), ("cols", self.cols)):
            if tensor.dtype != torch.int32 or tensor.dim() != 1:
                raise ValueError(f"expected {name} int32 [K], found {tensor.dtype} {list(tensor.shape)}")
        if self.rows.numel() != self.cols.numel():
            raise ValueError(f"expected as many rows as cols, found {self.rows.numel()} and {self.cols.numel()}")
        num_rows, num_cols = grid(self.shape, self.block_size)
        for name, tensor, limit in (("rows", self.rows, num_rows), ("cols", self.cols, num_cols)):
            if tensor.numel() and not (int(tensor.min()) >= 0 and int(tensor.max()) < limit):
                raise ValueError(f"expected {name} in 0..{limit - 1}, found {int(tensor.min())}..{int(tensor.max())}")
        distinct = int(np.count_nonzero(self._mask.numpy()))
        if distinct != self.num_active:
            raise ValueError(f"expected {self.num_active} distinct blocks, found {distinct}")

    @classmethod
    def random(
        cls, shape: tuple[int, int], block_size: int, density: float, key: DrawKey, balance: str = "none"
    ) -> BlockTopology:
        """`density` of the blocks, uniform without replacement (paper, algorithm 1), or as `balance` says; slots in
        row-major order."""
        num_rows, num_cols = grid(shape, block_size)
        eligible = torch.ones(num_rows, num_cols, dtype=torch.bool)
        if balance == "rows":
            quotas = torch.full((num_rows,), blocks_per_row(num_cols, density))
            positions = draw_in_rows(key, eligible, quotas)
        elif balance == "even":
            kept = num_active_blocks(shape, block_size, density)
            positions = draw_evenly(key, eligible, torch.zeros_like(eligible), kept)
        else:
            positions = draw_positions(key, eligible.flatten(), num_active_blocks(shape, block_size, density))
        return cls(shape, block_size, (positions // num_cols).int(), (positions % num_cols).int())

    @property
    def grid(self) -> tuple[int, int]:
        """(R, C)."""
        return grid(self.shape, self.block_size)

    @property
    def num_active(self) -> int:
        """K."""
        return self.rows.numel()

    @property
    def density(self) -> float:
        """The share of the weight that is active."""
        return block_density(self.shape, self.block_size, self.num_active)

    def positions(self) -> Tensor:
        """int64 [K]: row * C + col of every slot."""
        rows = self.rows.numpy().astype(np.int64)
        return torch.from_numpy(rows * self.grid[1] + self.cols.numpy())

    def mask(self) -> Tensor:
        """bool [R, C]: which blocks are active."""
        return self._mask.clone()

    @cached_property
    def _mask(self) -> Tensor:
        num_rows, num_cols = self.grid
        mask = np.zeros(num_rows * num_cols, dtype=np.bool_)
        mask[self.positions().numpy()] = True
        return torch.from_numpy(mask).view(num_rows, num_cols)

    def replace(self, update: TopologyUpdate) -> BlockTopology:
        """The topology after `update`: K is unchanged. Raises ValueError if two slots would share a block."""
        rows, cols = self.rows.clone(), self.cols.clone()
        rows[update.slots], cols[update.slots] = update.rows, update.cols
        return BlockTopology(self.shape, self.block_size, rows, cols)

    def digest(self) -> int:
        """64 bits over shape, B and the coordinates in slot order."""
        return topology_digest(self.shape, self.block_size, self.rows, self.cols)


def topology_digest(shape: tuple[int, int], block_size: int, rows: Tensor, cols: Tensor) -> int:
    """64-bit digest of a topology given by its buffers (any device), in SLOT order.

    Slot order matters: two ranks whose masks agree but whose slots are permuted would average the gradients of
    different blocks.
    """
    hasher = xxhash.xxh3_64(f"{shape[0]} {shape[1]} {block_size}".encode())
    for tensor in (rows, cols):
        hasher.update(tensor.detach().cpu().contiguous().numpy().data)
    return hasher.intdigest()


def combined_digest(digests: dict[str, int]) -> str:
    """32 hex digits over the digests of all layers, by name: the digest of a model's topology."""
    text = "\n".join(f"{name} {digest:016x}" for name, digest in sorted(digests.items()))
    return xxhash.xxh3_128_hexdigest(text.encode())


def grid(shape: tuple[int, int], block_size: int) -> tuple[int, int]:
    """(R, C) of a weight of `shape`. Raises ValueError if the block size does not divide it."""
    if block_size < 1 or shape[0] % block_size or shape[1] % block_size:
        raise ValueError(f"expected a block size that divides {shape[0]} x {shape[1]}, found {block_size}")
    return shape[0] // block_size, shape[1] // block_size


def block_density(shape: tuple[int, int], block_size: int, num_active: int) -> float:
    """The share of a weight that so many active blocks are."""
    num_rows, num_cols = grid(shape, block_size)
    return num_active / (num_rows * num_cols)


def num_active_blocks(shape: tuple[int, int], block_size: int, density: float, balance: str = "none") -> int:
    """K = max(1, round(density R C)); with balance "rows" R max(1, round(density C))."""
    num_rows, num_cols = grid(shape, block_size)
    if balance == "rows":
        return num_rows * blocks_per_row(num_cols, density)
    return min(num_rows * num_cols, max(1, round(density * num_rows * num_cols)))


def pack_bits(mask: Tensor) -> Tensor:
    """bool, any shape -> uint8, eight positions a byte."""
    return torch.from_numpy(np.packbits(mask.numpy()))


def unpack_bits(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """bool of `shape` from what `pack_bits` returned."""
    bits = np.unpackbits(packed.numpy(), count=shape[0] * shape[1])
    return torch.from_numpy(bits.astype(np.bool_)).view(shape)
