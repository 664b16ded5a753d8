"""The block-sparse linear layer for plain tensors, without torch's dispatcher.

An operator with gradients written in Python costs 0.35 ms a layer, forward and backward, whatever it computes; as an
autograd function, which is all that eager training needs, it costs a quarter of that. Whatever would see operators (the
compiler, fake tensors, dispatch modes) gets them: `needs_operators` says so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsbert.sparse.kernels import ops, products
from dsbert.sparse.kernels.index import KernelIndex
from dsbert.sparse.kernels.record import Choice

_PLAIN = (Tensor, nn.Parameter)


def needs_operators(*tensors: Tensor | None) -> bool:
    """Whether something that works on operators looks on, so that these tensors must go through torch's dispatcher."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    if torch._C._len_torch_dispatch_stack():
        return True
    return any(x is not None and (type(x) not in _PLAIN or x.is_meta) for x in tensors)


class BlockSparseProduct(torch.autograd.Function):
    """`products.linear` of X [T, in], or `products.linear_gelu` where `gelu`, with their gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, blocks: Tensor, bias: Tensor | None, index: KernelIndex, choice: Choice, gelu: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        product = products.linear_gelu if gelu else products.linear
        found = product(x, blocks, bias, index, choice)
        activated_from = (found[1],) if isinstance(found, tuple) else ()
        ctx.save_for_backward(x, blocks, index.rows, index.cols, index.order, *activated_from)
        ctx.has_bias, ctx.shape, ctx.kernels, ctx.gelu = bias is not None, index.shape, choice, gelu
        ctx.set_materialize_grads(False)  # nobody reads Y beside gelu(Y): its gradient would be zeros to add
        return found

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, dy: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # gradients of these are wanted, which operators have
            found = ops.gelu_gradients(ctx, d_out, dy) if ctx.gelu else ops.gradients(ctx, d_out)
            return *found[:3], None, None, None
        x, blocks, rows, cols, order, *activated_from = ctx.saved_tensors
        if not activated_from:
            dy = d_out
        elif d_out is not None:
            through_gelu = ops.gelu_gradient(d_out, activated_from[0], ctx.kernels)
            dy = through_gelu if dy is None else through_gelu + dy
        if dy is None:
            return (None,) * 6
        index = KernelIndex(ctx.shape, blocks.shape[1], rows, cols, order)
        needs_x, needs_blocks, needs_bias = ctx.needs_input_grad[:3]
        dx = products.dgrad(dy, blocks, index, ctx.kernels) if needs_x else None
        dw = products.wgrad(dy, x, index, ctx.kernels) if needs_blocks else None
        db = dy.sum(0) if ctx.has_bias and needs_bias else None
        return dx, dw, db, None, None, None


def linear(x: Tensor, blocks: Tensor, bias: Tensor | None, index: KernelIndex, choice: Choice) -> Tensor:
    """X W^T + b [T, out] of X [T, in], differentiable; by the operator where `needs_operators`."""
    if needs_operators(x, blocks, bias):
        found: Tensor = ops.linear(x, blocks, bias, index.rows, index.cols, index.order, index.shape, choice)
    else:
        found = BlockSparseProduct.apply(x, blocks, bias, index, choice, False)
    return found


def linear_gelu(x: Tensor, blocks: Tensor, bias: Tensor | None, index: KernelIndex, choice: Choice) -> Tensor:
    """gelu(X W^T + b) [T, out], as `linear`."""
    if needs_operators(x, blocks, bias):
        found: tuple[Tensor, Tensor] = ops.linear_gelu(
            x, blocks, bias, index.rows, index.cols, index.order, index.shape, choice
        )
    else:
        found = BlockSparseProduct.apply(x, blocks, bias, index, choice, True)
    return found[0]
