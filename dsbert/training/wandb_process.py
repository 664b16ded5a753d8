"""The process that sends a run to a W&B server: metrics.py starts it, by `python -m`, and it alone imports wandb.

A slow import, a server that never answers, a crash, and wandb's exit hooks, which may wait for minutes: all of that
happens here. It has a session of its own and minds no signal but KILL. wandb's helper program does mind TERM and INT,
and ends with all that it has not sent: another one is started then, and begins where the server says that it stands.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from dsbert.base.jsonl import parse_object
from dsbert.training.wandb_file import steps_on_disk

# How long the process may go on after the run has ended, in whatever way.
FINISH_S = 60.0
# Signals for the run are the run's affair.
RUN_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_POLL_S = 1.0
_STARTS = 5


def main() -> int:
    """Options on standard input, whose end is that of the run; "connected URL" or one complaint on standard output."""
    for number in RUN_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # wandb's own words go where standard error goes: nowhere
    options = json.loads(sys.stdin.readline())
    ended = threading.Event()
    threading.Thread(target=_leave_after_the_run, args=[ended], daemon=True).start()
    try:
        send(Path(options.pop("metrics")), options, ended, out)
    except BaseException as error:  # wandb has been seen to raise SystemExit
        absent = isinstance(error, ModuleNotFoundError) and error.name == "wandb"
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print("wandb is not installed: pip install 'dsbert[wandb]'" if absent else why, file=out)
        return 1
    return 0


def send(metrics: Path, options: dict[str, Any], ended: threading.Event, out: TextIO) -> None:
    """Send what `metrics` holds and what is appended to it until `ended`, each step once."""
    import wandb

    lock = (Path(options["dir"]) / "wandb_id").open("rb")
    with suppress(OSError):  # the process of the start before may still be sending; not every file system has locks
        fcntl.flock(lock, fcntl.LOCK_EX)
    elsewhere = steps_on_disk(Path(options["dir"]) / "wandb")  # for `wandb sync` to send
    for start in range(1, _STARTS + 1):
        try:
            run = wandb.init(**options, resume="allow", settings=wandb.Settings(console="off", silent=True))
            print(f"connected {run.settings.base_url}", file=out)
            run.define_metric("step")
            run.define_metric("*", step_metric="step")
            there = int(run.summary.get("step") or 0)
            for record in _follow(metrics, ended):
                if record["step"] > there and record["step"] not in elsewhere:
                    run.log({key: value for key, value in record.items() if value is not None})
            run.finish()
            return
        except Exception as error:
            if start == _STARTS or not _is_gone(error):
                raise
            with suppress(Exception):
                wandb.teardown()


def _is_gone(error: Exception) -> bool:
    """Whether wandb's helper program has ended: at work, while it started, or with an answer that was waited for. The
    latter have classes of their own, which stand where wandb promises nothing."""
    named = {"ServicePollForTokenError", "WandbServiceConnectionError", "HandleAbandonedError"}
    return isinstance(error, ConnectionError) or type(error).__name__ in named


def _follow(path: Path, ended: threading.Event) -> Iterator[dict[str, Any]]:
    """The records of a journal, those that are yet to come included, until the run has ended."""
    position, rest = 0, b""
    while True:
        last = ended.wait(_POLL_S if position else 0)  # before the look, so that nothing comes after the last one
        with suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(position)
            data = file.read()
            position += len(data)
            *lines, rest = (rest + data).split(b"\n")
            for record in filter(None, map(parse_object, lines)):
                if isinstance(record.get("step"), int):
                    yield record
        if last:
            return


def _leave_after_the_run(ended: threading.Event) -> None:
    """End this process a while after the run: long enough to finish, and no orphan that hangs for ever."""
    sys.stdin.read()
    ended.set()
    time.sleep(FINISH_S)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
