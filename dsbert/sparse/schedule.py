"""When a mask update happens, and how many blocks it prunes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsbert.sparse.config import SparsityConfig


@dataclass(frozen=True)
class UpdateSchedule:
    """n - 1 updates over `total_steps` T: update u = 1..n-1 at step round(u T / n) (paper, algorithm 1).

    begin, end: the same within a part of the run, as fractions of T. The prune ratio decays from `max_prune_ratio` to 0
    as a half cosine over that part, or is constant. Raises ValueError where two updates would fall on one step.
    """

    total_steps: int
    num_updates: int
    max_prune_ratio: float
    kind: str = "cosine"
    begin: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "constant"):
            raise ValueError(f"expected a schedule cosine or constant, found {self.kind!r}")
        most = int(self._steps)
        if not 1 <= self.num_updates <= most:
            raise ValueError(f"expected 1 to {most} pattern updates, found {self.num_updates}")
        # Possible only where the part begins within the run: halves are rounded to even steps.
        if self.begin and len({self.step_of(number) for number in range(1, self.num_updates)}) < self.num_updates - 1:
            raise ValueError(f"expected fewer than {self.num_updates} pattern updates, found two of them on one step")

    @classmethod
    def of(cls, config: SparsityConfig, total_steps: int) -> UpdateSchedule:
        """That of a run. Raises ValueError for more updates than steps."""
        window = (config.update_from, config.update_until)
        count = config.num_updates
        if config.update_every_steps is not None:
            count = max(1, round((window[1] - window[0]) * total_steps / config.update_every_steps))
        return cls(total_steps, count, config.max_prune_ratio, config.schedule, *window)

    @property
    def _steps(self) -> float:
        """Of the part of the run in which updates fall."""
        return (self.end - self.begin) * self.total_steps

    def update_number(self, step: int) -> int | None:
        """u if update u happens after `step` optimizer steps, else None."""
        u = round((step - self.begin * self.total_steps) * self.num_updates / self._steps)  # the only one, since n <= T
        return u if 1 <= u < self.num_updates and self.step_of(u) == step else None

    def step_of(self, number: int) -> int:
        """The step after which update `number` happens."""
        return round(self.begin * self.total_steps + number * self._steps / self.num_updates)

    def is_update_step(self, step: int) -> bool:
        return self.update_number(step) is not None

    def prune_ratio(self, step: int) -> float:
        """pr(t): the share of the active blocks that an update at `step` prunes."""
        if self.kind == "constant":
            return self.max_prune_ratio
        passed = (step - self.begin * self.total_steps) / self._steps
        return 0.5 * self.max_prune_ratio * (1 + math.cos(math.pi * passed))

    def num_pruned(self, step: int, num_active: int) -> int:
        """Blocks of `num_active` that an update at `step` prunes."""
        return round(self.prune_ratio(step) * num_active)
