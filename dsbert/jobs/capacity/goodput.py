"""What failures cost, and how often to save: Young 1974 and Daly 2006 (doi:10.1016/j.future.2004.11.016).

The job fails at random, on average every M seconds, and is then R seconds without steps. A save holds training up for
delta seconds, every tau seconds of work. Here a save is written in the background and counts once it is published, L
seconds later: a failure in between costs one interval more, on average L seconds each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Failures:
    """mtbf_s: M, mean seconds between failures of the whole job, inf for none. restart_s: R, from a failure to the next
    step. save_s: delta, how long a save holds training up. publish_s: L, until a save counts."""

    mtbf_s: float
    restart_s: float
    save_s: float
    publish_s: float

    def wall_s(self, work_s: float, interval_s: float) -> float:
        """Expected seconds until `work_s` seconds of steps are done, saved every `interval_s` of them (Daly, eq. 20):
        M e^(R/M) (e^((tau + delta)/M) - 1) work/tau, with R + L for R."""
        count = work_s / interval_s
        if math.isinf(self.mtbf_s):
            return work_s + count * self.save_s
        lost = (self.restart_s + self.publish_s) / self.mtbf_s
        span = (interval_s + self.save_s) / self.mtbf_s
        if lost + span > _HOPELESS:
            return math.inf
        return self.mtbf_s * math.exp(lost) * math.expm1(span) * count

    def interruptions(self, wall_s: float) -> float:
        """Expected, in so many seconds."""
        return 0.0 if math.isinf(self.mtbf_s) else wall_s / self.mtbf_s

    @property
    def young_s(self) -> float:
        """Young's interval: sqrt(2 delta M)."""
        return math.sqrt(2 * self.save_s * self.mtbf_s)

    @property
    def daly_s(self) -> float:
        """Daly's interval (eq. 37): sqrt(2 delta M) (1 + sqrt(delta/2M)/3 + (delta/2M)/9) - delta where delta < 2 M,
        else M."""
        if math.isinf(self.mtbf_s):
            return math.inf
        share = self.save_s / (2 * self.mtbf_s)
        if share >= 1:
            return self.mtbf_s
        return self.young_s * (1 + math.sqrt(share) / 3 + share / 9) - self.save_s


_HOPELESS = 700.0  # e to the power of more is no float: failures come faster than steps
