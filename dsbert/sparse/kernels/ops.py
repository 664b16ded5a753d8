"""The block-sparse linear layer as torch operators: autograd, fake tensors, torch.compile.

`kernels` names the backends of the three products, "forward,dgrad,wgrad". Shapes: T tokens, K active blocks, B block
size; shape = (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsbert.sparse.kernels import cpu
from dsbert.sparse.kernels.backends import BACKENDS
from dsbert.sparse.kernels.index import KernelIndex

# Defined piece by piece: torch.library.custom_op would import torch's compiler, three seconds of every start.
_library = torch.library.Library("dsbert", "DEF")
_INDEX = "Tensor rows, Tensor cols, Tensor order, SymInt[] shape"
_ARGUMENTS = f"Tensor x, Tensor blocks, Tensor? bias, {_INDEX}, str kernels"


def _operator(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Register what is decorated as the operator of the schema on every device; it becomes that operator."""

    def register(function: Callable[..., Any]) -> Any:
        _library.define(schema)
        name = schema.partition("(")[0]
        _library.impl(name, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.dsbert, name).default

    return register


def _index(block_size: int, rows: Tensor, cols: Tensor, order: Tensor, shape: Sequence[int]) -> KernelIndex:
    return KernelIndex((shape[0], shape[1]), block_size, rows, cols, order)


def _check(features: int, x: Tensor, *others: Tensor | None) -> None:
    """Raises RuntimeError unless x is [T, features] and all are of one device and dtype: kernels take pointers."""
    if x.dim() != 2 or x.shape[1] != features:
        raise RuntimeError(f"expected [tokens, {features}], found {list(x.shape)}")
    for other in others:
        if other is not None and (other.dtype != x.dtype or other.device != x.device):
            found = f"{x.dtype} on {x.device} and {other.dtype} on {other.device}"
            raise RuntimeError(f"expected activations and weights of one dtype on one device, found {found}")


# In what follows `index` is rows, cols, order, shape, as in _INDEX.


