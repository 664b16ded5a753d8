"""The process that sends a run to a W&B server: follower.py starts it, and it alone imports wandb.

W&B's own step counts ours, and only grows: what the server has of a run is its first steps, and the rest comes from
metrics.jsonl, whatever the starts before have sent. wandb's helper program minds TERM and INT, and ends with all that
it has not sent: another one is started then, and begins where the server says that it stands.
"""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsbert.base.durable import read_regular
from dsbert.base.jsonl import JsonlFile, parse_object
from dsbert.base.records import read_record, valid_records
from dsbert.training.attempts import Attempt, Ending, Status
from dsbert.training.record_stream import MediaReader, Say, alone, follow, in_words, run_process
from dsbert.training.wandb_file import mark_synced

_STARTS = 5
# How long after rank 0 a run may say how it ended: of a rank that was killed, its peers say it.
_VERDICT_S = 30.0
_TITLE_CHARS = 64  # of an alert, at most


def main() -> int:
    """See record_stream.py."""
    return run_process(send, package="wandb", extra="wandb")


def send(options: dict[str, Any], ended: threading.Event, say: Say) -> dict[str, Any]:
    """Send what the run's records hold, and what is appended to them until `ended`, each step once.

    options: run_dir; run: the arguments of wandb.init that say which run it is; mode; patient: wait for another process
    that sends this run; attempt: its number, whose failure is worth an alert; artifacts: send references of the
    checkpoints; layers: as of `MediaReader`. Returns {"sent": steps, "last": step, "url"}. Raises whatever wandb does.
    """
    import wandb

    sent: set[int] = set()
    with alone(Path(options["run_dir"]) / "wandb_id", patient=options["patient"]):
        for start in range(1, _STARTS + 1):
            try:
                return _send(options, ended, say, sent)
            except Exception as error:
                if start == _STARTS or not _is_gone(error):
                    raise
                with suppress(Exception):
                    wandb.teardown()
    raise AssertionError("the last start returns or raises")


def _send(options: dict[str, Any], ended: threading.Event, say: Say, sent: set[int]) -> dict[str, Any]:
    import wandb

    run_dir, attempt = Path(options["run_dir"]), options.get("attempt")
    settings = wandb.Settings(console="off", silent=True)
    run = wandb.init(**options["run"], dir=str(run_dir), mode=options["mode"], resume="allow", settings=settings)
    say(f"connected {run.settings.base_url}")
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    # The summary comes behind the history, and the history of older runs counts lines.
    there = max(int(run.summary.get("step") or 0), run.starting_step - 1)
    media = MediaReader(run_dir, options.get("layers"), say)
    checkpoints = _Checkpoints(run, run_dir, say) if options.get("artifacts") else None
    for records in follow(run_dir / "metrics.jsonl", ended):
        for record in records:
            if record["step"] > there:
                there = record["step"]
                shown = _pictures(media, record)
                told = {key: value for key, value in record.items() if value is not None}
                run.log(told | shown, step=there, commit=True)
                sent.add(there)
        if checkpoints:
            checkpoints.send()
    ending = _ending(run_dir, attempt)
    failed = ending is not None and ending.outcome == "failed"
    if ending and failed and attempt is not None:
        run.alert(title=f"{run.name or run.id} failed"[:_TITLE_CHARS], text=_in_words(ending, run_dir), level="ERROR")
    url = run.url
    run.finish(exit_code=int(failed))
    with suppress(OSError):
        mark_synced(run_dir / "wandb", there)
    return {"sent": len(sent), "last": there, "url": url}


def _is_gone(error: Exception) -> bool:
    """Whether wandb's helper program has ended: at work, while it started, or with an answer that was waited for. The
    latter have classes of their own, which stand where wandb promises nothing."""
    named = {"ServicePollForTokenError", "WandbServiceConnectionError", "HandleAbandonedError"}
    return isinstance(error, ConnectionError) or type(error).__name__ in named


