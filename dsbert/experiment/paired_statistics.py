"""Means with 95 % intervals (Student's t), and differences of two arms paired by grid point and seed.

Seeds decide when a loss leaves its plateau, and differ by more than arms do: what two arms have in common is taken out
by comparing the runs of one seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dsbert.base.errors import UserError

_LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """mean of n values; half: of the width of its 95 % interval, infinite for fewer than two values."""

    mean: float
    half: float
    n: int

    def __str__(self) -> str:
        if not self.n:
            return "missing"
        return f"{self.mean:.4f}" + (f" ± {self.half:.4f}" if math.isfinite(self.half) else "")

    @property
    def excludes_zero(self) -> bool:
        return math.isfinite(self.half) and abs(self.mean) > self.half


def estimate(values: Sequence[float]) -> Estimate:
    """Raises UserError where scipy is missing and needed."""
    n = len(values)
    if n < 2:
        return Estimate(values[0] if n else math.nan, math.inf, n)
    try:
        from scipy.stats import t
    except ImportError:
        raise UserError("expected scipy for intervals, found none: pip install 'dsbert[experiment]'") from None
    half = float(t.ppf((1 + _LEVEL) / 2, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Estimate(statistics.fmean(values), half, n)
