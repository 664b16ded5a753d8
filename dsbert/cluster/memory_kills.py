"""Whether the kernel's memory killer was at work: it says nothing to the one that it kills, nor to its parent."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def memory_kills() -> int:
    """How often the kernel has killed for memory: in this process's control group, or else on the whole machine; 0
    where it does not say."""
    group = ""
    with suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        group = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "")
    for path in (Path(f"/sys/fs/cgroup{group}/memory.events"), Path("/proc/vmstat")):
        with suppress(OSError, ValueError):
            counters = dict(line.split(maxsplit=1) for line in path.read_text().splitlines())
            if "oom_kill" in counters:
                return int(counters["oom_kill"])
    return 0


def why_killed(kills_before: int, less_memory: str) -> str:
    """The end of a line about a process that died of a KILL which is not ours. less_memory: what to do about it."""
    advice = f": {less_memory}" if less_memory else ""
    if memory_kills() > kills_before:
        return f" by the kernel, which had no memory left{advice}"
    return f", which the kernel sends where memory runs out, if nobody else did{advice}"
