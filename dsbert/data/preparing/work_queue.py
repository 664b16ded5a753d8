"""How the ranks of a preparation divide its work: a queue that every rank takes the next task from.

The queue is a counter in the store at which the ranks met (rendezvous.py: through mpi4py under mpiexec, SLURM's
variables under srun). No rank waits while another has tasks left, rank 0 works like the others, and nobody needs to be
asked. What was done is seen in the file system, where results appear whole; so a rank that dies takes nothing with it
but the tasks it was at, and these the others do at last.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dsbert.base.errors import DsbertError, PeerError
from dsbert.cluster.ranks import RankInfo
from dsbert.cluster.secret import SECRET_FILE
from dsbert.data.preparing.done_markers import marker_path
from dsbert.data.preparing.tasks import Task
from dsbert.data.preparing.worker_pool import WorkerPool

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); a total of 0 means that it is not known."""

POLL_S = 0.05
_LOOK_S = 0.2
# Without a new result for so long, a rank takes what others claimed and did not finish: work done twice does no harm.
PATIENCE_S = 60.0
# How long rank 0 waits at the end for ranks that may be dead.
LEAVE_S = 30.0
_FAILURE = "failure"


class PeerFailedError(DsbertError):
    """Another rank says what went wrong; exit_code is that rank's."""


class WorkQueue:
    """What this rank and its peers take their tasks from, and say to each other. store: None for a world of one."""

    def __init__(self, ranks: RankInfo, store: Any = None) -> None:
        self.rank, self.world_size = ranks.rank, ranks.world_size
        self._store = store
        self._counters: dict[str, int] = {}

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def claim(self, name: str) -> int:
        """The next number of the queue `name`: 0, 1, ..., each to one rank alone."""
        if self._store is None:
            self._counters[name] = self._counters.get(name, -1) + 1
            return self._counters[name]
        return int(self._ask(lambda: self._store.add(f"queue/{name}", 1))) - 1

    def publish(self, name: str, value: bytes) -> None:
        """On rank 0: a value that the others `wait_for`."""
        if self._store is not None:
            self._ask(lambda: self._store.set(f"published/{name}", value))

    def wait_for(self, name: str) -> bytes:
        """What rank 0 publishes under `name`, however long it takes.

        Raises PeerFailedError, PeerError if rank 0 is gone.
        """
        while not self._ask(lambda: self._store.check([f"published/{name}"])):
            self.check()
            time.sleep(POLL_S)
        value: bytes = self._ask(lambda: self._store.get(f"published/{name}"))
        return value

    def fail(self, error: Exception) -> None:
        """Have the other ranks stop, too."""
        if self._store is not None and not isinstance(error, PeerFailedError):
            code = error.exit_code if isinstance(error, DsbertError) else 1
            with suppress(PeerError):  # if rank 0 is gone, nobody is left to be told
                self._ask(lambda: self._store.set(_FAILURE, f"{code} {error}".encode()))

    def check(self) -> None:
        """Raise PeerFailedError if a rank has failed."""
        if self._store is not None and self._ask(lambda: self._store.check([_FAILURE])):
            code, _, message = self._ask(lambda: self._store.get(_FAILURE)).decode().partition(" ")
            error = PeerFailedError(message)
            error.exit_code = int(code)
            raise error

    def leave(self, patience_s: float) -> None:
        """Rank 0 holds the store: it goes when the others have gone."""
        if self._store is None:
            return
        try:
            here = int(self._store.add("left", 1))
            deadline = time.monotonic() + patience_s
            while self.is_main and here < self.world_size and time.monotonic() < deadline:
                time.sleep(POLL_S)
                here = int(self._store.add("left", 0))
        except RuntimeError:  # torch's DistError is one
            pass

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except RuntimeError as error:
            raise PeerError(
                f"rank {self.rank} lost rank 0, which holds the queue of tasks ({' '.join(str(error).split())[:150]}): "
                "run the same command again: it goes on where it stopped"
            ) from None