def _pictures(media: MediaReader, record: dict[str, Any]) -> dict[str, Any]:
    """What W&B is to show of the mask update at this step; {} if there was none."""
    import wandb

    found = media.of(record)
    if found is None:
        return {}
    try:
        shown = {"topology/blocks": wandb.Image(found.blocks, caption=found.caption)}
        return shown | {
            f"topology/{name}": wandb.Histogram(np_histogram=tuple(histogram))
            for name, histogram in found.histograms.items()
        }
    except Exception as error:  # without pillow, for one
        media.leave_out(error)
        return {}


class _Checkpoints:
    """The checkpoints of a run as versions of one artifact, each by references to its files. The newest of which W&B
    knows stands in the run's summary."""

    def __init__(self, run: Any, run_dir: Path, say: Say) -> None:
        self._run, self._folder, self._say = run, run_dir / "checkpoints", say
        self._last = int(run.summary.get("checkpoint_step") or 0)
        self._off = False

    def send(self) -> None:
        """Those that were published since the last call."""
        for path in [] if self._off else sorted(self._folder.glob("step_" + "[0-9]" * 8)):
            step = int(path.name.removeprefix("step_"))
            if step > self._last:
                try:
                    self._send(path, step)
                except Exception as error:
                    if _is_gone(error):
                        raise
                    if path.exists():  # else the next one has taken its place
                        self._off = True
                        self._say(f"note checkpoints are left out: {in_words(error)}")
                        return

    def _send(self, path: Path, step: int) -> None:
        import wandb

        manifest = parse_object(read_regular(path / "manifest.json")) or {}
        known = {key: manifest.get(key) for key in ("step", "world_size", "topology_digest", "created")}
        artifact = wandb.Artifact(f"checkpoint-{self._run.id}", type="checkpoint", metadata=known)
        # Digests of paths, not of contents: the run has checked these, and reading them again takes the disk's time.
        artifact.add_reference(path.absolute().as_uri(), checksum=False)
        self._run.log_artifact(artifact, aliases=["latest", f"step-{step}"])
        self._last = self._run.summary["checkpoint_step"] = step


def _ending(run_dir: Path, attempt: int | None) -> Ending | None:
    """How the attempt has ended, or without one the newest; None where nobody knows."""
    deadline = time.monotonic() + _VERDICT_S
    while True:
        status = owner = None
        with suppress(OSError, ValueError):
            status = read_record(run_dir / "status.json", Status)
        if attempt is None:
            return status.ending if status else None
        if status and status.attempt == attempt and status.outcome is not None:
            return status.ending
        with suppress(OSError, ValueError):
            owner = read_record(run_dir / "attempt.json", Attempt)
        if owner is None:
            return None
        if owner.number != attempt:
            return _told_by_the_next(run_dir, attempt)
        if time.monotonic() > deadline:  # all ranks were killed
            return Ending(outcome="failed", cause="it ended without a word")
        time.sleep(0.2)


def _told_by_the_next(run_dir: Path, attempt: int) -> Ending | None:
    """How an attempt has ended that another one has followed."""
    told: list[dict[str, Any]] = []
    with suppress(OSError):
        told = JsonlFile(run_dir / "attempts.jsonl").read(skip_garbled=True)
    return next((one.previous for one in valid_records(told, Attempt) if one.number == attempt + 1), None)


def _in_words(ending: Ending, run_dir: Path) -> str:
    """For an alert: cause, culprit, and where to look."""
    parts = [ending.cause or "no cause is known"]
    if ending.step is not None:
        parts.append(f"at step {ending.step}")
    if culprit := ending.culprit:
        seen = "" if culprit.step is None else f", seen last at step {culprit.step}"
        parts.append(f"at fault: rank {culprit.rank} on {culprit.host}{seen}")
    return f"{'; '.join(parts)}. See `dsbert status {run_dir}`."


if __name__ == "__main__":
    sys.exit(main())
