"""Block-sparse products by MKL on a CPU: `pip install sparse-dot-mkl mkl`, which nothing of dsbert needs.

fp32, forward and dgrad: MKL has no product that computes a dense gradient at given blocks alone. MKL's own handle is
made inside every call, as sparse_dot_mkl does it; that is microseconds.

Shapes: T tokens, weight [out, in] in blocks of [B, B].
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@cache
def why_not() -> str | None:
    """Why MKL cannot be had here, in one line, or None if it can."""
    # Beside each other OpenMP's threads of two kinds would wait in a loop while those of the other compute.
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    # The package looks for the library where a system has its own, not where pip puts it.
    for library in sorted(Path(sys.prefix, "lib").glob("libmkl_rt.so*")):
        os.environ.setdefault("MKL_RT", str(library))
    try:
        import scipy.sparse  # noqa: F401  # whether they can be is the question
        import sparse_dot_mkl  # noqa: F401
    except ImportError as error:
        return f"MKL's block-sparse product is left out: {str(error).splitlines()[0]} (pip install sparse-dot-mkl mkl)"
    return None


def products(weight: Tensor, block: int, x: Tensor, dy: Tensor, bias: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Product -> a call that computes it: X W^T + b [T, out] and dY W [T, in], on fp32 CPU tensors.

    The sparse form of the weight, transposed for dgrad, is made beforehand. Call `why_not` first.
    """
    import sparse_dot_mkl
    from scipy.sparse import bsr_array

    sparse_dot_mkl.mkl_set_num_threads(torch.get_num_threads())

    def sparse(dense: Tensor) -> Any:
        return bsr_array(dense.numpy(), blocksize=(block, block))

    def times(matrix: Any, rows: Tensor) -> Tensor:
        # A transposed view goes in and comes out column by column: no copy on either side.
        return torch.from_numpy(sparse_dot_mkl.dot_product_mkl(matrix, rows.numpy().T).T)

    forwards, backwards = sparse(weight), sparse(weight.t().contiguous())
    return {"forward": lambda: times(forwards, x).add_(bias), "dgrad": lambda: times(backwards, dy)}
