"""Runs looked at again and again, on a terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from dsbert.monitoring.run_status import RunStatus, read_status
from dsbert.monitoring.status_lines import status_lines, status_table

_OVER = ("done", "failed", "killed")


def watch_runs(paths: Sequence[Path], every_s: float) -> None:
    """Until all are over, or Ctrl-C. Where standard output is no terminal, one look after the other is printed.

    Raises UserError where one of the paths is no run."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False)
    found = [read_status(path) for path in paths]
    try:
        with Live(Text(_shown(found)), console=console, auto_refresh=False, vertical_overflow="crop") as live:
            while not all(one.standing.state in _OVER for one in found):
                time.sleep(every_s)
                found = [read_status(path) for path in paths]
                if console.is_terminal:
                    live.update(Text(_shown(found)), refresh=True)
                else:
                    print(_shown(found), flush=True)
    except KeyboardInterrupt:
        return


def _shown(found: Sequence[RunStatus]) -> str:
    if len(found) == 1:
        return "\n".join(status_lines(found[0]))
    return status_table(found)
