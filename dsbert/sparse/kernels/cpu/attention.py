"""The attention of attention_forward.h and attention_backward.h, called through ctypes.

Shapes: T tokens of n sequences, one behind the other, h heads, d head size.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsbert.sparse.kernels.cpu.backend import DTYPES
from dsbert.sparse.kernels.cpu.build import load

MAX_HEAD_SIZE = 128


class _Operand(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("token", ctypes.c_int64), ("head", ctypes.c_int64))

    @classmethod
    def of(cls, x: Tensor) -> _Operand:
        return cls(x.data_ptr(), x.stride(0), x.stride(1))


class _Call(ctypes.Structure):
    """`Attention` of attention.h, field by field."""

    _fields_ = (
        *((name, _Operand) for name in ("q", "k", "v", "dout")),
        *((name, ctypes.c_void_p) for name in ("out", "lse", "dq", "dk", "dv", "starts", "visible")),
        *((name, ctypes.c_int64) for name in ("sequences", "heads", "size", "tokens", "window")),
        ("seed", ctypes.c_uint64),
        ("p", ctypes.c_double),
        ("scaling", ctypes.c_double),
        ("dtype", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


class Gradients(NamedTuple):
    """Of q, k and v: [T, h, d] each."""

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Attention:
    """softmax(Q K^T scaling) V within every sequence; scores and sums in fp32, whatever the operands are. (Shares as
    well, but where the machine multiplies pairs of bf16: there they are rounded before they meet V.)

    starts: int64 [n + 1] on the CPU, contiguous: where each sequence begins, and T. visible: bool or uint8 [T], keys
    that are seen; None: all. seed, p: which shares fall, by a hash of seed and the share's place among those of all
    heads of all sequences. window: tokens to each side that are seen; negative: all. A query that sees nothing gets
    zeros. Source of the method: Dao et al. 2022, arXiv:2205.14135.
    """

    starts: Tensor
    visible: Tensor | None = None
    seed: int = 0
    p: float = 0.0
    scaling: float = 1.0
    window: int = -1

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """[T, h, d] each, of one dtype and of any strides -> the result [T, h, d], and fp32 [h, T], the logarithm of
        the sum of exp(scores), which `gradients` wants."""
        q, k, v = _rows(q), _rows(k), _rows(v)
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
        call = self._call(q, k, v, out, lse)
        load().dsbert_attention(ctypes.addressof(call))
        return out, lse

    def gradients(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        """dout: the result's gradient, [T, h, d]; out, lse: what `forward` returned of the same operands."""
        dout, q, k, v, out = _rows(dout), _rows(q), _rows(k), _rows(v), out.contiguous()
        found = Gradients(*(torch.empty(q.shape, dtype=q.dtype) for _ in range(3)))
        call = self._call(q, k, v, out, lse.contiguous())
        call.dout = _Operand.of(dout)
        call.dq, call.dk, call.dv = (gradient.data_ptr() for gradient in found)
        load().dsbert_attention_gradient(ctypes.addressof(call))
        return found

    def _call(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> _Call:
        tokens, heads, size = q.shape
        return _Call(
            q=_Operand.of(q),
            k=_Operand.of(k),
            v=_Operand.of(v),
            out=out.data_ptr(),
            lse=lse.data_ptr(),
            starts=self.starts.data_ptr(),
            visible=None if self.visible is None else self.visible.data_ptr(),
            sequences=self.starts.numel() - 1,
            heads=heads,
            size=size,
            tokens=tokens,
            window=self.window,
            seed=self.seed % 2**64,
            p=self.p,
            scaling=self.scaling,
            dtype=DTYPES[q.dtype],
            threads=torch.get_num_threads(),
        )


def _rows(x: Tensor) -> Tensor:
    """With the elements of a head side by side: what the kernels need."""
    return x if x.shape[2] <= 1 or x.stride(2) == 1 else x.contiguous()
