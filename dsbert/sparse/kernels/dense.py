"""Scatter the blocks into one shared dense scratch, then a dense product of the machine.

Which dense product is fast differs between machines, dtypes and shapes, so there are three to measure: torch's own,
oneDNN's (CPU, fp32), and torch's in fp32 for half precisions that a CPU cannot multiply. The scratch holds ONE weight
at a time, of the largest layer, per device and dtype: it is never a parameter, a gradient that is kept, or part of any
message or checkpoint. `scratch_bytes` reports it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from dsbert.sparse.kernels.index import Backend, KernelIndex

_scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}
_in_use = threading.Lock()  # torch gives Python's lock away: another thread would overwrite the weight meanwhile

# x [T, k], w [n, k], bias [n] or None -> x w^T + bias, [T, n]
Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def scratch_bytes() -> int:
    """Bytes of all scratch buffers now alive."""
    return sum(buffer.numel() * buffer.element_size() for buffer in _scratch.values())


def scatter(blocks: Tensor, index: KernelIndex, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight [out, in], in the scratch: valid until the next call."""
    weight = _take(index.shape, dtype or blocks.dtype, blocks.device).zero_()
    _blocked(weight, index)[index.rows, index.cols] = blocks.to(weight.dtype)
    return weight


def with_product(
    name: str, linear: Linear, wider: bool = False, why_not: Callable[..., str | None] | None = None
) -> Backend:
    """A backend that multiplies by `linear`, in fp32 if `wider`."""

    def forward(x: Tensor, blocks: Tensor, index: KernelIndex, bias: Tensor | None) -> Tensor:
        with _in_use:
            weight = scatter(blocks, index, torch.float32 if wider else None)
            y = linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
        return y.to(x.dtype)

    def dgrad(dy: Tensor, blocks: Tensor, index: KernelIndex) -> Tensor:
        with _in_use:
            weight = scatter(blocks, index, torch.float32 if wider else None)
            dx = linear(dy.to(weight.dtype), weight.t(), None)
        return dx.to(dy.dtype)

    def wgrad(dy: Tensor, x: Tensor, index: KernelIndex) -> Tensor:
        dtype = torch.float32 if wider else dy.dtype
        if linear is functional.linear:
            with _in_use:
                weight = _take(index.shape, dtype, dy.device)
                torch.mm(dy.to(dtype).t(), x.to(dtype), out=weight)
                return _blocked(weight, index)[index.rows, index.cols].to(dy.dtype)
        weight = linear(dy.to(dtype).t(), x.to(dtype).t(), None)
        return _blocked(weight, index)[index.rows, index.cols].to(dy.dtype)

    return Backend(name, forward, dgrad, wgrad, why_not=why_not or (lambda *place: None))


def _take(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    numel = shape[0] * shape[1]
    buffer = _scratch.get((device, dtype))
    if buffer is None or buffer.numel() < numel:
        with torch.inference_mode(False):  # what is made there can only be written there
            buffer = _scratch[device, dtype] = torch.empty(numel, dtype=dtype, device=device)
    return buffer[:numel].view(shape)


def _blocked(weight: Tensor, index: KernelIndex) -> Tensor:
    """[out, in] seen as [R, C, B, B]."""
    num_rows, num_cols = index.grid
    return weight.view(num_rows, index.block_size, num_cols, index.block_size).transpose(1, 2)


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not x.numel():  # no tokens, of which oneDNN knows no product
        return functional.linear(x, weight, bias)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, "none", [], "")
    return y


def _onednn_why_not(device: torch.device, dtype: torch.dtype, block_size: int) -> str | None:
    if device.type != "cpu" or dtype != torch.float32:
        return f"oneDNN is for fp32 on a CPU, not for {dtype} on {device.type}"
    return None if hasattr(torch.ops.mkldnn, "_linear_pointwise") else "this build of torch has no oneDNN"


def _fp32_why_not(device: torch.device, dtype: torch.dtype, block_size: int) -> str | None:
    half = dtype in (torch.bfloat16, torch.float16)
    return None if device.type == "cpu" and half else f"{dtype} on {device.type} needs no wider product"


BACKEND = with_product("dense", functional.linear)
ONEDNN = with_product("dense_onednn", _onednn_linear, why_not=_onednn_why_not)
FP32 = with_product("dense_fp32", functional.linear, wider=True, why_not=_fp32_why_not)
