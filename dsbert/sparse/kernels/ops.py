"""The block-sparse linear layer as torch operators: autograd, fake tensors, torch.compile.

Operators take tensors and plain values alone: `FlatIndex` is a KernelIndex in that form, and `kernels` a Choice, as a
list of three names. Shapes: T tokens, K active blocks, B block size; shape = (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsbert.sparse.kernels import cpu, products
from dsbert.sparse.kernels.index import KernelIndex
from dsbert.sparse.kernels.record import Choice

# Defined piece by piece: torch.library.custom_op would import torch's compiler, three seconds of every start.
_library = torch.library.Library("dsbert", "DEF")
_INDEX = "Tensor rows, Tensor cols, Tensor order, SymInt[] shape"  # as FlatIndex
_ARGUMENTS = f"Tensor x, Tensor blocks, Tensor? bias, {_INDEX}, str[] kernels"
_NO_GRADIENTS = (None, None, None, None)  # with respect to the four of an index


class FlatIndex(NamedTuple):
    """A KernelIndex as operators take it; its block size is that of the blocks beside it."""

    rows: Tensor
    cols: Tensor
    order: Tensor
    shape: Sequence[int]

    def with_block_size(self, block_size: int) -> KernelIndex:
        """What the kernels take."""
        out_features, in_features = self.shape
        return KernelIndex((out_features, in_features), block_size, self.rows, self.cols, self.order)


def _operator(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Register what is decorated as the operator of the schema on every device; it becomes that operator."""

    def register(function: Callable[..., Any]) -> Any:
        _library.define(schema)
        name = schema.partition("(")[0]
        _library.impl(name, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.dsbert, name).default

    return register


@_operator(f"linear({_ARGUMENTS}) -> Tensor")
def linear(
    x: Tensor,
    blocks: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    cols: Tensor,
    order: Tensor,
    shape: Sequence[int],
    kernels: Sequence[str],
) -> Tensor:
    """X W^T + b: [T, out]."""
    index = FlatIndex(rows, cols, order, shape).with_block_size(blocks.shape[1])
    return products.linear(x, blocks, bias, index, Choice(*kernels))


