"""The cores that this process may use."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Those that this process may run on: a job's share, where the system says so, not the whole machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
