"""Keep Triton out of processes that have no use for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def triton_hidden() -> Iterator[None]:
    """Where there is no CUDA device, `import triton` fails inside, as where it is not installed.

    Torch's compiler, which transformers and torch's optimizers import, and DeepSpeed import Triton to see whether it is
    there, and remember the answer: 74 MB in every rank. Our own kernels import it when they are first launched.
    """
    if "triton" in sys.modules or torch.cuda.is_available():
        yield
        return
    sys.modules["triton"] = None  # type: ignore[assignment]  # what the import system takes for "not there"
    try:
        yield
    finally:
        del sys.modules["triton"]