@_operator(f"linear_gelu({_ARGUMENTS}) -> (Tensor, Tensor)")
def linear_gelu(
    x: Tensor,
    blocks: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    cols: Tensor,
    order: Tensor,
    shape: Sequence[int],
    kernels: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """(gelu(Y), Y) of Y = X W^T + b: [T, out] each."""
    index = FlatIndex(rows, cols, order, shape).with_block_size(blocks.shape[1])
    return products.linear_gelu(x, blocks, bias, index, Choice(*kernels))


@_operator(f"dgrad(Tensor dy, Tensor blocks, {_INDEX}, str[] kernels) -> Tensor")
def dgrad(
    dy: Tensor,
    blocks: Tensor,
    rows: Tensor,
    cols: Tensor,
    order: Tensor,
    shape: Sequence[int],
    kernels: Sequence[str],
) -> Tensor:
    """dY W: [T, in]."""
    index = FlatIndex(rows, cols, order, shape).with_block_size(blocks.shape[1])
    return products.dgrad(dy, blocks, index, Choice(*kernels))


@_operator(f"wgrad(Tensor dy, Tensor x, {_INDEX}, int block_size, str[] kernels) -> Tensor")
def wgrad(
    dy: Tensor,
    x: Tensor,
    rows: Tensor,
    cols: Tensor,
    order: Tensor,
    shape: Sequence[int],
    block_size: int,
    kernels: Sequence[str],
) -> Tensor:
    """dY^T X at the active blocks: [K, B, B]."""
    index = FlatIndex(rows, cols, order, shape).with_block_size(block_size)
    return products.wgrad(dy, x, index, Choice(*kernels))


@_operator("gelu_gradient(Tensor dy, Tensor x, str[] kernels) -> Tensor")
def gelu_gradient(dy: Tensor, x: Tensor, kernels: Sequence[str]) -> Tensor:
    """dY gelu'(X), of the exact GELU."""
    if Choice(*kernels).forward == "cpu":
        return cpu.gelu_gradient(dy, x)
    dx: Tensor = torch.ops.aten.gelu_backward(dy, x)
    return dx


# The shapes that come out, for fake tensors.


class _LinearInputs(NamedTuple):
    """The arguments of `linear` and `linear_gelu`, as torch hands them on."""

    x: Tensor
    blocks: Tensor
    bias: Tensor | None
    rows: Tensor
    cols: Tensor
    order: Tensor
    shape: Sequence[int]
    kernels: Sequence[str]


class _DgradInputs(NamedTuple):
    dy: Tensor
    blocks: Tensor
    rows: Tensor
    cols: Tensor
    order: Tensor
    shape: Sequence[int]
    kernels: Sequence[str]


class _WgradInputs(NamedTuple):
    dy: Tensor
    x: Tensor
    rows: Tensor
    cols: Tensor
    order: Tensor
    shape: Sequence[int]
    block_size: int
    kernels: Sequence[str]


def _of_linear(*arguments: Any) -> Tensor:
    given = _LinearInputs(*arguments)
    return given.x.new_empty(given.x.shape[0], given.shape[0])


def _of_linear_gelu(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _of_linear(*arguments), _of_linear(*arguments)


def _of_dgrad(*arguments: Any) -> Tensor:
    given = _DgradInputs(*arguments)
    return given.dy.new_empty(given.dy.shape[0], given.shape[1])


def _of_wgrad(*arguments: Any) -> Tensor:
    given = _WgradInputs(*arguments)
    return given.x.new_empty(given.rows.shape[0], given.block_size, given.block_size)


def _of_gelu_gradient(dy: Tensor, x: Tensor, kernels: Sequence[str]) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    given = _LinearInputs(*inputs)
    activated_from = (output[1],) if isinstance(output, tuple) else ()
    ctx.save_for_backward(given.x, given.blocks, given.rows, given.cols, given.order, *activated_from)
    ctx.has_bias, ctx.shape, ctx.kernels = given.bias is not None, given.shape, given.kernels
    ctx.set_materialize_grads(False)  # nobody reads Y beside gelu(Y): its gradient would be zeros to add


def gradients(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of `linear`'s arguments, by operators, which have gradients themselves. ctx: as `_save` has left it."""
    if dy is None:
        return None, None, None, *_NO_GRADIENTS, None
    return _gradients_from(ctx, ctx.saved_tensors, dy)


def _gradients_from(ctx: Any, saved: tuple[Tensor, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
    """saved: what `_save` has saved. Read once by the caller: under activation checkpointing it can be had once."""
    x, blocks, rows, cols, order = saved[:5]
    index = FlatIndex(rows, cols, order, ctx.shape)
    needs_x, needs_blocks, needs_bias = ctx.needs_input_grad[:3]
    dx = dgrad(dy, blocks, *index, ctx.kernels) if needs_x else None
    dw = wgrad(dy, x, *index, blocks.shape[1], ctx.kernels) if needs_blocks else None
    db = dy.sum(0) if ctx.has_bias and needs_bias else None
    return dx, dw, db, *_NO_GRADIENTS, None


def gelu_gradients(ctx: Any, d_activated: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of `linear_gelu`'s, as `gradients`."""
    if d_activated is None:
        return gradients(ctx, dy)
    saved = ctx.saved_tensors
    own = gelu_gradient(d_activated, saved[-1], ctx.kernels)
    return _gradients_from(ctx, saved, own if dy is None else own + dy)


# Gradients of gradients, by the same products.


def _save_dgrad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    given = _DgradInputs(*inputs)
    ctx.shape, ctx.kernels = given.shape, given.kernels
    ctx.save_for_backward(given.dy, given.blocks, given.rows, given.cols, given.order)


def _dgrad_gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dy, blocks, rows, cols, order = ctx.saved_tensors
    index = FlatIndex(rows, cols, order, ctx.shape)
    needs_dy, needs_blocks = ctx.needs_input_grad[:2]
    d_dy = linear(g, blocks, None, *index, ctx.kernels) if needs_dy else None
    d_blocks = wgrad(dy, g, *index, blocks.shape[1], ctx.kernels) if needs_blocks else None
    return d_dy, d_blocks, *_NO_GRADIENTS, None


def _save_wgrad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    given = _WgradInputs(*inputs)
    ctx.shape, ctx.kernels = given.shape, given.kernels
    ctx.save_for_backward(given.dy, given.x, given.rows, given.cols, given.order)


def _wgrad_gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dy, x, rows, cols, order = ctx.saved_tensors
    index = FlatIndex(rows, cols, order, ctx.shape)
    needs_dy, needs_x = ctx.needs_input_grad[:2]
    d_dy = linear(x, g, None, *index, ctx.kernels) if needs_dy else None
    d_x = dgrad(dy, g, *index, ctx.kernels) if needs_x else None
    return d_dy, d_x, *_NO_GRADIENTS, None, None


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
    ("linear", _of_linear, gradients, _save),
    ("linear_gelu", _of_linear_gelu, gelu_gradients, _save),
    ("dgrad", _of_dgrad, _dgrad_gradients, _save_dgrad),
    ("wgrad", _of_wgrad, _wgrad_gradients, _save_wgrad),
    ("gelu_gradient", _of_gelu_gradient, _gelu_gradient_gradients, _save_gelu),
):
    torch.library.register_fake(f"dsbert::{_name}", _shapes, lib=_library)
    torch.library.register_autograd(f"dsbert::{_name}", _backward, setup_context=_setup, lib=_library)
