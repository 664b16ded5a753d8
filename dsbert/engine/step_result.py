"""What a step of the global batch has come to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class StepResult:
    """Sums over the global batch, equal on all ranks. losses: summed cross-entropy of each objective (float64, CPU);
    counts: predictions asked for by each; tokens: of its samples; positions: what the layers have computed, which is
    more where there was padding among it; pairs: of a query and a key that saw each other, over all layers; stop: some
    rank asked to stop; busy: some rank's checkpoint writer is at work.

    skipped: a loss or a gradient was not finite, and nothing has moved; rescaled: the losses were finite, and the loss
    scale of fp16 falls for it. nonfinite_ranks: the ranks whose own losses or
    own gradients were not; empty if only the sum over ranks was not.
    own_times: int64 [ranks, own_time.PHASES and 1], of the step before: microseconds that each rank has worked itself,
    and whether its checkpoint writer was at work; zeros where there was no step before.
    """

    losses: Tensor
    counts: tuple[int, ...]
    tokens: int
    positions: int
    pairs: int
    grad_norm: float
    lr: float
    stop: bool
    busy: bool = False
    skipped: bool = False
    rescaled: bool = False
    nonfinite_ranks: tuple[int, ...] = ()
    own_times: Tensor | None = None

    def mean_losses(self) -> tuple[float, ...]:
        """Of each objective, per prediction; 0 where none was asked for."""
        return tuple(loss / max(count, 1) for loss, count in zip(self.losses.tolist(), self.counts, strict=True))
