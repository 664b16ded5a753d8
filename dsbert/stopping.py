"""Signals that ask a run to stop. A handler only sets a flag; the loop looks at it, and all ranks agree on it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dsbert.errors import EXIT_INTERRUPTED

_SAVE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """name: the signal that asked, or None."""

    name: str | None = None

    @property
    def wanted(self) -> bool:
        return self.name is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """TERM, USR1, USR2, HUP and the first INT set the flag; a second INT leaves at once with 130. Where HUP is ignored,
    as under nohup, it stays so."""
    request = StopRequest()

    def remember(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and request.name == "SIGINT":
            os._exit(EXIT_INTERRUPTED)
        request.name = signal.Signals(number).name

    heard = [n for n in _SAVE if not (n == signal.SIGHUP and signal.getsignal(n) == signal.SIG_IGN)]
    before = {number: signal.signal(number, remember) for number in heard}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
