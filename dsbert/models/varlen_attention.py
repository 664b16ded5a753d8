"""Attention within sequences that stand one behind the other, without padding between them.

On a CPU by dsbert's own kernel, which keeps no scores, draws what dropout takes by a hash, and sums in fp32. On CUDA by
torch's flash attention for sequences of any length, where this torch has it, for half precisions without dropout. Else
sequence by sequence by torch. Shapes: n sequences, T tokens in all of them, h heads, d head size;
L tokens of one sequence.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dsbert.sparse.half_precision import is_slow
from dsbert.sparse.kernels import cpu
from dsbert.sparse.kernels.cpu.attention import MAX_HEAD_SIZE, Attention
from dsbert.sparse.kernels.eager import needs_operators

_library = torch.library.Library("dsbert", "FRAGMENT")
_library.define(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor starts, Tensor? visible, Tensor seed, float p, "
    "float scaling, int window) -> (Tensor, Tensor)"
)
_library.define(
    "varlen_attention_gradient(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor starts, "
    "Tensor? visible, Tensor seed, float p, float scaling, int window) -> (Tensor, Tensor, Tensor)"
)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    visible: Tensor | None,
    seed: Tensor,
    p: float,
    scaling: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    return Attention(starts, visible, int(seed), p, scaling, window).forward(q, k, v)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    visible: Tensor | None,
    seed: Tensor,
    p: float,
    scaling: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    found = Attention(starts, visible, int(seed), p, scaling, window).gradients(dout, q, k, v, out, lse)
    return found.query, found.key, found.value


def _fake_forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, visible, seed, ctx.p, ctx.scaling, ctx.window = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, starts, visible, seed)


def _gradient(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """What fell in forward falls here: the same draw."""
    if dout is None:
        return (None,) * 9
    gradient = torch.ops.dsbert.varlen_attention_gradient
    return *gradient(dout, *ctx.saved_tensors, ctx.p, ctx.scaling, ctx.window), *(None,) * 6


def _no_second(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("attention's gradient has no derivative of its own")


_library.impl("varlen_attention", _forward, "CPU")
_library.impl("varlen_attention_gradient", _backward, "CPU")
torch.library.register_fake("dsbert::varlen_attention", _fake_forward, lib=_library)
torch.library.register_fake("dsbert::varlen_attention_gradient", _fake_backward, lib=_library)
torch.library.register_autograd("dsbert::varlen_attention", _gradient, setup_context=_save, lib=_library)
torch.library.register_autograd("dsbert::varlen_attention_gradient", _no_second, lib=_library)


class VarlenAttention(torch.autograd.Function):
    """The operator for plain tensors, without what torch's dispatcher costs."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, by: Attention) -> Tensor:
        out, lse = by.forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse, by.starts, by.visible)  # the last two may not change meanwhile
        ctx.by = by
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *_ = ctx.saved_tensors
        found = ctx.by.gradients(dout, q, k, v, out, lse)
        return found.query, found.key, found.value, None


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    window: int | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """softmax(Q K^T scaling) V within each sequence: q, k, v [T, h, d], of any strides -> [T, h, d].

    starts: int64 [n + 1] on the CPU, where each sequence begins, and T. dropout: of the shares. scaling: 1 / sqrt(d)
    where None. window: how many tokens to each side are seen; None: all. visible: bool [T], keys that are seen; a query
    that sees none gets zeros. T may be 0. Raises ValueError where shapes or starts do not fit.
    """
    _check(query, key, value, starts, visible)
    scaling = query.shape[2] ** -0.5 if scaling is None else scaling
    if has_kernel(query, dropout):
        seed = torch.empty((), dtype=torch.int64)
        seed = seed.random_() if dropout else seed.zero_()
        reach = -1 if window is None else window
        starts = starts.to(torch.int64).contiguous()
        seen = None if visible is None else visible.to(torch.bool).contiguous()
        out: Tensor
        if needs_operators(query, key, value):
            operator = torch.ops.dsbert.varlen_attention
            out, _ = operator(query, key, value, starts, seen, seed, dropout, scaling, reach)
        else:
            by = Attention(starts, seen, int(seed), dropout, scaling, reach)
            out = VarlenAttention.apply(query, key, value, by)
        return out
    flash = _flash_attention() if _fits_flash(query) and not dropout and visible is None else None
    if flash:
        longest, where = int(starts.diff().max()), starts.to(query.device, torch.int32)
        sides = (-1, -1) if window is None else (window, window)
        found: Tensor = flash(query, key, value, where, where, longest, longest, scale=scaling, window_size=sides)
        return found
    return _by_sequence(query, key, value, starts, dropout, scaling, window, visible)


def has_kernel(x: Tensor, dropout: float = 0.0) -> bool:
    """Whether dsbert's own kernel can attend with operands like x [..., d]."""
    return 1 <= x.shape[-1] <= MAX_HEAD_SIZE and dropout < 1.0 and cpu.BACKEND.why_not(x.device, x.dtype, 1) is None


def _fits_flash(x: Tensor) -> bool:
    """What torch's flash attention takes: x [T, h, d], T > 0, on an Ampere card or a later one."""
    half = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    return half and len(x) > 0 and x.shape[2] % 8 == 0 and x.shape[2] <= 256 and _capability(x.device) >= (8, 0)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _check(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, visible: Tensor | None) -> None:
    """The kernel reads where starts sends it."""
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != query.shape or tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(f"expected a {name} as the query is, {_what(query)}, found {_what(tensor)}")
    tokens = query.shape[0]
    if query.dim() != 3 or (visible is not None and visible.shape != (tokens,)):
        found = "" if visible is None else f" and visible {list(visible.shape)}"
        raise ValueError(f"expected a query [T, h, d] and visible [T], found {list(query.shape)}{found}")
    if starts.dim() != 1 or starts.device.type != "cpu" or not len(starts):
        raise ValueError(f"expected starts [n + 1] on the CPU, found {_what(starts)}")
    if starts[0] != 0 or starts[-1] != tokens or bool((starts.diff() < 0).any()):
        raise ValueError(f"expected starts that ascend from 0 to {tokens}, found {starts.tolist()}")


def _what(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"


@functools.cache
def _flash_attention() -> Callable[..., Any] | None:
    """torch's, if it has one that takes a scale and a window."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # imports torch's compiler
    except ImportError:
        return None
    return varlen_attn if {"scale", "window_size"} <= {*inspect.signature(varlen_attn).parameters} else None


def _by_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    dropout: float,
    scaling: float,
    window: int | None,
    visible: Tensor | None,
) -> Tensor:
    """`varlen_attention` by torch."""
    if is_slow(query):
        q, k, v = query.float(), key.float(), value.float()
        return _by_sequence(q, k, v, starts, dropout, scaling, window, visible).to(query.dtype)
    results = [query[:0]]
    for first, end in itertools.pairwise(starts.tolist()):
        q, k, v = (x[first:end].transpose(0, 1)[None] for x in (query, key, value))  # [1, h, L, d]
        places = torch.arange(end - first, device=query.device)
        seen = torch.ones(end - first, end - first, dtype=torch.bool, device=query.device)
        if window is not None:
            seen = (places - places[:, None]).abs() <= window
        if visible is not None:
            seen = seen & visible[first:end].to(torch.bool)
        mask = None if window is None and visible is None else seen
        found = functional.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scaling)[0]
        nothing = ~seen.any(1)[:, None]  # what torch makes of these depends on its version
        results.append(found.transpose(0, 1).masked_fill(nothing[:, :, None], 0.0))
    return torch.cat(results)
