"""The cross-entropy of a linear layer's logits, without the logits: what predicts tokens of a vocabulary.

Logits [m, V] and their gradient would be the largest tensors of a step by far, three or four of them at a time. Here
they exist for some rows at a time, and in one place: logits become their own gradient, which is multiplied into the
gradients of inputs and weights at once, in forward, when nothing but the factor is missing that backward brings. That
takes the same three products as before, none of them twice. On a CPU with dsbert's kernels; elsewhere torch's own runs.
Shapes: m predictions, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsbert.models.fast_layers import Linear
from dsbert.models.spec import losses_and_hits
from dsbert.sparse.half_precision import is_slow
from dsbert.sparse.kernels import cpu

CHUNK_BYTES = 1 << 25  # of logits at a time


class VocabularyLinear(Linear):
    """A linear layer [.., H] -> [.., V] that is asked for logits, or for the loss that they make."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        """Logits of x. Given labels, x [m, H] and int64 [m] (-100: not asked): the summed cross-entropy, fp32 [], and
        how many predictions are right, int64 [], which is 0 while training. Raises IndexError for a label beyond V."""
        if labels is None:
            return super().forward(x)
        if not self._fits(x):
            losses, hits = losses_and_hits([(super().forward(x).float(), labels)], self.training)
            return losses[0], hits[0]
        if labels.numel() and int(labels.max()) >= self.out_features:
            raise IndexError(f"expected labels below {self.out_features}, found {int(labels.max())}")
        inputs = (x, self.weight, self.bias)
        wants_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
        return VocabularyLoss.apply(*inputs, labels, wants_gradient, not self.training)

    def _fits(self, x: Tensor) -> bool:
        others = [tensor for tensor in (self.weight, self.bias) if tensor is not None]
        return (
            cpu.BACKEND.why_not(x.device, x.dtype, 1) is None
            and all(tensor.dtype == x.dtype for tensor in others)
            and not torch.is_autocast_enabled("cpu")
        )


class VocabularyLoss(torch.autograd.Function):
    """(summed cross-entropy, hits), with the gradients but for their factor made in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        wants_gradient: bool,
        wants_hits: bool,
    ) -> tuple[Tensor, Tensor]:
        # fp16 has no room for gradients that the loss scale has not reached yet.
        dtype = torch.float32 if is_slow(x) or x.dtype == torch.float16 else x.dtype
        whole = _Operands(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        gradients = _Gradients(whole) if wants_gradient else None
        loss, hits = torch.zeros(()), torch.zeros((), dtype=torch.int64)
        for rows in _chunks(x.shape[0], weight.shape[0]):
            logits = whole.logits(rows)
            if wants_hits:
                hits += (logits.argmax(-1) == labels[rows]).sum()
            loss += cpu.cross_entropy_(logits, labels[rows], wants_gradient).sum()
            if gradients is not None:
                gradients.add(rows, logits)
            del logits  # before the next ones are made
        ctx.mark_non_differentiable(hits)
        ctx.save_for_backward(*(gradients.found() if gradients is not None else ()))
        ctx.dtype = x.dtype
        return loss, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        dx, dw, *db = (_scaled(gradient, factor, ctx.dtype) for gradient in ctx.saved_tensors)
        return dx, dw, db[0] if db else None, None, None, None


def _chunks(predictions: int, classes: int) -> Iterator[slice]:
    """As few parts of the rows as keep logits small, of equal size but for the last."""
    parts = -(-predictions * classes * 4 // CHUNK_BYTES)
    size = -(-predictions // max(1, parts))
    return (slice(first, first + size) for first in range(0, predictions, max(1, size)))


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """In place where it can be: nobody else has it. torch then refuses a second backward through the same loss."""
    return gradient.mul_(factor) if gradient.dtype == dtype else (gradient * factor).to(dtype)


@dataclass(frozen=True)
class _Operands:
    """x [m, H], weight [V, H], bias [V], of the dtype that is multiplied."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None

    def logits(self, rows: slice) -> Tensor:
        """fp32 [rows, V]."""
        x, weight = self.x[rows], self.weight.t()
        return (torch.mm(x, weight) if self.bias is None else torch.addmm(self.bias, x, weight)).float()


class _Gradients:
    """Of the summed loss, with respect to x, weight and bias; those of the weights summed in fp32."""

    def __init__(self, of: _Operands) -> None:
        self._of = of
        self._dx = torch.empty_like(of.x)
        self._dw = torch.empty(of.weight.shape, dtype=torch.float32)
        self._db = None if of.bias is None else torch.zeros(of.bias.shape, dtype=torch.float32)
        if not of.x.shape[0]:
            self._dw.zero_()

    def add(self, rows: slice, dlogits: Tensor) -> None:
        """What the rows add; dlogits fp32 [rows, V]."""
        if self._db is not None:
            self._db.addmv_(dlogits.t(), dlogits.new_ones(dlogits.shape[0]))  # four times as fast as torch's sum
        d, x = dlogits.to(self._of.x.dtype), self._of.x[rows]
        torch.mm(d, self._of.weight, out=self._dx[rows])
        keep = 1 if rows.start else 0  # the first rows find nothing to add to
        if d.dtype == torch.float32:
            self._dw.addmm_(d.t(), x, beta=keep)
        else:
            product = torch.mm(d.t(), x)
            self._dw.add_(product) if keep else self._dw.copy_(product)

    def found(self) -> tuple[Tensor, ...]:
        """dx, dw and, where there is a bias, db."""
        return (self._dx, self._dw) if self._db is None else (self._dx, self._dw, self._db)
