"""Worker processes on this machine: small programs that take one task after the other, and may die at any time.

A worker reads tasks from its standard input and writes results to its standard output, a JSON line each. It ends when
its input does, or when the kernel sees its master die. Of one that dies its task goes to a new one; a task that has
killed several is given up.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from dsbert.base.errors import PeerError
from dsbert.cluster.launcher import PARENT_PID_ENV, module_command
from dsbert.data.preparing.tasks import Failure, Task

_MAX_DEATHS = 3


class WorkerPool:
    """`count` places for tasks. count 1: the task runs in this very process, when its result is asked for."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._idle: list[subprocess.Popen[bytes]] = []
        self._busy: dict[int, tuple[subprocess.Popen[bytes], Task]] = {}  # by the descriptor of its output
        self._deaths: dict[str, int] = {}
        self._selector = selectors.DefaultSelector()
        self._here: list[Task] = []

    @property
    def free(self) -> int:
        """How many more tasks could run at once."""
        return self.count - self.running

    @property
    def running(self) -> int:
        """Tasks that were submitted and have given no result."""
        return len(self._busy) + len(self._here)

    def submit(self, task: Task) -> None:
        """Give a task to a free place; task["do"] names its kind (worker.py). Raises OSError: no process."""
        if self.count == 1:
            self._here.append(task)
            return
        worker = self._idle.pop() if self._idle else self._start()
        assert worker.stdin is not None
        assert worker.stdout is not None
        self._busy[worker.stdout.fileno()] = worker, task
        self._selector.register(worker.stdout, selectors.EVENT_READ)
        try:
            worker.stdin.write(json.dumps(task).encode() + b"\n")
            worker.stdin.flush()
        except OSError:
            pass  # it is gone, as reading from it will show

    def results(self, timeout_s: float) -> Iterator[tuple[Task, dict[str, Any]]]:
        """(task, result) of tasks that have ended, after waiting for one, at most so long.

        Raises the DsbertError or RuntimeError that a task ended with, PeerError for a task whose workers die.
        """
        if self._here:
            from dsbert.data.preparing.worker import perform

            task = self._here.pop()
            yield task, perform(task)
            return
        for key, _ in self._selector.select(timeout_s) if self._busy else []:
            worker, task = self._busy.pop(key.fd)
            self._selector.unregister(key.fileobj)
            assert worker.stdout is not None
            line = worker.stdout.readline()
            if not line.endswith(b"\n"):
                self._replace_dead_worker(worker, task)
                continue
            self._idle.append(worker)
            answer = json.loads(line)
            if "failure" in answer:
                raise Failure(**answer["failure"]).error()
            yield task, answer["result"]

    def close(self) -> None:
        """Kill what still runs: what a task has published stays, and nothing else counts."""
        everyone = [worker for worker, _ in self._busy.values()] + self._idle
        self._busy, self._idle = {}, []
        for worker in everyone:
            worker.kill()
        for worker in everyone:
            worker.wait()
            for stream in (worker.stdin, worker.stdout):
                if stream is not None:
                    _close(stream.close)
        self._selector.close()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {PARENT_PID_ENV: str(os.getpid()), "TOKENIZERS_PARALLELISM": "false"}
        # A session of its own: a terminal's Ctrl-C is the master's to handle.
        return subprocess.Popen(
            module_command("dsbert.data.preparing.worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )

    def _replace_dead_worker(self, worker: subprocess.Popen[bytes], task: Task) -> None:
        """Give its task to a new worker. Raises PeerError for a task that has killed several."""
        worker.kill()
        code = worker.wait()
        for stream in (worker.stdin, worker.stdout):
            if stream is not None:
                _close(stream.close)
        name = json.dumps(task, sort_keys=True)
        self._deaths[name] = self._deaths.get(name, 0) + 1
        if self._deaths[name] >= _MAX_DEATHS:
            raise PeerError(
                f"expected a worker to finish its task, found {_MAX_DEATHS} dead in a row (the last with {code}): is "
                "the memory exhausted? Give a smaller --nproc; the work done so far is kept"
            )
        self.submit(task)


def _close(close: Callable[[], None]) -> None:
    with suppress(OSError):
        close()
