"""What of an encoder is neither a sparse product nor a loss, so that it costs little beside those: dropout, attention,
and dense products in half precision.

torch draws dropout masks on a CPU number by number, keeps them, and takes attention apart into a dozen passes as soon
as there is dropout: together a fifth of a step. Half precisions that a CPU cannot multiply it multiplies number by
number, up to a hundred times slower than fp32: there fp32 is put around the product. Attention has a kernel of its own
(varlen_attention.py), for masks that hide keys, far ones or those of padding. Elsewhere than on a CPU, and where
dsbert's kernels for it cannot be had, torch's own run. Shapes: b sequences, h heads, S positions, d head size; T tokens
of n sequences that stand one behind the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dsbert.models.key_mask import key_mask
from dsbert.models.varlen_attention import has_kernel, varlen_attention
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
    starts: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """softmax(Q K^T scaling + mask) V: q, k, v [b, h, S, d] -> [b, S, h, d]. attention_mask: bool [b, 1, S or 1, S],
    what may be seen.

    starts int64 [n + 1], on the CPU: the T tokens of n sequences stand one behind the other, b = 1 and S = T, each sees
    its own sequence, and there is no mask. dsbert's models have it so; who calls a module of theirs as transformers
    does, with padded rows and a mask, has the same numbers.
    """
    if starts is not None:
        return _within(query, key, value, starts, dropout, scaling, options.get("sliding_window")), None
    if _attends(module, query, key, value, dropout, options):
        seen = key_mask(attention_mask, query.shape[2], options.get("sliding_window"))
        if seen is not None:
            sequences, heads, positions, size = query.shape
            q, k, v = (x.transpose(1, 2).reshape(-1, heads, size) for x in (query, key, value))  # [b S, h, d]
            rows = torch.arange(sequences + 1) * positions
            visible = None if seen.visible is None else seen.visible.expand(sequences, -1).reshape(-1)
            y = varlen_attention(q, k, v, rows, dropout=dropout, scaling=scaling, window=seen.window, visible=visible)
            return y.view(sequences, positions, heads, size), None
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


def _attends(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, dropout: float, options: dict[str, Any]
) -> bool:
    """Whether `varlen_attention` has a kernel for that, but for the mask."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", False) if causal is None else causal
    alike = query.shape == key.shape == value.shape and query.dtype == key.dtype == value.dtype
    return alike and not causal and options.get("position_bias") is None and has_kernel(query, dropout)


def _within(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """q, k, v [1, h, T, d] -> [1, T, h, d]; sliding_window as transformers hands it over, a token more than is seen to
    each side."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    window = None if sliding_window is None else sliding_window - 1
    return varlen_attention(q, k, v, starts, dropout=dropout, scaling=scaling, window=window)[None]


def use_fast_layers_(model: PreTrainedModel) -> None:
    """Have a model of transformers use what stands here, in place: names of modules and parameters stay."""
    replace_layers_(model)
    model.set_attn_implementation(ATTENTION)


def replace_layers_(model: nn.Module) -> None:
    """`use_fast_layers_` but for the attention, which stays what it is."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Dropout:
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], Dropout(module.p))
        elif type(module) is nn.Linear:
            module.__class__ = Linear  # parameters, ties and hooks stay as they are


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
