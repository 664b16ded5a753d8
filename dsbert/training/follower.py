"""The run's side of a process that passes its records on: started without waiting, and ended in bounded time.

A slow import, a server that never answers, a crash, exit hooks that wait for minutes: all of that happens in the
process (record_stream.py). It has a session of its own, and minds no signal but KILL.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from dsbert.base.jsonl import parse_object, to_json
from dsbert.cluster.launcher import module_command
from dsbert.training.record_stream import RUN_SIGNALS


def start_process(module: str) -> subprocess.Popen[str]:
    """Start a module that runs `record_stream.run_process`. Raises OSError."""
    return subprocess.Popen(
        module_command(module),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"WANDB_SILENT": "true"},
        text=True,
        start_new_session=True,
    )


class Follower:
    """A process, and a thread that starts it and hears what it has to say.

    Args:
        module: what to start.
        options: what it is told, in JSON types.
        on_failure: called from the thread, once, with why nothing more is passed on.
        on_note: called from the thread, with what is left out.
    """

    def __init__(
        self, module: str, options: dict[str, Any], on_failure: Callable[[str], None], on_note: Callable[[str], None]
    ) -> None:
        self._on_failure, self._on_note = on_failure, on_note
        self._child: subprocess.Popen[str] | None = None
        self._started, self._abandoned = threading.Event(), False
        self.url: str | None = None
        self._thread = threading.Thread(target=self._run, args=[module, to_json(options)], name=module, daemon=True)
        self._thread.start()

    def finish(
        self, timeout_s: float, hopeless_s: float, is_hopeful: Callable[[], bool], *, leave: bool = False
    ) -> float:
        """Have the process pass on what is left, and wait for it: for `hopeless_s` seconds, and up to `timeout_s` if
        there is hope; is_hopeful may block. leave: after that, let it go on by itself, which it does for
        `record_stream.FINISH_S` at most. Returns 0, or after how many seconds it was ended."""
        answers: list[bool] = []
        probe = threading.Thread(target=lambda: answers.append(is_hopeful()), daemon=True)
        probe.start()
        waited = min(timeout_s, hopeless_s)
        deadline = time.monotonic() + waited
        self._started.wait(waited)
        child = self._child
        if child is not None and child.stdin is not None:
            with suppress(OSError):
                child.stdin.close()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive() and any(answers):
            self._thread.join(timeout_s - waited)
            waited = timeout_s
        if not self._thread.is_alive():
            return 0.0
        self._abandoned = True
        if leave:
            return 0.0
        if child is not None:
            child.kill()
        return waited

    def _run(self, module: str, options: str) -> None:
        """Body of the thread. Everything that can block or fail is here."""
        try:
            # Of this thread, and so of what it starts, which has no handlers yet.
            signal.pthread_sigmask(signal.SIG_BLOCK, RUN_SIGNALS)
            child = self._child = start_process(module)
            assert child.stdin is not None
            assert child.stdout is not None
            # Where the pipe breaks, the process has ended, and has said why.
            with suppress(BrokenPipeError):
                child.stdin.write(options + "\n")
                child.stdin.flush()
            self._started.set()
            complaint = ""
            for line in child.stdout:
                complaint = self._hear(line.strip()) or complaint
            if child.wait() != 0 and not self._abandoned:
                self._on_failure(complaint or f"its process ended with {child.returncode}")
        except Exception as error:
            self._on_failure(f"{type(error).__name__}: {error}")

    def _hear(self, line: str) -> str:
        """Returns the line if it is a complaint."""
        word, _, rest = line.partition(" ")
        if word == "connected":
            self.url = rest
        elif word == "note":
            self._on_note(rest)
        elif word != "done":
            return line
        return ""


def passed_on(module: str, options: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """What such a process has done with the records that are there, once it has ended by itself.

    Raises:
        TimeoutError: it took more than `timeout_s` seconds, and was ended.
        RuntimeError: it failed; the message is its complaint.
    """
    with start_process(module) as child:
        try:
            said, _ = child.communicate(to_json({**options, "finish_s": timeout_s}) + "\n", timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        finally:
            if child.poll() is None:  # also where Ctrl-C came
                child.kill()
    lines = said.splitlines() or [""]
    if child.returncode:
        raise RuntimeError(lines[-1] or f"its process ended with {child.returncode}")
    done = parse_object(lines[-1].removeprefix("done ").encode()) or {}
    return done | {"notes": [line.removeprefix("note ") for line in lines if line.startswith("note ")]}
