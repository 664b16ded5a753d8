"""Residual, dropout and LayerNorm in one pass each way on a CPU, where torch takes three.

Which elements fall is what `fast_layers.drop` has fall for the same seed, and the seed is drawn in the same place.
Elsewhere than on a CPU, and where dsbert's kernels cannot be had, torch's own run. Shapes: rows of H elements [..., H].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.bert.modeling_bert import BertEmbeddings, BertOutput, BertSelfOutput

from dsbert.models.fast_layers import draw_seed, drop
from dsbert.sparse.kernels import cpu


class ResidualNorm(torch.autograd.Function):
    """y = LayerNorm(dropout(x) + residual), or dropout(LayerNorm(x)) where `dropout.after`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        gamma: Tensor,
        beta: Tensor | None,
        eps: float,
        dropout: cpu.NormDropout,
    ) -> Tensor:
        y, total, statistics = cpu.norm(x, residual, gamma, beta, eps, dropout)
        ctx.save_for_backward(total, statistics, gamma)
        ctx.has, ctx.dropout = (residual is not None, beta is not None), dropout
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        total, statistics, gamma = ctx.saved_tensors
        dx, dresidual, dgamma, dbeta = cpu.norm_gradient(dy, total, statistics, gamma, ctx.has, ctx.dropout)
        return dx, dresidual if ctx.has[0] else None, dgamma, dbeta, None, None


class Norm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension, with what stands before it or after it in the same pass.

    after: the probability of the dropout that follows the norm; 0: none does.
    """

    after = 0.0

    def forward(self, x: Tensor, residual: Tensor | None = None, *, dropout: nn.Dropout | None = None) -> Tensor:
        """LayerNorm(dropout(x) + residual), or LayerNorm(x) and the dropout after it."""
        before = dropout.p if dropout is not None and dropout.training else 0.0
        after = self.after if self.training else 0.0
        if self._fits(x, residual) and before < 1 and after < 1 and not (before and after):
            p = before or after
            drawn = cpu.NormDropout(int(draw_seed()) if p else 0, p, after > 0)
            y: Tensor = ResidualNorm.apply(x, residual, self.weight, self.bias, self.eps, drawn)
            return y
        if dropout is not None:
            x = dropout(x)
        return drop(super().forward(x if residual is None else x + residual), after)

    def _fits(self, x: Tensor, residual: Tensor | None) -> bool:
        """Whether the kernels compute it: on a CPU, of one dtype and shape."""
        others = [tensor for tensor in (residual, self.weight, self.bias) if tensor is not None]
        return (
            cpu.BACKEND.why_not(x.device, x.dtype, 1) is None
            and all(tensor.dtype == x.dtype for tensor in others)
            and x.shape[-1:] == self.weight.shape  # the kernel reads as many
            and (residual is None or residual.shape == x.shape)
            and not torch.is_autocast_enabled("cpu")
        )


class _Output(nn.Module):
    """transformers' BertOutput and BertSelfOutput, whose last three steps are one."""

    dense: nn.Module
    dropout: nn.Dropout
    LayerNorm: Norm

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        y: Tensor = self.LayerNorm(self.dense(hidden_states), input_tensor, dropout=self.dropout)
        return y


def fuse_norms_(model: nn.Module) -> None:
    """Have a model of transformers use what stands here, in place: names of modules and parameters stay."""
    for module in model.modules():
        if type(module) is nn.LayerNorm and module.elementwise_affine and len(module.normalized_shape) == 1:
            module.__class__ = Norm  # parameters and hooks stay as they are
    for module in model.modules():
        if type(module) in (BertOutput, BertSelfOutput):
            module.__class__ = _Output
        elif isinstance(module, BertEmbeddings):
            module.LayerNorm.after, module.dropout = module.dropout.p, nn.Identity()
