"""Where records go beside metrics.jsonl, which is the truth: to Weights & Biases, and into files for TensorBoard.

Both are conveniences that must never stop or slow a step, and both have each step once, however often the run was
killed. To W&B a step that is taken again after a rollback stays as it was first told. Offline, records go straight into
the files that `wandb sync` sends (wandb_file.py). Online, and for TensorBoard, a process of its own follows
metrics.jsonl (follower.py), and begins with what the starts before it could not pass on.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsbert.base.errors import printable
from dsbert.base.jsonl import JsonlFile, to_json
from dsbert.training.follower import Follower
from dsbert.training.record_stream import FINISH_S
from dsbert.training.wandb_file import OfflineRun, steps_on_disk
from dsbert.training.wandb_mode import UNREACHABLE_S, answers, server_url, wandb_mode
from dsbert.training.wandb_run import describe_run, logs_artifacts


class RecordLogger:
    """What both have in common: whatever fails is one line on standard error, once, and nothing more is passed on.

    Args:
        label: who is spoken of in that line.
        rest: what becomes of the records then.
        enabled: False: every method does nothing.
    """

    def __init__(self, label: str, rest: str, enabled: bool) -> None:
        self._label, self._rest = label, rest
        self._active, self._warned, self._closing = enabled, False, False
        self._sender: Follower | None = None

    def log(self, record: Mapping[str, Any]) -> None:
        """Pass on a record that metrics.jsonl has or is about to get."""

    def close(self, timeout_s: float = FINISH_S, *, leave: bool = False) -> None:
        """Have what is left passed on, and wait for that `timeout_s` seconds at most, and `UNREACHABLE_S` where there
        is no hope. leave: the process may go on after that. A second call does nothing."""
        if not self._active:
            return
        self._closing = True
        if self._sender and (waited := self._sender.finish(timeout_s, UNREACHABLE_S, self._is_hopeful, leave=leave)):
            self._warn(f"it did not finish within {waited:g} s")
        self._active = False

    def _is_hopeful(self) -> bool:
        return True

    def _follow(self, module: str, options: Mapping[str, Any]) -> None:
        """Start a process that passes the records on."""
        self._sender = Follower(f"dsbert.training.{module}", dict(options), self._give_up, self._say)

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
            self._say(f"{why}. {'' if self._closing else 'The run goes on; '}{self._rest}")

    def _say(self, line: str) -> None:
        print(f"dsbert: {self._label}: {printable(line)}", file=sys.stderr, flush=True)


class WandbLogger(RecordLogger):
    """Weights & Biases: offline unless there is a key (wandb_mode.py). Every attempt continues one W&B run.

    Args:
        run_dir: the run directory, whose config.yaml is written; offline files are in <run_dir>/wandb.
        enabled: False on all ranks but the first, or where the user wants no W&B.
        attempt: its number; None: how it ends is nobody's business.
        layers: of all weights, in JSON types, for pictures of mask updates.
    """

    def __init__(
        self, run_dir: Path, enabled: bool, attempt: int | None = None, layers: Mapping[str, Any] | None = None
    ) -> None:
        rest = "metrics.jsonl has everything, and the next start sends what is missing."
        super().__init__("W&B", rest, enabled and os.environ.get("WANDB_MODE") != "disabled")
        self._offline: OfflineRun | None = None
        if not self._active:
            return
        mode, why_offline = wandb_mode()
        if why_offline:
            self._say(why_offline)
        with self._no_harm():
            run = describe_run(run_dir)
            if mode not in ("offline", "dryrun"):
                options = {"run_dir": str(run_dir), "run": run, "mode": mode, "patient": True}
                options |= {"attempt": attempt, "layers": layers, "artifacts": logs_artifacts(run_dir)}
                self._follow("wandb_process", options)
                return
            self._known = steps_on_disk(run_dir / "wandb")
            self._offline = OfflineRun(run_dir / "wandb", run)
            for record in JsonlFile(run_dir / "metrics.jsonl").read(skip_garbled=True):
                self._write(record)

    def log(self, record: Mapping[str, Any]) -> None:
        """Pass on a record that metrics.jsonl has or is about to get. (Online, it is read from there.)"""
        if self._active and self._offline:
            with self._no_harm():
                self._write(json.loads(to_json(record)))

    def close(self, timeout_s: float = FINISH_S, *, leave: bool = False) -> None:
        """As of `RecordLogger`; there is no hope where W&B's server does not answer."""
        if self._active and self._offline:
            with self._no_harm():
                self._offline.close()
        super().close(timeout_s, leave=leave)

    def _is_hopeful(self) -> bool:
        # Of a short run, wandb may still be starting.
        return answers((self._sender and self._sender.url) or server_url())

    def _write(self, record: Mapping[str, Any]) -> None:
        """Into the offline file, unless one has the step."""
        step = record.get("step")
        if self._offline and isinstance(step, int) and step not in self._known:
            self._offline.append({key: value for key, value in record.items() if value is not None})
            self._known.add(step)


class TensorBoardLogger(RecordLogger):
    """Event files for TensorBoard, in <run_dir>/tensorboard.

    Args:
        run_dir: the run directory.
        enabled: False on all ranks but the first, or where the user wants none.
        step: which the attempt begins after.
        layers: of all weights, in JSON types, for pictures of mask updates.
    """

    def __init__(self, run_dir: Path, enabled: bool, step: int, layers: Mapping[str, Any] | None = None) -> None:
        rest = "metrics.jsonl has everything, and the next start writes what is missing."
        super().__init__("TensorBoard", rest, enabled)
        if self._active:
            self._follow("tensorboard_process", {"run_dir": str(run_dir), "step": step, "layers": layers})
