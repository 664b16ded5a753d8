"""Train what is missing, on this machine. Callers share the work: a cell is trained by who holds its lock.

The kernel gives a lock back when its holder dies, and ends the holder's trainings with it (`die_with_parent`), so that
whoever comes next resumes the cell from its newest checkpoint.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from dsbert.base.cores import usable_cores
from dsbert.base.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_REQUEUE, DsbertError, UserError
from dsbert.cluster.launcher import PARENT_PID_ENV, module_command
from dsbert.experiment.cell_results import outcome
from dsbert.experiment.cells import Cell, data_directory
from dsbert.experiment.commands import pretrain_command, said_last
from dsbert.experiment.definition import Experiment
from dsbert.experiment.planning import Plan, make_plan, refreshed, run_directory

_POLL_S = 0.3
_ATTEMPTS = 2  # a cell that failed is tried once more
_STOP_S = 120.0  # for trainings to save when we are told to stop


@dataclass
class _Training:
    cell: Cell
    process: subprocess.Popen[bytes]
    lock: FileLock


@dataclass
class Runner:
    """jobs: trainings at a time; threads: of each. say: a line for people; advance: told the plan as it is now."""

    experiment: Experiment
    directory: Path
    jobs: int
    threads: int
    say: Callable[[str], None]
    advance: Callable[[Plan], None] = lambda plan: None
    _running: dict[str, _Training] = field(default_factory=dict)
    _failures: dict[str, int] = field(default_factory=dict)
    _stop: list[int] = field(default_factory=list)

    def run(self) -> tuple[Plan, int]:
        """The plan as it is at the end, and the exit code: 0 complete, 1 where cells failed twice, 75 where a signal
        came first (trainings have saved)."""
        self.directory.mkdir(parents=True, exist_ok=True)
        prepare_data(self.experiment, self.directory, self.say)
        plan = make_plan(self.experiment, self.directory)
        with self._signals():
            while not self._stop:
                plan = refreshed(plan, self.directory, self._given_up())
                self.advance(plan)
                self._reap()
                self._fill(plan)
                if not self._running and not plan.missing:
                    break
                time.sleep(_POLL_S)
            self._end_all()
        plan = refreshed(plan, self.directory, self._given_up())
        self.advance(plan)
        if self._stop:
            return plan, EXIT_REQUEUE if self._stop[0] != signal.SIGINT else EXIT_INTERRUPTED
        return plan, EXIT_OK if not plan.given_up else DsbertError.exit_code

    def _given_up(self) -> frozenset[str]:
        return frozenset(name for name, count in self._failures.items() if count >= _ATTEMPTS)

    def _fill(self, plan: Plan) -> None:
        """Begin as many as there is room for, of those that nobody else is at work on."""
        for cell in plan.missing:
            if len(self._running) >= self.jobs:
                return
            if cell.name not in self._running and (lock := self._lock(cell)):
                self._running[cell.name] = _Training(cell, self._start(cell), lock)

    def _lock(self, cell: Cell) -> FileLock | None:
        """The cell's, unless somebody holds it, or has finished the cell since we looked."""
        folder = self.directory / "locks"
        folder.mkdir(exist_ok=True)
        lock = FileLock(folder / cell.name)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return None
        if outcome(run_directory(self.directory, cell)) == "done":
            lock.release()
            return None
        return lock

    def _start(self, cell: Cell) -> subprocess.Popen[bytes]:
        run_dir = run_directory(self.directory, cell)
        run_dir.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self.threads),
            PARENT_PID_ENV: str(os.getpid()),
        }
        with (run_dir / "output.log").open("ab") as log:
            return subprocess.Popen(
                pretrain_command(cell, run_dir / "cell.yaml", run_dir),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _reap(self) -> None:
        for name, training in list(self._running.items()):
            code = training.process.poll()
            if code is None:
                continue
            del self._running[name]
            training.lock.release()
            if code not in (EXIT_OK, EXIT_REQUEUE):
                self._failures[name] = self._failures.get(name, 0) + 1
                again = "tried once more" if self._failures[name] < _ATTEMPTS else "given up"
                log = run_directory(self.directory, training.cell) / "output.log"
                found = said_last(log.read_text(errors="replace"))
                self.say(f"{training.cell.label} failed with {code}, {again}: {found} ({log})")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        with ExitStack() as stack:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                before = signal.signal(number, lambda received, _: self._stop.append(received))
                stack.callback(signal.signal, number, before)
            yield

    def _end_all(self) -> None:
        """Have what still trains save and leave."""
        if self._running:
            self.say(f"{len(self._running)} trainings save and leave; the same command goes on")
        for training in self._running.values():
            training.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _STOP_S
        for training in self._running.values():
            try:
                training.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                training.process.kill()
            training.lock.release()
        self._running.clear()


def prepare_data(experiment: Experiment, directory: Path, say: Callable[[str], None]) -> None:
    """Once for all callers and experiments of the directory. Raises UserError where `dsbert prepare` does."""
    path = data_directory(experiment, directory)
    if path is None or experiment.data is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock")):
        if (path / "manifest.json").exists():
            return
        say(f"prepares {', '.join(experiment.data.sources)}")
        sources = [word for source in experiment.data.sources for word in ("--source", source)]
        sizes = ["--vocab-size", str(experiment.data.vocab_size), "--validation", str(experiment.data.validation)]
        command = module_command("dsbert.cli", "prepare", *sources, "--to", str(path), *sizes)
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise UserError(said_last(done.stderr))


def threads_for(jobs: int) -> int:
    """Of each of so many trainings at a time, where it is not said: the cores shared out."""
    return max(1, usable_cores() // jobs)


def say(line: str) -> None:
    """A line on standard error."""
    print(f"dsbert: {line}", file=sys.stderr, flush=True)
