"""The attempts of a run, one after the other: how each ended, what was lost with it, and what the time went into.

Goodput is the share of the time since the first start that went into steps which count: those that were not taken
again.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass

from dsbert.monitoring.run_files import RunFiles, first_step
from dsbert.training.attempts import Attempt, Ending


@dataclass(frozen=True)
class Stretch:
    """One attempt. Times in seconds since 1970, None where nobody knows; ended: None while it goes on. job_id: as
    squeue shows it.

    first_step, last_step: after how many steps it began, and how far it was seen. lost_steps: how many of these the
    next one took again. outcome: done | requeue | failed, None where it did not say.
    """

    number: int
    job_id: str | None
    ranks: int | None
    started: float | None
    ended: float | None
    first_step: int
    last_step: int | None
    lost_steps: int
    outcome: str | None
    cause: str | None


@dataclass(frozen=True)
class Spending:
    """Seconds since the first start. steps: of those that count, waiting for data included; lost: of those taken again;
    down: between attempts; other: starting, loading, leaving."""

    total: float
    steps: float
    evaluation: float
    saves: float
    lost: float
    down: float

    @property
    def other(self) -> float:
        return max(0.0, self.total - self.steps - self.evaluation - self.saves - self.lost - self.down)

    @property
    def goodput(self) -> float:
        """0 to 1."""
        return min(1.0, self.steps / self.total) if self.total > 0 else 0.0


def stretches(files: RunFiles, at_work: bool) -> list[Stretch]:
    """Oldest first. at_work: whether the newest goes on."""
    found = []
    for number, attempt in enumerate(files.attempts):
        after = files.attempts[number + 1] if number + 1 < len(files.attempts) else None
        ending = after.previous if after else files.ended.ending if files.ended else None
        last = ending.step if ending else None
        if after is None and ending is None:
            seen = [seen.beat.step for seen in files.beats] + [int(one["step"]) for one in files.metrics.recent[-1:]]
            last = max(seen, default=None)
        lost = max(0, (last or 0) - first_step(after)) if after else 0
        found.append(
            Stretch(
                number=attempt.number,
                job_id=attempt.job,
                ranks=attempt.world_size,
                started=attempt.started,
                ended=_end(files, ending, after, at_work),
                first_step=first_step(attempt),
                last_step=last,
                lost_steps=lost,
                outcome=ending.outcome if ending else None,
                cause=ending.cause if ending else None,
            )
        )
    return found


def spending(files: RunFiles, found: list[Stretch]) -> Spending:
    """Up to the end of the newest attempt, or until now where it goes on."""
    starts = [one.started for one in found if one.started is not None]
    ends = [one.ended for one in found if one.ended is not None]
    over = bool(found) and found[-1].ended is not None
    total = ((max(ends) if over and ends else files.now) - min(starts)) if starts else 0.0
    down = 0.0
    for one, after in itertools.pairwise(found):
        if one.ended is not None and after.started is not None:
            down += max(0.0, after.started - one.ended)
    lost = sum(one.lost_steps for one in found) * (step_seconds(files) or 0.0)
    sums = files.metrics
    return Spending(max(total, 0.0), sums.steps_s, sums.evaluation_s, sums.saves_s, lost, down)


def step_seconds(files: RunFiles) -> float | None:
    """Of one step: the median of the last records."""
    recent = [value for record in files.metrics.recent if (value := record.get("step_s", 0.0)) > 0]
    return statistics.median(recent) if recent else None


def _end(files: RunFiles, ending: Ending | None, after: Attempt | None, at_work: bool) -> float | None:
    """When an attempt ended; of one that is gone without a word, when it was seen last."""
    if ending is not None and ending.time is not None:
        return ending.time
    if after is not None:
        return after.started
    if ending is None and at_work:
        return None
    started = (files.attempt.started if files.attempt else None) or 0.0
    times = [seen.time for seen in files.beats] + [files.metrics.last.get("time", 0.0)]
    return max([one for one in times if one and one >= started], default=started or None)
