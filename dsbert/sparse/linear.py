"""BlockSparseLinear: a linear layer whose only weight is its active blocks.

Shapes: K active blocks, B block size, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dsbert.sparse.kernels import BACKENDS, Backend, KernelIndex
from dsbert.sparse.topology import BlockTopology, topology_digest


class BlockSparseLinear(nn.Module):
    """y = x W^T + b with W [out, in] given by `blocks` [K, B, B] standing at `rows`, `cols` (int32 [K]).

    The dense weight is in no parameter, gradient or optimizer state. `set_topology` re-points slots in place: shapes,
    parameters and optimizer state keep their identity. Raises ValueError for an unknown kernel backend.
    """

    rows: Tensor
    cols: Tensor

    def __init__(
        self,
        topology: BlockTopology,
        *,
        bias: bool = True,
        kernels: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernels not in BACKENDS:
            raise ValueError(f"expected kernels in {sorted(BACKENDS)}, found {kernels!r}")
        self.out_features, self.in_features = self.shape = topology.shape
        self.block_size = topology.block_size
        self.num_active = topology.num_active
        self.backend: Backend = BACKENDS[kernels]
        size = (self.num_active, self.block_size, self.block_size)
        self.blocks = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(self.out_features, device=device, dtype=dtype)) if bias else None
        buffer_device = None if device is None or torch.device(device).type == "meta" else device
        self.register_buffer("rows", topology.rows.clone().to(buffer_device))
        self.register_buffer("cols", topology.cols.clone().to(buffer_device))
        # fp32 [out, in] while the gradient with respect to the DENSE weight is being collected, else None.
        self.dense_gradient: Tensor | None = None
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, topology: BlockTopology, kernels: str = "auto") -> BlockSparseLinear:
        """The layer that keeps the active blocks of `linear`'s weight (values, dtype, device) and its bias."""
        weight = linear.weight
        layer = cls(topology, bias=linear.bias is not None, kernels=kernels, device=weight.device, dtype=weight.dtype)
        if weight.device.type != "meta":
            num_rows, num_cols = topology.grid
            size = topology.block_size
            with torch.no_grad():
                blocked = weight.view(num_rows, size, num_cols, size).transpose(1, 2)
                layer.blocks.copy_(blocked[layer.rows, layer.cols])
                if layer.bias is not None:
                    layer.bias.copy_(linear.bias)
        return layer

    def reset_parameters(self, std: float = 0.02) -> None:
        """Truncated normal blocks (paper, section on initialization), zero bias."""
        if self.blocks.device.type != "meta":
            nn.init.trunc_normal_(self.blocks, std=std, a=-2 * std, b=2 * std)
            if self.bias is not None:
                nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        blocks: Tensor = self.blocks
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, blocks = x.to(dtype), blocks.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        index = KernelIndex(self.shape, self.block_size, self.rows, self.cols)
        flat = x.reshape(-1, self.in_features)
        y: Tensor = _BlockSparseMatmul.apply(flat, blocks, bias, index, self.backend, self.dense_gradient)
        return y.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """A dense copy [out, in] of the weight, for export and tests."""
        return dense_weight(self.shape, self.blocks, self.rows, self.cols)

    @property
    def topology(self) -> BlockTopology:
        """A copy of what the kernels read."""
        return BlockTopology(self.shape, self.block_size, self.rows.cpu().clone(), self.cols.cpu().clone())

    def set_topology(self, topology: BlockTopology) -> None:
        """Re-point the slots, in place. Raises ValueError if shape, B or K would change."""
        found = (topology.shape, topology.block_size, topology.num_active)
        if found != (self.shape, self.block_size, self.num_active):
            raise ValueError(f"expected shape, B, K = {(self.shape, self.block_size, self.num_active)}, found {found}")
        self.rows.copy_(topology.rows)
        self.cols.copy_(topology.cols)

    def digest(self) -> int:
        """64-bit digest of the buffers that the kernels read, in slot order."""
        return topology_digest(self.shape, self.block_size, self.rows, self.cols)

    def extra_repr(self) -> str:
        density = self.num_active * self.block_size**2 / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, block_size={self.block_size}, "
            f"num_active={self.num_active}, density={density:.4f}, bias={self.bias is not None}"
        )


def dense_weight(shape: tuple[int, int], blocks: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """The dense weight [out, in] of `blocks` [K, B, B]; a new tensor."""
    size = blocks.shape[1]
    dense = torch.zeros(shape[0] // size, shape[1] // size, size, size, dtype=blocks.dtype, device=blocks.device)
    dense[rows.long(), cols.long()] = blocks.detach()
    return dense.transpose(1, 2).reshape(shape)


class _BlockSparseMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        blocks: Tensor,
        bias: Tensor | None,
        index: KernelIndex,
        backend: Backend,
        dense_gradient: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, blocks)
        ctx.index, ctx.backend, ctx.dense_gradient, ctx.has_bias = index, backend, dense_gradient, bias is not None
        return backend.forward(x, blocks, index, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, blocks = ctx.saved_tensors
        needs_x, needs_blocks, needs_bias = ctx.needs_input_grad[:3]
        if ctx.dense_gradient is not None:
            # Summed over micro-batches here; the norm is taken only after the sum over ranks as well.
            ctx.dense_gradient.addmm_(dy.t().to(torch.float32), x.to(torch.float32))
        dx = ctx.backend.dgrad(dy, blocks, ctx.index) if needs_x else None
        dw = ctx.backend.wgrad(dy, x, ctx.index) if needs_blocks else None
        db = dy.sum(0) if ctx.has_bias and needs_bias else None
        return dx, dw, db, None, None, None
