"""Weights & Biases.

W&B is a convenience that must never stop or slow a step, and metrics.jsonl is the truth: W&B has each of its steps
once, however often the run was killed, and a step that is taken again after a rollback stays as it was first told.
Offline, records go straight into the files that `wandb sync` sends (wandb_file.py). Online, a process of its own
follows metrics.jsonl (wandb_process.py). Either begins with what the starts before it could not pass on.
"""

import json
import os
import re
import secrets
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dsbert.base.durable import read_regular
from dsbert.base.errors import printable
from dsbert.base.jsonl import JsonlFile, to_json
from dsbert.cluster.launcher import module_command
from dsbert.training.wandb_file import OfflineRun, steps_on_disk
from dsbert.training.wandb_mode import server_url, wandb_mode
from dsbert.training.wandb_process import FINISH_S, RUN_SIGNALS

# How long W&B may take to finish where its server does not answer.
UNREACHABLE_S = 5.0
_OF_THE_USER = {
    "entity": "WANDB_ENTITY",
    "group": "WANDB_RUN_GROUP",
    "job_type": "WANDB_JOB_TYPE",
    "notes": "WANDB_NOTES",
}


class WandbLogger:
    """Pass records on to Weights & Biases without ever stopping or slowing a step.

    Offline unless there is a key (wandb_mode.py). The run's id is kept in <run_dir>/wandb_id, so that every attempt
    continues one W&B run, and its charts run over our own "step". Whatever fails is one line on standard error, once.

    Args:
        run_dir: the run directory; wandb's files are in <run_dir>/wandb.
        config: the resolved configuration, in JSON types.
        project: the W&B project.
        name: the name that W&B shows for the run.
        enabled: False on all ranks but the first, or where the user wants no W&B: every method then does nothing.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any], project: str, name: str, enabled: bool) -> None:
        self._active = enabled and os.environ.get("WANDB_MODE") != "disabled"
        self._warned = self._closing = False
        self._offline: OfflineRun | None = None
        self._sender: _Sender | None = None
        if not self._active:
            return
        mode, why_offline = wandb_mode()
        if why_offline:
            print(f"dsbert: W&B: {why_offline}", file=sys.stderr, flush=True)
        metrics = JsonlFile(run_dir / "metrics.jsonl")
        with self._no_harm():
            run: dict[str, Any] = {"id": _run_id(run_dir / "wandb_id"), "project": project, "name": name}
            run["config"] = config
            if mode not in ("offline", "dryrun"):
                options = to_json({**run, "dir": str(run_dir), "mode": mode, "metrics": str(metrics.path)})
                self._sender = _Sender(options, self._give_up)
                return
            run.update({key: os.environ.get(variable) for key, variable in _OF_THE_USER.items()})
            run["tags"] = list(filter(None, os.environ.get("WANDB_TAGS", "").split(",")))
            self._known = steps_on_disk(run_dir / "wandb")
            self._offline = OfflineRun(run_dir / "wandb", run)
            for record in metrics.read(skip_garbled=True):
                self._write(record)

    def log(self, record: Mapping[str, Any]) -> None:
        """Pass on a record that metrics.jsonl has or is about to get. (Online, it is read from there.)"""
        if self._active:
            with self._no_harm():
                self._write(json.loads(to_json(record)))

    def close(self, timeout_s: float = FINISH_S) -> None:
        """Have W&B finish, and wait for that `timeout_s` seconds at most, and `UNREACHABLE_S` where its server does not
        answer. A second call does nothing."""
        if not self._active:
            return
        self._closing = True
        if self._offline:
            with self._no_harm():
                self._offline.close()
        if self._sender and (waited := self._sender.finish(timeout_s)):
            self._warn(f"it did not finish within {waited:g} s")
        self._active = False

    def _write(self, record: Mapping[str, Any]) -> None:
        """Into the offline file, unless one has the step."""
        step = record.get("step")
        if self._offline and isinstance(step, int) and step not in self._known:
            self._offline.append({key: value for key, value in record.items() if value is not None})
            self._known.add(step)

    @contextmanager
    def _no_harm(self) -> Iterator[None]:
        try:
            yield
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
            goes_on = "" if self._closing else "The run goes on; "
            rest = f"{goes_on}metrics.jsonl has everything, and the next start sends what is missing."
            print(f"dsbert: W&B: {printable(why)}. {rest}", file=sys.stderr, flush=True)


def _run_id(path: Path) -> str:
    """The run's id in W&B: kept in `path`, drawn on the first start, from no generator that training uses."""
    with suppress(OSError):
        kept = read_regular(path).decode("utf-8", "replace").strip()
        if re.fullmatch(r"[\w-]{1,128}", kept, re.ASCII):
            return kept
    fresh, drawn = path.with_name(f"{path.name}.tmp"), secrets.token_hex(4)
    fresh.write_text(drawn)
    fresh.replace(path)  # also of one that is damaged: W&B goes on as a new run
    return drawn


class _Sender:
    """The process that talks to wandb, and a thread that starts it and hears what it has to say.

    Args:
        options: one line of JSON: what wandb is asked for, and which file to follow.
        on_failure: called from the thread, once, with why nothing more is sent.
    """

    def __init__(self, options: str, on_failure: Callable[[str], None]) -> None:
        self._on_failure = on_failure
        self._child: subprocess.Popen[str] | None = None
        self._started, self._abandoned = threading.Event(), False
        self._url: str | None = None
        self._thread = threading.Thread(target=self._run, args=[options], name="wandb", daemon=True)
        self._thread.start()

    def finish(self, timeout_s: float) -> float:
        """Have the process send what is left, and wait for it. Returns 0, or after how many seconds it was ended."""
        answers: list[bool] = []
        url = self._url or server_url()  # of a short run, wandb may still be starting
        probe = threading.Thread(target=lambda: answers.append(_answers(url)), daemon=True)
        probe.start()
        waited = min(timeout_s, UNREACHABLE_S)
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
        if child is not None:
            child.kill()
        return waited

    def _run(self, options: str) -> None:
        """Body of the thread. Everything that can block or fail is here."""
        try:
            # Of this thread, and so of what it starts, which has no handlers yet.
            signal.pthread_sigmask(signal.SIG_BLOCK, RUN_SIGNALS)
            child = self._child = subprocess.Popen(
                module_command("dsbert.training.wandb_process"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"WANDB_SILENT": "true"},
                text=True,
                start_new_session=True,
            )
            assert child.stdin is not None
            assert child.stdout is not None
            # Where the pipe breaks, the process has ended, and has said why.
            with suppress(BrokenPipeError):
                child.stdin.write(options + "\n")
                child.stdin.flush()
            self._started.set()
            complaint = ""
            for line in child.stdout:
                word, _, rest = line.strip().partition(" ")
                self._url, complaint = (rest, complaint) if word == "connected" else (self._url, line.strip())
            if child.wait() != 0 and not self._abandoned:
                self._on_failure(complaint or f"its process ended with {child.returncode}")
        except Exception as error:
            self._on_failure(f"{type(error).__name__}: {error}")


def _answers(url: str) -> bool:
    """Whether a server says anything at all, be it that it does not know us."""
    try:
        with urllib.request.urlopen(url, timeout=UNREACHABLE_S):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return True
    except OSError as error:
        return isinstance(getattr(error, "reason", error), ssl.SSLError)
    except ValueError:
        return False