@contextmanager
def join_work_queue(
    ranks: RankInfo | None, directory: Path | None = None, timeout_s: float = 300.0
) -> Iterator[WorkQueue]:
    """The queue of the ranks that the launcher started; of one rank without a launcher. All are told if it fails.

    directory: where the ranks keep their secret, as `rendezvous.meet` says.

    Raises UserError or PeerError if the ranks do not find each other.
    """
    if ranks is None or ranks.world_size == 1:
        yield WorkQueue(ranks or RankInfo(0, 1, 0))
        return
    from dsbert.cluster.rendezvous import meet

    queue = WorkQueue(ranks, meet(ranks, timeout_s, directory).store)
    try:
        yield queue
    except BaseException as error:
        queue.fail(
            error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__} on rank {queue.rank}")
        )
        queue.leave(5.0)
        raise
    else:
        queue.leave(LEAVE_S)
    finally:
        if queue.is_main and directory is not None:
            _tidy(directory)


def _tidy(directory: Path) -> None:
    """Nothing but the secret is left of a preparation that had nothing to do, or was refused."""
    with suppress(OSError):
        if os.listdir(directory) == [SECRET_FILE]:
            os.unlink(directory / SECRET_FILE)
            os.rmdir(directory)


def do_all(queue: WorkQueue, workers: WorkerPool, stage: str, tasks: Sequence[Task], progress: Progress) -> int:
    """Have all tasks of a stage done, by all ranks together. Each leaves its marker.

    Returns how many were done before. Raises what a task raises, on the rank that it ran on; PeerFailedError elsewhere.
    """
    total = sum(task["weight"] for task in tasks)
    seen = _Seen(tasks)
    before = seen.look()
    name = f"{stage}/{len(tasks)}"
    exhausted, ours = False, set[str]()
    last_news, news = time.monotonic(), seen.weight
    while seen.missing:
        progress(stage, seen.weight, total)
        while workers.free and not exhausted:
            number = queue.claim(name)
            if number >= len(tasks):
                exhausted = True
            elif _marker(tasks[number]) in seen.missing.keys() - ours:
                workers.submit(tasks[number])
                ours.add(_marker(tasks[number]))
        for task, _ in workers.results(POLL_S if queue.world_size > 1 else 1.0):
            seen.note(_marker(task))
            ours.discard(_marker(task))
        queue.check()
        if exhausted and not workers.running:
            time.sleep(POLL_S)
            seen.look()
            if not seen.missing:
                break
            if seen.weight != news:
                last_news, news = time.monotonic(), seen.weight
            elif time.monotonic() > last_news + PATIENCE_S:
                left = [task for task in tasks if _marker(task) in seen.missing]
                workers.submit(left[queue.rank % len(left)])
        else:
            last_news = time.monotonic()
            if queue.world_size > 1 and queue.is_main:
                seen.look()
    progress(stage, total, total)
    return before


def _marker(task: Task) -> str:
    return str(marker_path(task))


class _Seen:
    """Which tasks are done, by the file system. missing: the markers of the others; weight: of those done."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.missing: dict[str, int] = {}
        for task in tasks:  # equal pieces are one task
            self.missing[_marker(task)] = self.missing.get(_marker(task), 0) + task["weight"]
        self.weight = 0
        self._next_look = 0.0
        self._directories = {str(Path(marker).parent) for marker in self.missing}

    def look(self) -> int:
        """List the directories (a listing is fresh where a look at one file may not be); how many are new."""
        if time.monotonic() < self._next_look:
            return 0
        self._next_look = time.monotonic() + _LOOK_S
        try:
            names = {f"{directory}/{name}" for directory in self._directories for name in os.listdir(directory)}
        except FileNotFoundError:  # rank 0 has finished, and tidied up
            names = set(self.missing)
        found = [marker for marker in self.missing if marker in names]
        for marker in found:
            self.note(marker)
        return len(found)

    def note(self, marker: str) -> None:
        """One that is done."""
        self.weight += self.missing.pop(marker, 0)
