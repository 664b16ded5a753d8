"""Heartbeats: which rank is where, so that survivors can say whose fault it was.

Every rank has one small file in <run>/heartbeats/<nonce>/, which it overwrites at each step and each change of phase,
and every few seconds from a thread. They lie on the shared file system and not in rank 0's store, so that rank 0 can be
the culprit, and they are still there when everybody is gone. Nobody reads them while all is well.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from dsbert.awake import AwakeClock
from dsbert.errors import EXIT_OK, EXIT_PEER, EXIT_REQUEUE
from dsbert.records import BeatRecord, read_record

# Beyond the time limit of a collective: then something else hangs.
_BEYOND_S = 8.0
_POLL_S = 0.05
_RECORD_BYTES = 1024
_COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")
LEAVING = "leaving"
# Whose file is older than that has no beat to wait for: clocks of machines differ by less.
_SILENT_S = 120.0


@dataclass(frozen=True)
class Culprit:
    """A rank at fault, where it was when it was last seen, and what is known of it."""

    rank: int
    host: str
    step: int | None
    phase: str | None
    how: str

    def __str__(self) -> str:
        where = f" in phase {self.phase!r}" if self.phase else ""
        return f"rank {self.rank} on {self.host} {self.how}, last seen at step {self.step}{where}"


class Heartbeat:
    """This rank's heartbeat, and a look at everybody's. `start` it; a thread does the rest.

    on_hang: called from a thread if this rank waits in one collective for longer than that may take, or, once it
    trains, makes no progress for still longer. (Before that, what takes long is building and loading.) Time for which
    the process was suspended does not count; gloo would count it, see `distributed.unlimit`.
    """

    def __init__(self, directory: Path, rank: int, hosts: list[str], timeout_s: float) -> None:
        self._directory, self._rank, self._hosts, self._timeout_s = directory, rank, hosts, timeout_s
        self.interval_s = min(5.0, max(0.25, timeout_s / 20))
        self.on_hang: Callable[[], None] = lambda: None
        self._file: int | None = None
        self._trains = False
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._progress = 0
        self._record: dict[str, Any] = {
            "rank": rank,
            "host": hosts[rank],
            "pid": os.getpid(),
            "place": _place(),
            "beat": 0,
            "step": 0,
            "progress": 0,
            "phase": "start",
            "saving": None,
            "ended": None,
            "interval_s": self.interval_s,
        }

    def start(self) -> None:
        """Begin to beat."""
        with suppress(OSError):
            self._file = os.open(self._path(self._rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._beat()
        threading.Thread(target=self._run, name="dsbert-heartbeat", daemon=True).start()
        # Apart from the beats, which stand still with their file system.
        threading.Thread(target=self._watch, name="dsbert-watchdog", daemon=True).start()

    def advance(self, step: int | None = None) -> None:
        """Progress was made: `step` optimizer steps are taken, or (None; not written) a piece of something longer."""
        self._progress += 1
        if step is not None:
            self._record["step"] = step
            self._beat()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What the rank is at, written at once: killed inside, it is known to have died there."""
        before = self._record["phase"]
        self._set(phase=name)
        try:
            yield
        finally:
            self._set(phase=before)

    def enter(self, name: str) -> None:
        """From now on the rank is at `name`."""
        self._trains = name == "train"
        self._set(phase=name)

    def leave(self) -> None:
        """A collective has failed: no progress, and nothing to be blamed for."""
        self._trains = False
        self._record["phase"] = LEAVING
        self._beat()

    def saving(self, activity: str | None) -> None:
        """What the checkpoint writer is at; for its threads, whose progress is not the rank's."""
        self._record["saving"] = activity
        self._beat()

    def end(self, code: int, cause: str | None = None) -> None:
        """The last beat: this rank leaves by itself, and is nobody's missing peer."""
        self._ended.set()
        self._set(ended={"code": code, "cause": cause and cause[:300]})
        if self._file is not None:
            with suppress(OSError):
                os.fdatasync(self._file)

    def culprits(self) -> list[Culprit]:
        """Who does not answer, after a look long enough for every living rank to have beaten; [] if all seem well.

        In this order: ranks that left with a failure of their own; whose process is gone or stopped, where that can be
        seen from here; whose beat stands still; the one that is furthest behind.
        """
        first = self._everybody()
        deadline = time.monotonic() + 2.2 * self.interval_s
        while True:
            now = self._everybody()
            found = [_failure(record) or _gone(record) for record in now.values()]
            known = [culprit for culprit in found if culprit]
            if known or time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        if known:
            return known
        missing = [
            Culprit(rank, host, None, None, "has not come as far as a heartbeat")
            for rank, host in enumerate(self._hosts)
            if rank not in now and rank != self._rank
        ]
        others = [record for rank, record in now.items() if rank != self._rank and not record["ended"]]
        silent = [
            _culprit(record, "does not answer")
            for record in others
            if record["beat"] == first.get(record["rank"], {}).get("beat")
        ]
        return missing + silent or self._furthest_behind(others)

    def _furthest_behind(self, others: list[dict[str, Any]]) -> list[Culprit]:
        own = self._record["step"], self._progress
        # Who has waited in a collective waited for a rank that has come as far as this one, and not into it.
        waited = self._record["phase"] == LEAVING
        places = {
            record["rank"]: (record["step"], record["progress"]) for record in others if record["phase"] != LEAVING
        }
        least = min((place for place in places.values() if place < own or (waited and place == own)), default=None)
        return [
            _culprit(record, "lives but does not go on")
            for record in others
            if least is not None and places.get(record["rank"]) == least
        ]

    def _everybody(self) -> dict[int, dict[str, Any]]:
        records = {}
        for rank in range(len(self._hosts)):
            if record := _read(self._path(rank)):
                records[rank] = record
        return records

    def _path(self, rank: int) -> Path:
        return self._directory / f"{rank:05d}.json"

    def _set(self, **changes: Any) -> None:
        self._record.update(changes)
        self._progress += 1
        self._beat()

    def _beat(self) -> None:
        with self._lock:
            self._record["beat"] += 1
            self._record["progress"] = self._progress
            data = json.dumps(self._record).encode().ljust(_RECORD_BYTES)
            if self._file is not None:
                with suppress(OSError):  # a full disk must not end a run that could go on
                    os.pwrite(self._file, data, 0)

    def _run(self) -> None:
        while not self._ended.wait(self.interval_s):
            self._beat()
            if self._file is not None:
                with suppress(OSError):  # other nodes see what has left this one's cache
                    os.fdatasync(self._file)

    def _watch(self) -> None:
        clock = AwakeClock(2 * self.interval_s)
        progress, waits, since = -1, None, {"progress": 0.0, "waits": 0.0}
        while not self._ended.wait(self.interval_s):
            now = clock.now()
            seen, frame = self._progress, _collective()
            if seen != progress or not self._trains:
                progress, since["progress"] = seen, now
            # The frame is kept, so that it is no other one in the same place.
            if frame is None or frame is not waits:
                waits, since["waits"] = frame, now
            if now - since["waits"] > self._timeout_s:
                self.leave()
            elif now - since["progress"] <= self._timeout_s + _BEYOND_S:
                continue
            self.on_hang()
            return