@_operator(f"linear({_ARGUMENTS}) -> Tensor")
def linear(x: Tensor, blocks: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """X W^T + b: [T, out]."""
    *index, kernels = rest
    _check(index[3][1], x, blocks, bias)
    return BACKENDS[kernels.split(",")[0]].forward(x, blocks, _index(blocks.shape[1], *index), bias)


@_operator(f"linear_gelu({_ARGUMENTS}) -> (Tensor, Tensor)")
def linear_gelu(x: Tensor, blocks: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """(gelu(Y), Y) of Y = X W^T + b: [T, out] each."""
    *index, kernels = rest
    _check(index[3][1], x, blocks, bias)
    backend = BACKENDS[kernels.split(",")[0]]
    if backend.forward_gelu is not None:
        return backend.forward_gelu(x, blocks, _index(blocks.shape[1], *index), bias)
    y = backend.forward(x, blocks, _index(blocks.shape[1], *index), bias)
    return torch.nn.functional.gelu(y), y


@_operator(f"dgrad(Tensor dy, Tensor blocks, {_INDEX}, str kernels) -> Tensor")
def dgrad(dy: Tensor, blocks: Tensor, *rest: Any) -> Tensor:
    """dY W: [T, in]."""
    *index, kernels = rest
    _check(index[3][0], dy, blocks)
    return BACKENDS[kernels.split(",")[1]].dgrad(dy, blocks, _index(blocks.shape[1], *index))


@_operator(f"wgrad(Tensor dy, Tensor x, {_INDEX}, int block_size, str kernels) -> Tensor")
def wgrad(dy: Tensor, x: Tensor, *rest: Any) -> Tensor:
    """dY^T X at the active blocks: [K, B, B]."""
    *index, block_size, kernels = rest
    _check(index[3][0], dy, x)
    return BACKENDS[kernels.split(",")[2]].wgrad(dy, x, _index(block_size, *index))


@_operator("gelu_gradient(Tensor dy, Tensor x, str kernels) -> Tensor")
def gelu_gradient(dy: Tensor, x: Tensor, kernels: str) -> Tensor:
    """dY gelu'(X), of the exact GELU."""
    if kernels.split(",")[0] == "cpu":
        return cpu.gelu_gradient(dy, x)
    dx: Tensor = torch.ops.aten.gelu_backward(dy, x)
    return dx


# The shapes that come out, for fake tensors.


def _of_linear(x: Tensor, blocks: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], rest[3][0])


def _of_linear_gelu(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _of_linear(*arguments), _of_linear(*arguments)


def _of_dgrad(dy: Tensor, blocks: Tensor, *rest: Any) -> Tensor:
    return dy.new_empty(dy.shape[0], rest[3][1])


def _of_wgrad(dy: Tensor, x: Tensor, *rest: Any) -> Tensor:
    rows, block_size = rest[0], rest[4]
    return x.new_empty(rows.shape[0], block_size, block_size)


def _of_gelu_gradient(dy: Tensor, x: Tensor, kernels: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, blocks, bias, rows, cols, order, shape, kernels = inputs
    activated_from = (output[1],) if isinstance(output, tuple) else ()
    ctx.save_for_backward(x, blocks, rows, cols, order, *activated_from)
    ctx.has_bias, ctx.shape, ctx.kernels = bias is not None, shape, kernels
    ctx.set_materialize_grads(False)  # nobody reads Y beside gelu(Y): its gradient would be zeros to add


def _gradients(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    x, blocks, *index = ctx.saved_tensors[:5]
    needs_x, needs_blocks, needs_bias = ctx.needs_input_grad[:3]
    dx = dgrad(dy, blocks, *index, ctx.shape, ctx.kernels) if needs_x else None
    dw = wgrad(dy, x, *index, ctx.shape, blocks.shape[1], ctx.kernels) if needs_blocks else None
    db = dy.sum(0) if ctx.has_bias and needs_bias else None
    return dx, dw, db, None, None, None, None, None


def _gelu_gradients(ctx: Any, d_activated: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_activated is None:
        return _gradients(ctx, dy)
    own = gelu_gradient(d_activated, ctx.saved_tensors[5], ctx.kernels)
    return _gradients(ctx, own if dy is None else own + dy)


# Gradients of gradients, by the same products.


def _save_dgrad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.shape, ctx.kernels = inputs
    ctx.save_for_backward(*tensors)


def _dgrad_gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dy, blocks, *index = ctx.saved_tensors
    needs_dy, needs_blocks = ctx.needs_input_grad[:2]
    d_dy = linear(g, blocks, None, *index, ctx.shape, ctx.kernels) if needs_dy else None
    d_blocks = wgrad(dy, g, *index, ctx.shape, blocks.shape[1], ctx.kernels) if needs_blocks else None
    return d_dy, d_blocks, None, None, None, None, None


def _save_wgrad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.shape, _, ctx.kernels = inputs
    ctx.save_for_backward(*tensors)


def _wgrad_gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dy, x, *index = ctx.saved_tensors
    needs_dy, needs_x = ctx.needs_input_grad[:2]
    d_dy = linear(x, g, None, *index, ctx.shape, ctx.kernels) if needs_dy else None
    d_x = dgrad(dy, g, *index, ctx.shape, ctx.kernels) if needs_x else None
    return d_dy, d_x, None, None, None, None, None, None


def _save_gelu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, ctx.kernels = inputs
    ctx.save_for_backward(dy, x)


def _gelu_gradient_gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dy, x = ctx.saved_tensors
    near = x.clamp(-13.0, 13.0)  # beyond, gelu'' is 0
    needs_dy, needs_x = ctx.needs_input_grad[:2]
    second = (2.0 - near * near) * torch.exp(-0.5 * near * near) * (2.0 * math.pi) ** -0.5  # gelu''
    return gelu_gradient(g, x, ctx.kernels) if needs_dy else None, g * dy * second if needs_x else None, None


for _name, _shapes, _backward, _setup in (
    ("linear", _of_linear, _gradients, _save),
    ("linear_gelu", _of_linear_gelu, _gelu_gradients, _save),
    ("dgrad", _of_dgrad, _dgrad_gradients, _save_dgrad),
    ("wgrad", _of_wgrad, _wgrad_gradients, _save_wgrad),
    ("gelu_gradient", _of_gelu_gradient, _gelu_gradient_gradients, _save_gelu),
):
    torch.library.register_fake(f"dsbert::{_name}", _shapes, lib=_library)
    torch.library.register_autograd(f"dsbert::{_name}", _backward, setup_context=_setup, lib=_library)
