"""Weights & Biases.

W&B is a convenience that must never stop or slow a step. A thread feeds a process of its own (this module, run by
`python -m`), which alone imports wandb: a slow import, a server that never answers, a crash, and wandb's exit hooks,
which may wait for minutes, all happen there. What that process cannot take is dropped; metrics.jsonl has everything.
"""

import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from dsbert.errors import printable
from dsbert.jsonl import to_json

# Records that wait for W&B, at most: at one a second, a quarter of an hour of an unreachable server.
QUEUE_RECORDS = 1000
# How long W&B may take to finish: while `close` waits, and after a crash of the run.
FINISH_S = 60.0


class WandbLogger:
    """Send records to Weights & Biases without ever stopping or slowing a step.

    Offline unless WANDB_API_KEY is set; WANDB_MODE overrules that. The run's id is kept in <run_dir>/wandb_id, so that
    every attempt continues one W&B run, and its charts run over our own "step", so that a rollback may repeat steps.
    Whatever fails is one line on standard error, once.

    Args:
        run_dir: the run directory; wandb writes to <run_dir>/wandb.
        config: the resolved configuration, in JSON types.
        project: the W&B project.
        name: the name that W&B shows for the run.
        enabled: False on all ranks but the first, or where the user wants no W&B: every method then does nothing.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any], project: str, name: str, enabled: bool) -> None:
        self.dropped = 0
        self._active = enabled and os.environ.get("WANDB_MODE") != "disabled"
        self._warned = False
        self._child: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue(QUEUE_RECORDS)
        if not self._active:
            return
        try:
            options = to_json(
                {
                    "dir": str(run_dir),
                    "id": _run_id(run_dir / "wandb_id"),
                    "project": project,
                    "name": name,
                    "config": config,
                    "mode": os.environ.get("WANDB_MODE")
                    or ("online" if os.environ.get("WANDB_API_KEY") else "offline"),
                }
            )
        except (OSError, TypeError) as error:
            self._give_up(f"{type(error).__name__}: {error}")
        else:
            self._thread = threading.Thread(target=self._feed, args=[options], name="wandb", daemon=True)
            self._thread.start()

    def log(self, record: Mapping[str, Any]) -> None:
        """Queue a record and return at once. The oldest record is dropped, and counted, where the queue is full."""
        if not self._active:
            return
        try:
            self._put(to_json(record))
        except TypeError as error:
            self._warn(f"a record was left out: {error}")

    def close(self, timeout_s: float = FINISH_S) -> None:
        """Have W&B finish, and wait for that `timeout_s` seconds at most. A second call does nothing."""
        if not self._active:
            return
        self._active = False
        self._put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._warn(f"it did not finish within {timeout_s:g} s")
            if self._child is not None:
                self._child.kill()

    def _put(self, line: str | None) -> None:
        """Queue a line; where there is no room, in place of the oldest."""
        while True:
            try:
                self._lines.put_nowait(line)
                return
            except queue.Full:
                with suppress(queue.Empty):
                    self._lines.get_nowait()
                    self.dropped += 1
                self._warn("it does not keep up, and the oldest records are dropped")

    def _feed(self, options: str) -> None:
        """Body of the thread: start the process and pass it the lines. Everything that can block or fail is here."""
        try:
            child = self._child = _start_process()
            assert child.stdin is not None
            assert child.stdout is not None
            # Where the pipe breaks, the process has ended, and what it has said about that is read below.
            with suppress(BrokenPipeError), child.stdin:
                line: str | None = options
                while line is not None:
                    child.stdin.write(line + "\n")
                    child.stdin.flush()
                    line = self._lines.get()
            complaint = child.stdout.read().strip()
            if child.wait() != 0:
                self._give_up(complaint or f"its process ended with {child.returncode}")
        except Exception as error:
            self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, why: str) -> None:
        """Warn, and take no further records."""
        self._active = False
        self._warn(why)

    def _warn(self, why: str) -> None:
        """One line on standard error, once in the life of this logger."""
        if not self._warned:
            self._warned = True
            print(
                f"dsbert: W&B: {printable(why)}. The run goes on; metrics.jsonl has everything.",
                file=sys.stderr,
                flush=True,
            )


def _run_id(path: Path) -> str:
    """The run's id in W&B: kept in `path`, drawn on the first start, from no generator that training uses."""
    if not path.exists():
        fresh = path.with_name(f"{path.name}.tmp")
        fresh.write_text(secrets.token_hex(4))
        fresh.replace(path)
    return path.read_text().strip()


def _start_process() -> subprocess.Popen[str]:
    """Start `_main` in a process of its own, with the modules that this process would import."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "WANDB_SILENT": "true"}
    return subprocess.Popen(
        [sys.executable, "-m", "dsbert.metrics", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
    )


def _main(parent: int) -> int:
    """The process that talks to wandb: options and records on standard input, at most one complaint on output."""
    # Signals for the run are the run's affair. Ignored ones stay so in the programs that wandb starts.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_after, args=[parent], daemon=True).start()
    complaint = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # wandb's own words go where standard error goes: nowhere
    try:
        _pass_on(sys.stdin)
    except BaseException as error:  # wandb has been seen to raise SystemExit
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=complaint, flush=True)
        return 1
    return 0


def _pass_on(lines: IO[str]) -> None:
    """Start or continue the W&B run that the first line describes, and log each line that follows."""
    import wandb

    options = json.loads(lines.readline())
    run = wandb.init(**options, resume="allow", settings=wandb.Settings(console="off", silent=True))
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    for line in lines:
        run.log({key: value for key, value in json.loads(line).items() if value is not None})
    run.finish()


def _leave_after(parent: int) -> None:
    """End this process a while after its parent: long enough to finish, and no orphan that hangs for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(FINISH_S)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1])))
