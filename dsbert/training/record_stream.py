"""What the processes that pass a run's records on have in common: metrics.jsonl is followed until the run has ended,
and what goes wrong is a line to the run, which starts them (follower.py).

Options come as one line of JSON on standard input, whose end is that of the run. On standard output go "connected URL",
"note WHAT" for what is left out, and at last one complaint, or "done JSON".
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsbert.base.jsonl import parse_object, to_json

if TYPE_CHECKING:
    from dsbert.training.topology_media import TopologyMedia, UpdateMedia

# How long such a process may go on after the run has ended, in whatever way.
FINISH_S = 60.0
# Signals for the run are the run's affair.
RUN_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_POLL_S = 1.0

Say = Callable[[str], None]
Send = Callable[[dict[str, Any], threading.Event, Say], dict[str, Any]]


def run_process(send: Send, package: str, extra: str) -> int:
    """The main function of such a process. send: from options, an event that is set when the run has ended, and a way
    to say a line, to what it has done. package: what it needs, which the extra of dsbert installs."""
    for number in RUN_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes where standard error goes: nowhere
    options = json.loads(sys.stdin.readline())
    ended = threading.Event()
    threading.Thread(target=_leave_after_the_run, args=[ended, options.pop("finish_s", FINISH_S)], daemon=True).start()

    def say(line: str) -> None:
        with suppress(OSError, ValueError):  # the run may be gone
            print(" ".join(line.split()), file=out)

    try:
        say(f"done {to_json(send(options, ended, say))}")
    except BaseException as error:  # wandb has been seen to raise SystemExit
        absent = isinstance(error, ModuleNotFoundError) and error.name == package
        say(f"{package} is not installed: pip install 'dsbert[{extra}]'" if absent else in_words(error))
        return 1
    return 0


def in_words(error: BaseException) -> str:
    """The error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def follow(path: Path, ended: threading.Event) -> Iterator[list[dict[str, Any]]]:
    """The records of a journal that have a step, as they come, those that are there already first; an empty list where
    none has come for a while. Ends when the run has."""
    position, rest, wait_s = 0, b"", 0.0
    while True:
        last = ended.wait(wait_s)  # before the look, so that nothing comes after the last one
        wait_s = _POLL_S
        found: list[dict[str, Any]] = []
        with suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(position)
            data = file.read()
            position += len(data)
            *lines, rest = (rest + data).split(b"\n")
            found = [record for record in map(parse_object, lines) if record and type(record.get("step")) is int]
        yield found
        if last:
            return


@contextmanager
def alone(path: Path, *, patient: bool = True) -> Iterator[None]:
    """Hold the lock of a file meanwhile: the process of the start before may still be sending. patient: wait for it.

    Raises:
        BlockingIOError: another process holds it, and we are not patient.
    """
    with path.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if patient else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # not every file system has locks
            pass
        yield


class MediaReader:
    """Pictures and histograms of mask updates for the records of a run, as far as they can be made: whatever fails is
    noted once, and the records go without.

    Args:
        run_dir: the run directory.
        layers: shapes and block sizes of its weights, in JSON types; None: a checkpoint knows them.
        say: where to note what is left out.
    """

    def __init__(self, run_dir: Path, layers: dict[str, Any] | None, say: Say) -> None:
        self._run_dir, self._layers, self._say = run_dir, layers, say
        self._media: TopologyMedia | None = None
        self._off = False

    def of(self, record: dict[str, Any]) -> UpdateMedia | None:
        """Of the mask update at the record's step; None where there was none. Steps must not fall."""
        if self._off or record.get("pruned") is None:
            return None
        try:
            # Torch comes with it: two seconds, which a run without updates does not pay.
            from dsbert.checkpoint.state import LayerRecord
            from dsbert.training.topology_media import open_media

            if self._media is None:
                known = self._layers and {name: LayerRecord.from_json(one) for name, one in self._layers.items()}
                self._media = open_media(self._run_dir, known)
            return self._media.after(record["step"])
        except Exception as error:
            self.leave_out(error)
            return None

    def leave_out(self, error: Exception) -> None:
        """From now on there are none."""
        self._off = True
        self._say(f"note pictures of mask updates are left out: {in_words(error)}")


def _leave_after_the_run(ended: threading.Event, finish_s: float) -> None:
    """End this process a while after the run: long enough to finish, and no orphan that hangs for ever."""
    sys.stdin.read()
    ended.set()
    time.sleep(finish_s)
    os._exit(1)
