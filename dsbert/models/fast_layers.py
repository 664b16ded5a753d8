"""What of an encoder is neither a sparse product nor a loss, so that it costs little beside those: dropout, attention,
and dense products in half precision.

torch draws dropout masks on a CPU number by number, keeps them, and takes attention apart into a dozen passes as soon
as there is dropout: together a fifth of a step. Half precisions that a CPU cannot multiply it multiplies number by
number, up to a hundred times slower than fp32: there fp32 is put around the product. Elsewhere than on a CPU, and where
dsbert's kernels for it cannot be had, torch's own run. Shapes: b sequences, h heads, S positions, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dsbert.sparse.half_precision import is_slow
from dsbert.sparse.kernels import cpu

ATTENTION = "dsbert"

_library = torch.library.Library("dsbert", "FRAGMENT")
_library.define("dropout(Tensor x, Tensor seed, float p) -> Tensor")


def _dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return cpu.dropout(x, p, int(seed))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """What fell in forward falls here: the same draw on the gradient."""
    return torch.ops.dsbert.dropout(dy, ctx.saved_tensors[0], ctx.p), None, None


_library.impl("dropout", _dropout, "CPU")
torch.library.register_fake(
    "dsbert::dropout",
    lambda x, seed, p: torch.empty_like(x, memory_format=torch.contiguous_format),
    lib=_library,
)
torch.library.register_autograd("dsbert::dropout", _gradient, setup_context=_save, lib=_library)


def drop(x: Tensor, p: float, training: bool = True) -> Tensor:
    """torch's dropout. On a CPU the mask is a hash of a seed, drawn from torch's generator, and the position: none is
    kept for backward."""
    if not training or not 0.0 < p < 1.0 or cpu.BACKEND.why_not(x.device, x.dtype, 1) is not None:
        return functional.dropout(x, p, training)
    dropped: Tensor = torch.ops.dsbert.dropout(x, draw_seed(), p)
    return dropped


def draw_seed() -> Tensor:
    """What decides which elements fall: int64, from torch's generator."""
    return torch.empty((), dtype=torch.int64).random_()


class Dropout(nn.Dropout):
    """nn.Dropout by `drop`."""

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.p, self.training)


class Linear(nn.Linear):
    """nn.Linear, in fp32 around half precisions that the machine cannot multiply."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_slow(x) or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(x.float(), self.weight.float(), bias).to(x.dtype)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """softmax(Q K^T scaling + mask) V: q, k, v [b, h, S, d] -> [b, S, h, d]. attention_mask: bool, what may be seen."""
    if is_slow(query):
        q, k, v = query.float(), key.float(), value.float()
        found, _ = attention(module, q, k, v, attention_mask, dropout, scaling, **options)
        return found.to(query.dtype), None
    if not dropout or query.device.type != "cpu":
        y, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return y, None
    sequences, heads, positions, size = query.shape
    q, k, v = (tensor.reshape(sequences * heads, -1, size) for tensor in (query, key, value))
    scores = torch.bmm(q * (size**-0.5 if scaling is None else scaling), k.transpose(1, 2))
    if attention_mask is not None:
        # Finite, also after a score is added to it, so that a sequence of nothing but padding has shares, too.
        hidden = torch.zeros(attention_mask.shape, dtype=scores.dtype)
        hidden.masked_fill_(~attention_mask, torch.finfo(scores.dtype).min / 2)
        scores.view(sequences, heads, positions, -1).add_(hidden)
    shares = drop(torch.softmax(scores, -1), dropout)
    return torch.bmm(shares, v).view(sequences, heads, positions, size).transpose(1, 2), None


def use_fast_layers_(model: PreTrainedModel) -> None:
    """Have a model of transformers use what stands here, in place: names of modules and parameters stay."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Dropout:
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], Dropout(module.p))
        elif type(module) is nn.Linear:
            module.__class__ = Linear  # parameters, ties and hooks stay as they are
    model.set_attn_implementation(ATTENTION)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
