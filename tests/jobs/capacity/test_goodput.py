"""Expected wall time and the best interval, against failures that are drawn one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dsbert.jobs.capacity.goodput import Failures


def drawn(failures: Failures, work_s: float, interval_s: float, seed: int) -> float:
    """Seconds of one run: failures at exponential times, work that is lost back to the newest save that counts."""
    rng = np.random.default_rng(seed)
    now = saved = 0.0
    counts_at: list[tuple[float, float]] = []  # when a save counts, and what it holds
    left = rng.exponential(failures.mtbf_s)
    done = 0.0
    while done < work_s:
        span = min(interval_s, work_s - done) + failures.save_s
        if left > span:
            now, left, done = now + span, left - span, done + min(interval_s, work_s - done)
            counts_at.append((now + failures.publish_s, done))
            continue
        now += left
        saved = max([saved, *(held for when, held in counts_at if when <= now)])
        counts_at, done = [], saved
        # Nothing fails while it starts again: Daly's restarts may, which makes a difference of (R/M)^2.
        now, left = now + failures.restart_s, rng.exponential(failures.mtbf_s)
    return now


@pytest.mark.parametrize(("save_s", "publish_s", "restart_s"), [(20.0, 0.0, 60.0), (2.0, 100.0, 60.0)])
def test_expected_wall_time_is_that_of_runs_that_are_drawn(save_s: float, publish_s: float, restart_s: float) -> None:
    failures = Failures(4000.0, restart_s, save_s, publish_s)
    work_s, interval_s = 40_000.0, 400.0
    found = np.array([drawn(failures, work_s, interval_s, seed) for seed in range(3000)])
    error = 3 * found.std() / math.sqrt(len(found))
    # The last save counts for nothing here, and restarts do not fail: half a percent.
    assert failures.wall_s(work_s, interval_s) == pytest.approx(found.mean(), abs=error + 0.005 * found.mean())
    assert failures.interruptions(float(found.mean())) == pytest.approx(10, rel=0.35)


@pytest.mark.parametrize("save_s", [0.5, 10.0, 300.0])
def test_dalys_interval_is_the_best_one(save_s: float) -> None:
    failures = Failures(20_000.0, 300.0, save_s, 0.0)
    intervals = np.geomspace(failures.young_s / 20, failures.young_s * 20, 4001)
    best = intervals[np.argmin([failures.wall_s(1e6, interval) for interval in intervals])]
    assert failures.daly_s == pytest.approx(best, rel=0.01)
    assert failures.daly_s < failures.young_s


def test_without_failures_only_saves_cost() -> None:
    failures = Failures(math.inf, 300.0, 2.0, 10.0)
    assert failures.wall_s(1000.0, 100.0) == pytest.approx(1020.0)
    assert failures.interruptions(1020.0) == 0
    assert math.isinf(failures.daly_s)


def test_failures_that_leave_no_time_for_a_save() -> None:
    assert math.isinf(Failures(1.0, 1.0, 1.0, 0.0).wall_s(1e6, 1e4))
