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
from pathlib import Path
from types import FrameType

from dsbert.base.awake import AwakeClock
from dsbert.base.exchange import waits_for_a_peer
from dsbert.cluster.heartbeats import (
    POLL_S,
    Beat,
    Culprit,
    RankEnding,
    culprit_of,
    failure_of,
    gone,
    own_place,
    own_start_s,
    read_beat,
)

# Beyond the time limit of a collective: then something else hangs.
_BEYOND_S = 8.0
_RECORD_BYTES = 1024
_COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")
LEAVING = "leaving"


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
        self._changing, self._writing = threading.Lock(), threading.Lock()
        self._ended = threading.Event()
        self._progress = 0
        self._last = Beat(
            rank=rank, host=hosts[rank], pid=os.getpid(), started_s=own_start_s(), place=own_place(), beat=0, step=0,
            progress=0, phase="start", saving=None, ended=None, interval_s=self.interval_s,
        )  # fmt: skip

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
            self._beat(step=step)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What the rank is at, written at once: killed inside, it is known to have died there."""
        before = self._last.phase
        self._enter(name)
        try:
            yield
        finally:
            self._enter(before)

    def enter(self, name: str) -> None:
        """From now on the rank is at `name`."""
        self._trains = name == "train"
        self._enter(name)

    def leave(self) -> None:
        """A collective has failed: no progress, and nothing to be blamed for."""
        self._trains = False
        self._beat(phase=LEAVING)

    @property
    def waited(self) -> bool:
        """Whether this rank has left a collective in which nobody came, or is about to."""
        return self._last.phase == LEAVING

    def saving(self, activity: str | None) -> None:
        """What the checkpoint writer is at; for its threads, whose progress is not the rank's."""
        self._beat(saving=activity)

    def end(self, code: int, cause: str | None = None) -> None:
        """The last beat: this rank leaves by itself, and is nobody's missing peer."""
        self._ended.set()
        self._progress += 1
        self._beat(ended=RankEnding(code=code, cause=cause and cause[:300]))
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
            found = [failure_of(record) or gone(record) for record in now.values()]
            known = [culprit for culprit in found if culprit]
            if known or time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        if known:
            return known
        missing = [
            Culprit(rank, host, None, None, "has not come as far as a heartbeat")
            for rank, host in enumerate(self._hosts)
            if rank not in now and rank != self._rank
        ]
        others = [record for rank, record in now.items() if rank != self._rank and not record.ended]
        silent = [
            culprit_of(record, "does not answer")
            for record in others
            if record.rank in first and record.beat == first[record.rank].beat
        ]
        return missing + silent or self._furthest_behind(others)

    def _furthest_behind(self, others: list[Beat]) -> list[Culprit]:
        own = self._last.step, self._progress
        # Who has waited in a collective waited for a rank that has come as far as this one, and not into it.
        places = {record.rank: (record.step, record.progress) for record in others if record.phase != LEAVING}
        least = min((place for place in places.values() if place < own or (self.waited and place == own)), default=None)
        return [
            culprit_of(record, "lives but does not go on")
            for record in others
            if least is not None and places.get(record.rank) == least
        ]

    def _everybody(self) -> dict[int, Beat]:
        records = {}
        for rank in range(len(self._hosts)):
            if record := read_beat(self._path(rank)):
                records[rank] = record
        return records

    def _path(self, rank: int) -> Path:
        return self._directory / f"{rank:05d}.json"

    def _enter(self, phase: str) -> None:
        self._progress += 1
        self._beat(phase=phase)

    def _beat(self, **changes: object) -> None:
        """Write the last beat with these changes. Its file system may hang: what other threads change meanwhile is
        noted all the same."""
        with self._changing:
            counted = {"beat": self._last.beat + 1, "progress": self._progress}
            self._last = self._last.model_copy(update=changes | counted)
        with self._writing:
            data = json.dumps(self._last.to_json()).encode().ljust(_RECORD_BYTES)
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
    """The call of torch.distributed that some thread of this process is in, or its wait for a single message."""
    waits = waits_for_a_peer()
    for frame in sys._current_frames().values():
        if frame.f_code is waits or frame.f_code.co_filename.endswith(_COLLECTIVES):
            return frame
    return None
