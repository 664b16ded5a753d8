"""Runs looked at again and again."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from dsbert.monitoring.run_status import RunStatus, read_run
from dsbert.monitoring.status_lines import status_lines, status_table
from dsbert.monitoring.step_records import StepLog


def watch_runs(paths: Sequence[Path], every_s: float) -> None:
    """Until nothing more happens to any of them by itself, or Ctrl-C. Where standard output is no terminal, one look
    after the other is printed.

    Raises UserError where one of the paths is no run."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False)
    with suppress(KeyboardInterrupt):
        if not console.is_terminal:
            for text in _looks(paths, every_s):
                print(text, flush=True)
            return
        looks = _looks(paths, every_s)
        with Live(Text(next(looks)), console=console, auto_refresh=False, vertical_overflow="crop") as live:
            for text in looks:
                live.update(Text(text), refresh=True)


def _looks(paths: Sequence[Path], every_s: float) -> Iterator[str]:
    logs = [StepLog(path) for path in paths]
    while True:
        found = [read_run(path, log)[1] for path, log in zip(paths, logs, strict=True)]
        yield _shown(found)
        if all(one.standing.over for one in found):
            return
        time.sleep(every_s)


def _shown(found: Sequence[RunStatus]) -> str:
    return "\n".join(status_lines(found[0])) if len(found) == 1 else status_table(found)
