"""Stragglers: ranks that are slower than the others for long, found in every rank's own time of each step.

All ranks of a job wait for its slowest. Own times (base/own_time.py) do not contain that waiting, so that they differ.
W samples of a window, R ranks, P phases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsbert.base.own_time import PHASES

WINDOW_STEPS = 20
# Slow by the median of the window, and not much faster than that in nearly all of its steps: what disturbs a rank now
# and then is no reason to see to its machine.
_SLOW, _NEARLY_SLOW, _MOST_STEPS = 1.2, 1.1, 18
_LEAST_S = 0.01  # a step: below that, it is the system's noise
_CAUSES = {
    "data": "waits for its data",
    "compute": "computes more slowly",
    "save": "while it writes a checkpoint",
    "other": "between forward passes: optimizer, mask updates, records",
}

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Straggler:
    """A rank that is slow. own_s, median_s: its own time a step and the median rank's among those with as much to do,
    both medians over the window; ratio: of both; cause: data, compute, save or other."""

    rank: int
    host: str
    ratio: float
    own_s: float
    median_s: float
    cause: str

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on {self.host} is a straggler: {self.own_s:.3g} s of its own a step, "
            f"{self.ratio - 1:.0%} more than the median rank's {self.median_s:.3g} s, over {WINDOW_STEPS} steps; "
            f"cause: {self.cause} ({_CAUSES[self.cause]})"
        )


class StragglerWatch:
    """Told every rank's own time of each step, it names who is slow: once, until that rank keeps up again.

    hosts: by rank; samples: that each rank computes a step. A rank is compared with those that have at least as much to
    do, by the lower one of two medians.
    """

    def __init__(self, hosts: Sequence[str], samples: Sequence[int]) -> None:
        self._hosts = hosts
        work = np.array(samples)
        # Who has as much to do is compared with the same others: [R] for each amount of work, of which there are two.
        self._peers = {int(amount): work >= amount for amount in np.unique(work)}
        self._work = work
        self._window: list[NDArray[np.int64]] = []
        self._named: set[int] = set()
        self.slowest: Straggler | None = None  # of the last full window, and whether or not it is slow enough to name

    def add(self, times: NDArray[np.int64]) -> list[str]:
        """times: int64 [R, P + 1] of one step, as in StepResult. Returns lines for people: who has become a straggler,
        and who is none any more."""
        if len(self._hosts) == 1 or not times.any():
            return []
        self._window = [*self._window[1 - WINDOW_STEPS :], times]
        if len(self._window) < WINDOW_STEPS:
            return []
        phases: Floats = np.stack(self._window)[:, :, : len(PHASES)] * 1e-6  # [W, R, P]
        own = phases.sum(2)
        peers = np.empty_like(own)  # [W, R]
        for amount, mask in self._peers.items():
            peers[:, self._work == amount] = _lower_median(own[:, mask])[:, None]
        ratios: Floats = own / np.maximum(peers, 1e-9)
        found = np.median(ratios, 0)
        slowest = int(found.argmax())
        self.slowest = self._describe(slowest, phases, ratios, peers)
        late = np.median(own - peers, 0) >= _LEAST_S
        slow = (found >= _SLOW) & ((ratios >= _NEARLY_SLOW).sum(0) >= _MOST_STEPS) & late
        lines = []
        for rank in np.flatnonzero(slow).tolist():
            if rank not in self._named:
                self._named.add(rank)
                lines.append(str(self._describe(rank, phases, ratios, peers)))
        for rank in sorted(self._named):
            if found[rank] < _NEARLY_SLOW:
                self._named.discard(rank)
                lines.append(f"rank {rank} on {self._hosts[rank]} is no straggler any more")
        return lines

    def record(self) -> dict[str, float | int | str | None]:
        """For metrics.jsonl. own_s: the median rank's own time a step over the last window; slowest_rank: its number,
        slowest_own_s, slowest_ratio, slowest_cause: of the rank that is slowest beside those with as much to do;
        stragglers: ranks that count as such now, None where there are none."""
        one = self.slowest
        return {
            "own_s": one.median_s if one else None,
            "slowest_rank": one.rank if one else None,
            "slowest_own_s": one.own_s if one else None,
            "slowest_ratio": one.ratio if one else None,
            "slowest_cause": one.cause if one else None,
            "stragglers": ",".join(map(str, sorted(self._named))) or None,
        }

    def _describe(self, rank: int, phases: Floats, ratios: Floats, peers: Floats) -> Straggler:
        mine = phases[:, rank]
        mask = self._peers[int(self._work[rank])]
        others = np.stack([_lower_median(phases[:, mask, phase]) for phase in range(len(PHASES))], 1)
        cause = PHASES[int(np.median(mine - others, 0).argmax())]
        writing = np.median([times[rank, len(PHASES)] for times in self._window]) > 0
        if writing and cause != "data":
            cause = "save"
        ratio, own = float(np.median(ratios[:, rank])), float(np.median(mine.sum(1)))
        return Straggler(rank, self._hosts[rank], ratio, own, float(np.median(peers[:, rank])), cause)


def _lower_median(values: Floats) -> Floats:
    """[W, n] -> [W]: of an even number the lower one of both in the middle, so that of two ranks it is the other's."""
    middle = (values.shape[1] - 1) // 2
    found: Floats = np.partition(values, middle, 1)[:, middle]
    return found
