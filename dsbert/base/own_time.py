"""How long a rank works itself: a clock that stands still while it waits for other ranks, or for a core.

Ranks meet several times a step, so that all take as long as the slowest: only without its waits is it known which rank
that is. Time in which the thread could run and other processes had its core (Linux counts it) is left out as well: on a
machine with more work than cores it falls now on this rank and now on that, and is no rank's own.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# What the time of a step is told apart into; `other` is what remains: optimizer, mask updates, records, checkpoints.
PHASES = ("data", "compute", "other")

_local = threading.local()
_waited_s = 0.0


def own_time_s() -> float:
    """Seconds by this clock; only differences between two looks from one thread mean anything."""
    return _unqueued_s() - _waited_s


@contextmanager
def waiting() -> Iterator[None]:
    """Inside, the clock stands still: this thread waits for other ranks."""
    global _waited_s
    start = _unqueued_s()
    try:
        yield
    finally:
        _waited_s += _unqueued_s() - start


def counted_as_waiting(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A collective that stops the clock; where it returns a handle, waiting for that stops it, too."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        with waiting():
            found = collective(*args, **kwargs)
        return _Handle(found) if hasattr(found, "wait") else found

    return timed


class OwnClock:
    """A rank's own time by phase, from step to step."""

    def __init__(self) -> None:
        self._phases: dict[str, float] = {}
        self._since: float | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done inside counts as this phase, one of PHASES."""
        start = own_time_s()
        try:
            yield
        finally:
            self._phases[name] = self._phases.get(name, 0.0) + own_time_s() - start

    def lap(self) -> list[float]:
        """Seconds of each of PHASES since the last call; zeros at the first one, before which nothing was a step."""
        now = own_time_s()
        since, self._since = self._since, now
        phases, self._phases = self._phases, {}
        if since is None:
            return [0.0] * len(PHASES)
        phases["other"] = now - since - sum(phases.values())
        return [max(0.0, phases.get(name, 0.0)) for name in PHASES]


class _Handle:
    """Of a collective that is under way."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def wait(self, *args: Any) -> Any:
        with waiting():
            return self._handle.wait(*args)


def _unqueued_s() -> float:
    """Seconds without those in which this thread was ready and had no core. (The second number of schedstat, in
    nanoseconds; where the system does not count them, they are none.)"""
    if not hasattr(_local, "schedstat"):
        try:
            _local.schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            _local.schedstat = None
    now = time.perf_counter()
    if _local.schedstat is None:
        return now
    return now - int(os.pread(_local.schedstat, 64, 0).split()[1]) * 1e-9
