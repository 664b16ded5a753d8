"""The short form of tools/chaos.py: its kills are real, its ranks are forked so that each start is cheap."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from dsbert.base.errors import combine_exit_codes
from tests.faults import unlucky_dsbert
from tests.helpers import started
from tools.chaos import RECIPE, Chaos


class Forked:
    """Ranks without a launcher."""

    def __init__(self, words: list[str], ranks: int, log: Path) -> None:
        self._log, self._context = log, ExitStack()
        self._ranks = self._context.enter_context(
            started(unlucky_dsbert, ranks, {"words": words, "faults": [], "record": None})
        )

    def pids(self) -> list[int]:
        return [rank.process.pid for rank in self._ranks if rank.exitcode is None and rank.process.pid]

    def poll(self) -> int | None:
        codes = [rank.exitcode for rank in self._ranks]
        if None in codes:
            return None
        with self._log.open("a") as log:
            log.writelines(rank.output for rank in self._ranks)
        self._context.close()
        return combine_exit_codes([code for code in codes if code is not None])

    def said_bytes(self) -> int:
        return sum(len(rank.output) for rank in self._ranks)


@pytest.mark.slow
def test_a_run_that_is_killed_in_every_phase_ends_as_if_it_was_not(data: Path, tmp_path: Path) -> None:
    words = ["pretrain", "demo", "--timeout", "10", f"data.path={data}", *RECIPE, "optim.total_steps=60"]
    quotas = {"between": 1, "save": 1, "update": 1, "evaluate": 1, "start": 1}
    report = Chaos(words, tmp_path, 3, 2, Forked).run(6, quotas)
    assert report.kills == sum(report.kills_by_phase.values()) == sum(report.signals.values()) == 6
    assert {"save", "start"} <= report.kills_by_phase.keys(), report
    assert report.identical, report
    assert (report.torn_latest, report.resumed_from_scratch) == (0, 0), report
