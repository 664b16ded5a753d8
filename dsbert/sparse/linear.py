"""BlockSparseLinear: a linear layer whose weight is its active blocks, and at will a low-rank term beside them.

Shapes: K active blocks, B block size, T tokens, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsbert.sparse.kernels import eager
from dsbert.sparse.kernels.backends import BACKENDS
from dsbert.sparse.kernels.dispatch import KERNELS, choose, tokens_to_measure
from dsbert.sparse.kernels.index import KernelIndex, order_size
from dsbert.sparse.kernels.record import Choice
from dsbert.sparse.low_rank import add_low_rank_, num_low_rank_weights, reset_low_rank_
from dsbert.sparse.topology import BlockTopology, block_density, topology_digest


class BlockSparseLinear(nn.Module):
    """y = x W^T + b with W [out, in] given by `blocks` [K, B, B] standing at `rows`, `cols` (int32 [K]).

    The dense weight is in no parameter, gradient or optimizer state. `set_topology` re-points slots in place: shapes,
    parameters and optimizer state keep their identity. kernels: a name of `KERNELS`; which backends that means for the
    three products is `choice`. One that was set stays, for any number of tokens, as long as the layer is where it can
    run; else it is measured on the first call with about so many tokens, and remembered (see kernels/dispatch.py).
    activation "gelu" has the layer return gelu(y), the exact one, from the same kernel where the backend can.
    low_rank: the rank of a term U V that is added to W, of parameters low_rank_u [out, r] and low_rank_v [r, in]
    (low_rank.py); 0 = none, and then neither parameter. GELU follows the sum of both, in a pass of its own.
    Raises ValueError for unknown kernels, KernelError where the kernels asked for cannot run.
    """

    rows: Tensor
    cols: Tensor
    order: Tensor
    low_rank_u: nn.Parameter
    low_rank_v: nn.Parameter

    def __init__(
        self,
        topology: BlockTopology,
        *,
        bias: bool = True,
        kernels: str = "auto",
        low_rank: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernels not in KERNELS:
            raise ValueError(f"expected kernels in {sorted(KERNELS)}, found {kernels!r}")
        self.out_features, self.in_features = self.shape = topology.shape
        self.block_size = topology.block_size
        self.num_active = topology.num_active
        self.kernels = kernels
        self.choice: Choice | None = None
        self._place: tuple[torch.device, torch.dtype] | None = None  # where `choice` is known to run
        self._measured: dict[tuple[torch.device, torch.dtype, int], Choice] = {}  # by tokens
        self.activation: str | None = None
        size = (self.num_active, self.block_size, self.block_size)
        self.blocks = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(self.out_features, device=device, dtype=dtype)) if bias else None
        self.low_rank = low_rank
        if low_rank:
            self.low_rank_u = nn.Parameter(torch.empty(self.out_features, low_rank, device=device, dtype=dtype))
            self.low_rank_v = nn.Parameter(torch.empty(low_rank, self.in_features, device=device, dtype=dtype))
        buffer_device = torch.device("cpu") if self.blocks.device.type == "meta" else self.blocks.device
        self.register_buffer("rows", topology.rows.clone().to(buffer_device))
        self.register_buffer("cols", topology.cols.clone().to(buffer_device))
        size_of_order = order_size(*self.shape, self.block_size, self.num_active)
        order = torch.empty(size_of_order, dtype=torch.int32, device=buffer_device)
        self.register_buffer("order", order, persistent=False)
        self.index.rebuild_()
        # fp32 [out, in] while the gradient with respect to the DENSE weight is being collected, else None.
        self.dense_gradient: Tensor | None = None
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, topology: BlockTopology, kernels: str = "auto", low_rank: int = 0
    ) -> BlockSparseLinear:
        """The layer that keeps the active blocks of `linear`'s weight (values, dtype, device) and its bias."""
        weight, bias = linear.weight, linear.bias is not None
        place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        layer = cls(topology, bias=bias, kernels=kernels, low_rank=low_rank, **place)
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
        """Truncated normal blocks (paper, section on initialization), zero bias, a low-rank term of zero."""
        if self.blocks.device.type != "meta":
            nn.init.trunc_normal_(self.blocks, std=std, a=-2 * std, b=2 * std)
            if self.bias is not None:
                nn.init.zeros_(self.bias)
            self.reset_low_rank(std)

    def reset_low_rank(self, std: float = 0.02, generator: torch.Generator | None = None) -> None:
        """U zero, V truncated normal from a CPU generator: see `reset_low_rank_`. Nothing where there is no term."""
        if self.low_rank and self.blocks.device.type != "meta":
            reset_low_rank_(self.low_rank_u, self.low_rank_v, std, generator)

    @property
    def num_weights(self) -> int:
        """That a token is multiplied with: those of the blocks, U and V."""
        return self.num_active * self.block_size**2 + num_low_rank_weights(self.shape, self.low_rank)

    @property
    def index(self) -> KernelIndex:
        """What the kernels read, as live views."""
        return KernelIndex(self.shape, self.block_size, self.rows, self.cols, self.order)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        blocks: Tensor = self.blocks
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, blocks = x.to(dtype), blocks.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        flat = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        arguments = (flat, blocks, bias, self.index, self._choose(flat.shape[0], flat.device, blocks.dtype))
        if self.activation is not None and self.dense_gradient is None and not self.low_rank:
            y = eager.linear_gelu(*arguments)
        else:
            y = eager.linear(*arguments)
            if self.low_rank:
                y = add_low_rank_(y, flat, self.low_rank_u.to(flat.dtype), self.low_rank_v.to(flat.dtype))
            if self.dense_gradient is not None and y.requires_grad:
                y.register_hook(_Collector(self.dense_gradient, flat.detach()))
            y = y if self.activation is None else functional.gelu(y)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)

    def _choose(self, tokens: int, device: torch.device, dtype: torch.dtype) -> Choice:
        """`choice`, which is made for about so many tokens where nobody has set it or it cannot run."""
        given, place = self.choice, (device, dtype)
        is_set = given is not None and not any(given is own for own in self._measured.values())
        if given is None or not is_set or (place != self._place and not self._runs_on(given, *place)):
            key = (*place, tokens_to_measure(tokens, device))
            if key not in self._measured:
                self._measured[key] = choose(self.index, self.kernels, tokens=tokens, dtype=dtype).choice
            self.choice = given = self._measured[key]
        self._place = place
        return given

    def _runs_on(self, choice: Choice, device: torch.device, dtype: torch.dtype) -> bool:
        return all(BACKENDS[name].why_not(device, dtype, self.block_size) is None for name in choice)

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """A dense copy [out, in] of the weight, of blocks and U V, for export and tests."""
        dense = dense_weight(self.shape, self.blocks, self.rows, self.cols)
        return dense.addmm_(self.low_rank_u, self.low_rank_v) if self.low_rank else dense

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
        self.index.rebuild_()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As of any module, and `order` follows the coordinates that came in."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not {f"{prefix}rows", f"{prefix}cols"} & set(state_dict) or self.rows.device.type == "meta":
            return
        if self.order.device != self.rows.device:  # load_state_dict(assign=True)
            self.order = torch.empty_like(self.order, device=self.rows.device)
        try:
            self.set_topology(self.topology)  # checks the coordinates
        except ValueError as error:
            error_msgs.append(f"{prefix}rows and {prefix}cols: {error}")

    def digest(self) -> int:
        """64-bit digest of the buffers that the kernels read, in slot order. Where their order says something else than
        the coordinates, it is no topology's."""
        digest = topology_digest(self.shape, self.block_size, self.rows, self.cols)
        return digest if self.index.is_consistent() else digest ^ 1

    def extra_repr(self) -> str:
        density = block_density(self.shape, self.block_size, self.num_active)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, block_size={self.block_size}, "
            f"num_active={self.num_active}, density={density:.4f}, bias={self.bias is not None}"
            + (f", low_rank={self.low_rank}" if self.low_rank else "")
        )


def dense_weight(shape: tuple[int, int], blocks: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """The dense weight [out, in] of `blocks` [K, B, B]; a new tensor."""
    size = blocks.shape[1]
    dense = torch.zeros(shape[0] // size, shape[1] // size, size, size, dtype=blocks.dtype, device=blocks.device)
    dense[rows.long(), cols.long()] = blocks.detach()
    return dense.transpose(1, 2).reshape(shape)


class _Collector:
    """Adds dY^T X to the dense gradient: summed over micro-batches here; the norm is taken only after the sum over
    ranks as well."""

    def __init__(self, dense_gradient: Tensor, x: Tensor) -> None:
        self._dense_gradient, self._x = dense_gradient, x

    def __call__(self, dy: Tensor) -> None:
        self._dense_gradient.addmm_(dy.t().to(torch.float32), self._x.to(torch.float32))
