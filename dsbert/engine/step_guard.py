"""One rule for a loss or a gradient that is not finite, at every ZeRO stage: the step is skipped on all ranks.

The ranks agree after backward and before anything moves. A skipped step goes its usual way through DeepSpeed, which
counts it and frees its buffers, but with gradients of zero and an inner optimizer that is held still: each copy of the
weights is then written from masters that have not moved. So the rule needs nothing of DeepSpeed's own checks, which
differ by stage and precision; in fp16 they are left to see the overflow, for the loss scaler must adapt to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsbert.base.collectives import gather, sum_of_rows
from dsbert.cluster.process_group import World
from dsbert.engine.zero_shards import (
    full_shape,
    gradients_are_partitioned,
    inner_optimizer,
    loss_scale,
    reduced_gradients,
)

# DeepSpeed's norms are fp32, and a step whose norm overflows there is one that it refuses.
_MAX_SQUARE = torch.finfo(torch.float32).max


@dataclass(frozen=True, eq=False)
class Verdict:
    """Equal on all ranks. losses: of each objective, summed over the global batch, float64 on the CPU; grad_norm: of
    the global gradient before clipping; nonfinite_ranks: those whose own losses, or own gradients of matrices, were not
    finite. The tuple is empty if only the sum over ranks is not finite, or only the gradient of a bias or LayerNorm."""

    finite: bool
    nonfinite_ranks: tuple[int, ...]
    grad_norm: float
    losses: Tensor


class StepGuard:
    """Watches what every rank adds to the gradient, and takes the step that must move nothing.

    engine: DeepSpeed's; scaled: its loss scaler must see an overflow itself (fp16).
    """

    def __init__(self, engine: Any, parameters: Iterable[nn.Parameter], world: World, *, scaled: bool) -> None:
        self._engine, self._world, self._scaled = engine, world, scaled
        self._contributions: list[Tensor] = []
        self._held = self._paused = False
        # Only to name a rank. Matrices are enough: what flows back through the layers shows in theirs.
        for param in parameters:
            if len(full_shape(param)) > 1:
                param.register_hook(self._note)
        inner_optimizer(engine).register_step_pre_hook(self._hold)

    def verdict(self, losses: Tensor) -> Verdict:
        """After the last backward of a step. losses: this rank's sums, float64 [objectives] on the device. Collective:
        log2(ranks) small messages between CPUs, after the only wait for the device."""
        own = torch.stack(self._contributions).sum(dtype=torch.float64)
        self._contributions.clear()
        squares = self._squared_norm()
        values = torch.cat([torch.stack([own, squares]), losses]).cpu()
        mine = torch.cat([torch.zeros(1, dtype=torch.float64), values[1:]])
        mine[0] = not bool(values[0].isfinite() & values[2:].isfinite().all())
        if not gradients_are_partitioned(self._engine):
            mine[1] /= self._world.world_size
        everybody = gather(mine)
        bad = tuple(everybody[:, 0].nonzero().flatten().tolist())
        sums = sum_of_rows(everybody[:, 1:])
        total = float(sums[0])
        finite = not bad and total <= _MAX_SQUARE  # False for NaN
        return Verdict(finite, bad, math.sqrt(total) / loss_scale(self._engine), sums[1:])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is computed inside is added to no gradient, and not looked at."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    @torch.no_grad()
    def skip(self) -> None:
        """Take the step of DeepSpeed's that moves no weight, no moment and not Adam's step count, and that leaves
        nothing of this step's gradients behind."""
        skipped_steps = self._engine.skipped_steps
        if not self._scaled:
            for gradient in reduced_gradients(self._engine):
                gradient.zero_()
        self._held = True
        try:
            self._engine.step()
        finally:
            self._held = False
        self._engine.skipped_steps = skipped_steps + 1

    def _note(self, gradient: Tensor) -> None:
        """What a micro-batch of this rank adds to a parameter's gradient, before other ranks' shares reach it. The sum
        is finite if all of it is (fp16 lacks the range for that), and is the cheapest such number."""
        if self._paused:
            return
        self._contributions.append(gradient.sum(dtype=torch.float32 if gradient.dtype == torch.float16 else None))

    def _hold(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """torch's optimizers leave alone what has no gradient: weight, moments and step count."""
        if self._held:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad = None

    def _squared_norm(self) -> Tensor:
        """Of the part of the global gradient that this rank holds: float64 [], on the device."""
        norms = [torch.linalg.vector_norm(part, dtype=torch.float32) for part in reduced_gradients(self._engine)]
        if not norms:
            return torch.zeros((), dtype=torch.float64, device=self._world.device)
        return torch.stack(norms).double().square().sum()