def _collective() -> FrameType | None:
    """The call of torch.distributed that some thread of this process is in, if there is one."""
    frames = sys._current_frames().values()
    return next((frame for frame in frames if frame.f_code.co_filename.endswith(_COLLECTIVES)), None)


def last_steps(directory: Path) -> dict[int, int]:
    """The last step that each rank was seen at; {} without heartbeats."""
    steps = {}
    for path in directory.glob("[0-9]*.json"):
        if record := _read(path):
            steps[int(record["rank"])] = int(record["step"])
    return steps


def living_rank(directory: Path) -> dict[str, Any] | None:
    """What a rank whose beat moves says of itself; None if none does, after a look as long as a beat may take.

    Ranks that have ended, or whose process is seen to be gone or stopped, need no look.
    """
    first: dict[Path, dict[str, Any]] = {}
    for path in sorted(directory.glob("[0-9]*.json")):
        with suppress(OSError):
            record = _read(path) if time.time() - path.stat().st_mtime < _SILENT_S else None
            if record and not record["ended"] and _gone(record) is None:
                first[path] = record
    interval_s = max((float(record.get("interval_s", 5.0)) for record in first.values()), default=0.0)
    deadline = time.monotonic() + 2.2 * interval_s
    while first and time.monotonic() < deadline:
        for path, record in list(first.items()):
            now = _read(path)
            if now is None or now["ended"] or _gone(now):
                del first[path]
            elif now["beat"] != record["beat"]:
                return now
        time.sleep(_POLL_S)
    return None


def _read(path: Path) -> dict[str, Any] | None:
    """A record; read again if its writer was in the middle of it."""
    for _ in range(3):
        with suppress(OSError, ValueError):
            return read_record(path, BeatRecord)
        time.sleep(0.001)
    return None


def _culprit(record: dict[str, Any], how: str) -> Culprit:
    return Culprit(record["rank"], record["host"], record["step"], record["phase"], how)


def _failure(record: dict[str, Any]) -> Culprit | None:
    """A rank that left with an error that was not a peer's."""
    ended = record["ended"]
    if ended is None or ended["code"] in (EXIT_OK, EXIT_PEER, EXIT_REQUEUE):
        return None
    return _culprit(record, f"failed with exit code {ended['code']} ({ended['cause']})")


def _gone(record: dict[str, Any]) -> Culprit | None:
    """A rank of this machine whose process is no more, or is stopped. (Elsewhere the beat tells, more slowly.)"""
    if record["ended"] or record["place"] is None or record["place"] != _place():
        return None
    try:
        state = Path(f"/proc/{record['pid']}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        state = "X"
    if state in "ZXx":
        return _culprit(record, "died")
    if state in "Tt":
        return _culprit(record, "was stopped")
    return None


def _place() -> str | None:
    """Machine and process namespace: within one, process numbers mean the same."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
