"""What heartbeats (health.py) say of ranks: who is alive, who is gone, and how it went."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from dsbert.base.errors import EXIT_OK, EXIT_PEER, EXIT_REQUEUE
from dsbert.base.records import Count, Number, Record, read_record

POLL_S = 0.05
# Whose file is older than that has no beat to wait for: clocks of machines differ by less, even where one of them takes
# its time zone for another.
_SILENT_S = 86400.0
# A process began in hundredths of a second, the machine in whole ones, which old kernels round either way.
_SAME_START_S = 2.0


class RankEnding(Record):
    """How a rank left: its exit code, and in at most 300 characters why."""

    code: int
    cause: str | None


class Beat(Record):
    """What a rank says of itself, in a file of its own.

    started_s: when its process began, in seconds since 1970; place: machine and process namespace, within which pid is
    unique; beat: counts what is written; step: optimizer
    steps taken; progress: counts these and pieces of something longer; saving: what its checkpoint writer is at;
    interval_s: how often it beats at least.
    """

    rank: Count
    host: str
    pid: Number
    started_s: float | None = None  # files of older versions lack it
    place: str | None
    beat: Count
    step: Count
    progress: Count
    phase: str
    saving: str | None = None
    ended: RankEnding | None
    interval_s: float = 5.0


@dataclass(frozen=True)
class Culprit:
    """A rank at fault, where it was when it was last seen, and what is known of it; code: with which it has left."""

    rank: int
    host: str
    step: int | None
    phase: str | None
    how: str
    code: int | None = None

    def __str__(self) -> str:
        where = f" in phase {self.phase!r}" if self.phase else ""
        return f"rank {self.rank} on {self.host} {self.how}, last seen at step {self.step}{where}"


@dataclass(frozen=True)
class SeenBeat:
    """A rank's heartbeat, and when its file was last written, in seconds since 1970 by the clock of the files."""

    beat: Beat
    time: float


def beats_in(directory: Path) -> list[SeenBeat]:
    """Of every rank of an attempt, by rank; none without heartbeats."""
    found = []
    with suppress(OSError):
        for path in directory.glob("[0-9]*.json"):
            with suppress(OSError):
                if record := read_beat(path):
                    found.append(SeenBeat(record, path.stat().st_mtime))
    return sorted(found, key=lambda seen: seen.beat.rank)


def living_rank(directory: Path) -> Beat | None:
    """What a rank whose beat moves says of itself; None if none does, after a look as long as a beat may take.

    Ranks that have ended, or whose process is seen to be gone or stopped, need no look.
    """
    first: dict[Path, Beat] = {}
    for path in sorted(directory.glob("[0-9]*.json")):
        with suppress(OSError):
            record = read_beat(path) if time.time() - path.stat().st_mtime < _SILENT_S else None
            if record and not record.ended and gone(record) is None:
                first[path] = record
    interval_s = max((record.interval_s for record in first.values()), default=0.0)
    deadline = time.monotonic() + 2.2 * interval_s
    while first and time.monotonic() < deadline:
        for path, record in list(first.items()):
            now = read_beat(path)
            if now is None or now.ended or gone(now):
                del first[path]
            elif now.beat != record.beat:
                return now
        time.sleep(POLL_S)
    return None


def read_beat(path: Path) -> Beat | None:
    """A record; read again if its writer was in the middle of it."""
    for _ in range(3):
        with suppress(OSError, ValueError):
            return read_record(path, Beat)
        time.sleep(0.001)
    return None


def culprit_of(record: Beat, how: str) -> Culprit:
    """The rank of a record, at fault for what `how` says."""
    return Culprit(record.rank, record.host, record.step, record.phase, how)


def failure_of(record: Beat) -> Culprit | None:
    """A rank that left with an error that was not a peer's."""
    ended = record.ended
    if ended is None or ended.code in (EXIT_OK, EXIT_PEER, EXIT_REQUEUE):
        return None
    how = f"failed with exit code {ended.code} ({ended.cause})"
    return Culprit(record.rank, record.host, record.step, record.phase, how, ended.code)


def gone(record: Beat) -> Culprit | None:
    """A rank of this machine whose process is no more, or is stopped. (Elsewhere the beat tells, more slowly.)"""
    if record.ended or record.place is None or record.place != own_place():
        return None
    try:
        process = psutil.Process(record.pid)
        state, started_s = process.status(), _started_s(process)
    except psutil.AccessDenied:
        return None
    except (psutil.Error, ValueError, OverflowError):  # the last two: no number that a process could have
        return culprit_of(record, "died")
    known_s = record.started_s
    if state in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) or (
        known_s is not None and abs(known_s - started_s) > _SAME_START_S
    ):
        return culprit_of(record, "died")
    if state in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
        return culprit_of(record, "was stopped")
    return None


def own_start_s() -> float | None:
    """When this process began, in seconds after the machine did: tells it from a later one with its number."""
    try:
        return _started_s(psutil.Process())
    except (psutil.Error, OSError, RuntimeError):
        return None


def _started_s(process: psutil.Process) -> float:
    """Both times are by the system's clock, so whoever sets it moves both."""
    return process.create_time() - psutil.boot_time()


def own_place() -> str | None:
    """Machine and process namespace: within one, process numbers mean the same."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
