"""Signals that ask a run to stop. A handler only sets a flag; the loop looks at it, and all ranks agree on it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from dsbert.base.errors import EXIT_INTERRUPTED
from dsbert.cluster.launcher import acknowledgement

_SAVE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """name: the signal that asked, or None. again: the command that goes on with the run, where this process is to
    acknowledge the first signal for all."""

    name: str | None = None
    again: str | None = None

    @property
    def requested(self) -> bool:
        """Of this rank."""
        return self.name is not None

    def agreed(self) -> bool:
        """Whether any rank was asked: the same answer on all. Collective."""
        import torch

        from dsbert.base.collectives import all_reduce

        return bool(all_reduce(torch.tensor([int(self.requested)])))


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """TERM, USR1, USR2, HUP and the first INT set the flag; a second INT leaves at once with 130. Where HUP is ignored,
    as under nohup, it stays so."""
    request = StopRequest()

    def remember(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and request.name == "SIGINT":
            os._exit(EXIT_INTERRUPTED)
        first, request.name = not request.requested, signal.Signals(number).name
        if first and request.again:
            with suppress(OSError):  # not print: the handler may have interrupted one
                os.write(2, f"dsbert: {acknowledgement(request.name, request.again)}\n".encode())

    heard = [n for n in _SAVE if not (n == signal.SIGHUP and signal.getsignal(n) == signal.SIG_IGN)]
    before = {number: signal.signal(number, remember) for number in heard}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
