"""When a mask update happens, and how many blocks it prunes."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class UpdateSchedule:
    """n - 1 updates over `total_steps` T: update u = 1..n-1 at step round(u T / n) (paper, algorithm 1).

    The prune ratio decays from `max_prune_ratio` to 0 as a half cosine over the run, or is constant.
    Raises ValueError where two updates would fall on one step.
    """

    total_steps: int
    num_updates: int
    max_prune_ratio: float
    kind: str = "cosine"

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "constant"):
            raise ValueError(f"expected a schedule cosine or constant, found {self.kind!r}")
        if not 1 <= self.num_updates <= self.total_steps:
            raise ValueError(f"expected 1 to {self.total_steps} pattern updates, found {self.num_updates}")

    def update_number(self, step: int) -> int | None:
        """u if update u happens after `step` optimizer steps, else None."""
        u = round(step * self.num_updates / self.total_steps)  # the only candidate, since n <= T
        return u if 1 <= u < self.num_updates and self.step_of(u) == step else None

    def step_of(self, number: int) -> int:
        """The step after which update `number` happens."""
        return round(number * self.total_steps / self.num_updates)

    def is_update_step(self, step: int) -> bool:
        return self.update_number(step) is not None

    def prune_ratio(self, step: int) -> float:
        """pr(t): the share of the active blocks that an update at `step` prunes."""
        if self.kind == "constant":
            return self.max_prune_ratio
        return 0.5 * self.max_prune_ratio * (1 + math.cos(math.pi * step / self.total_steps))

    def num_pruned(self, step: int, num_active: int) -> int:
        """Blocks of `num_active` that an update at `step` prunes."""
        return round(self.prune_ratio(step) * num_active)
