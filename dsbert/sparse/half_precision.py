"""Half precisions that a CPU multiplies number by number, up to a hundred times slower than fp32."""

import functools

import torch
from torch import Tensor


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU multiplies matrices of a dtype without taking each number apart."""
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    return supported is None or not hasattr(torch.ops.mkldnn, supported) or getattr(torch.ops.mkldnn, supported)()


def is_slow(x: Tensor) -> bool:
    """Whether dense products of x are better done in fp32 and rounded."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and not multiplies(x.dtype)
