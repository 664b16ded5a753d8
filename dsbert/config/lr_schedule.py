"""The learning rate of every step: a function of the step alone, so that a resumed run needs no state of it."""

from __future__ import annotations

import math

from dsbert.config.sections import OptimConfig


def learning_rate(optim: OptimConfig, peak: float, step: int) -> float:
    """The rate of optimizer step `step` = 1..total_steps: linear warm-up to the peak, then by optim.schedule.

    linear (paper) and cosine would reach 0 one step after the last, so that no step is taken in vain; wsd (warm-up,
    stable, decay; Hu et al. 2024, arXiv 2404.06395) stays at the peak until the last `num_decay_steps`, where it falls
    linearly in the same way.
    """
    if step <= optim.warmup_steps:
        return peak * step / optim.warmup_steps
    left, after_warmup = optim.total_steps - step + 1, optim.total_steps - optim.warmup_steps + 1
    if optim.schedule == "wsd":
        return peak * min(left, optim.num_decay_steps + 1) / (optim.num_decay_steps + 1)
    if optim.schedule == "cosine":
        return peak * 0.5 * (1.0 - math.cos(math.pi * left / after_warmup))
    return peak * left / after_warmup
