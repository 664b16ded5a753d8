"""Time for which a whole job stood still is no hang."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.faults import fault, final_files, status, unlucky_dsbert, wait_for, words_of
from tests.helpers import Rank, started

TIMEOUT_S = 5.0
# Where, at which step, and for how long: beyond the limit of a collective, and once beyond the watchdog's.
STOPS = (("start", 0, 7.0), ("step", 4, 15.0), ("write", 6, 7.0), ("evaluate", 9, 7.0))


def suspend(ranks: list[Rank], seconds: float) -> None:
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in ranks:
            os.kill(rank.process.pid or 0, number)
        if number == signal.SIGSTOP:
            time.sleep(seconds)  # not to wait for anything: this is what is tested


@pytest.mark.slow
def test_a_suspended_job_goes_on(run: Path, data: Path, tmp_path: Path) -> None:
    """One rank lingers, so that the other one waits for it in a collective, and both are stopped."""
    words, lingers = words_of(tmp_path / "run", data), tmp_path / "lingers"
    words[words.index("--timeout") + 1] = str(TIMEOUT_S)
    faults = [fault(where, "linger", rank=1, step=step) for where, step, _ in STOPS]
    args = {"words": words, "faults": faults, "record": None}
    lingers.touch()
    with started(unlucky_dsbert, 2, args, env={"DSBERT_TEST_LINGERS": str(lingers)}) as ranks:
        for number, (where, _, seconds) in enumerate(STOPS, start=1):
            deadline = time.monotonic() + 60
            while lingers.read_text().count("\n") < number:
                assert all(rank.exitcode is None for rank in ranks), f"before {where}: {ranks[0].output}"
                assert time.monotonic() < deadline, f"waited in vain for {where}"
                time.sleep(0.01)
            suspend(ranks, seconds)
        ended = wait_for(ranks, set(), 60)
    assert [rank.code for rank in ended] == [0, 0], ended[0].stderr
    assert status(tmp_path / "run")["outcome"] == "done"
    assert final_files(tmp_path / "run") == final_files(run)


def test_the_watchdog_does_not_count_time_that_was_slept_away(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsbert.base import awake

    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = awake.AwakeClock(longest_s=2.0)
    for elapsed, expected in ((1.5, 1.5), (1000.0, 3.5), (2.0, 5.5), (0.0, 5.5)):
        now += elapsed
        assert clock.now() == expected
