"""The best entry of the launch table for one card, by measurement: a one-off, for whoever fills the table.

Importing this module imports triton.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product as combinations

import torch
from torch import Tensor

from dsbert.sparse.kernels.index import KernelIndex, Product
from dsbert.sparse.kernels.triton_gpu import launch
from dsbert.sparse.kernels.triton_gpu.configs import (
    Config,
    Kind,
    LinearConfig,
    WgradConfig,
    config_of,
    kind_of,
    set_config,
)

logger = logging.getLogger(__name__)
# Launches of one product may sum in another order, in the same precision.
_SAME = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Problem:
    """One layer's three products: x [T, in], dy [T, out], blocks [K, B, B]."""

    index: KernelIndex
    x: Tensor
    dy: Tensor
    blocks: Tensor

    def call(self, product: Product) -> Tensor:
        """Compute a product as it is launched now."""
        if product == "forward":
            return launch.forward(self.x, self.blocks, self.index, None)
        elif product == "dgrad":
            return launch.dgrad(self.dy, self.blocks, self.index)
        return launch.wgrad(self.dy, self.x, self.index)


def candidates(product: Product, block_size: int, kind: Kind) -> list[Config]:
    """What is worth timing. What a card has no room for is left out when it fails."""
    depth = 64 if kind == "half" else 32
    wide = block_size >= 128
    if product == "wgrad":
        widths = (128,) if wide else (64, 128)
        return [
            WgradConfig(width, depth, programs, warps=8 if wide else 4, stages=stages)
            for width, programs, stages in combinations(widths, (4, 8, 16), (2, 3))
            if width >= block_size
        ]
    tall: list[Config] = [
        LinearConfig(tokens, depth, warps=8 if wide or tokens == 256 else 4, stages=stages)
        for tokens, stages in combinations((64, 128, 256), (2, 3))
    ]
    # Few tokens and many lines, the tile of X in L1: less traffic from L2, which is what limits small blocks.
    near: list[Config] = [
        LinearConfig(tokens, depth, lines, cache, stages=2)
        for tokens, lines, cache in combinations((64, 128), (4, 16), ("", ".ca"))
    ]
    return tall if wide else tall + near


def tune(
    product: Product,
    problems: Sequence[Problem],
    milliseconds: Callable[[Callable[[], Tensor]], float],
    among: Sequence[Config] | None = None,
) -> list[tuple[float, Config]]:
    """(sum of milliseconds over the problems, config) of every candidate, fastest first; infinite where it fails.

    The problems share block size, dtype and device. The table's own entry is a candidate always, and its result is what
    the others are compared with: one that differs is reported and left out. The launches are as before afterwards; put
    the first one in place with `set_config`.
    """
    size, dtype, device = problems[0].index.block_size, problems[0].x.dtype, problems[0].x.device
    before = config_of(product, size, dtype, device)
    expected = [problem.call(product) for problem in problems]
    others = among if among is not None else candidates(product, size, kind_of(dtype))
    found = []
    try:
        for config in dict.fromkeys([before, *others]):
            set_config(product, size, dtype, device, config)
            found.append((_time(product, problems, expected, milliseconds), config))
    finally:
        set_config(product, size, dtype, device, before)
    return sorted(found, key=lambda pair: pair[0])


def _time(
    product: Product,
    problems: Sequence[Problem],
    expected: Sequence[Tensor],
    milliseconds: Callable[[Callable[[], Tensor]], float],
) -> float:
    total = 0.0
    for problem, result in zip(problems, expected, strict=True):
        try:
            difference = relative_error(problem.call(product), result)
        except Exception as error:  # triton has no common class for "does not fit" and "does not compile"
            logger.info("%s left out: %s", product, error)
            return math.inf
        if not difference <= _SAME[problem.x.dtype]:
            logger.warning("%s left out: differs from the table's launch by %.2g", product, difference)
            return math.inf
        total += milliseconds(partial(problem.call, product))
    return total


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`, in float64; 0 where both are zero."""
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=torch.finfo(torch.float64).tiny))
