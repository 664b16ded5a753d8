"""What a run is at, as its files tell it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsbert.cluster.heartbeats import gone
from dsbert.monitoring.run_files import RunFiles

State = Literal["queued", "starting", "running", "silent", "killed", "requeued", "failed", "done"]
# Clocks of machines differ, and a file system shows a file's time late.
_SLACK_S = 30.0
# From an attempt's claim of the run to the first heartbeat.
_START_S = 120.0


@dataclass(frozen=True)
class Standing:
    """A run's state, and why.

    queued: a job was submitted and has not begun. starting: the ranks are up and have taken no step. running: they
    beat. silent: they do not, and the machine where they run cannot be looked at from here, or they are suspended.
    killed: they are gone without a word. requeued: saved, and waits for its next start. failed, done: as it said.
    """

    state: State
    why: str = ""


def standing(files: RunFiles) -> Standing:
    """Of a run: by what it said last, else by its heartbeats."""
    attempt, ended = files.attempt, files.ended
    waiting = files.job is not None and (attempt is None or files.job[1] > (attempt.started or 0.0))
    if ended is not None:
        found = _of_ending(files)
        return Standing("queued", f"job {files.job[0]}") if waiting and found.state != "done" and files.job else found
    if attempt is None:
        return Standing("queued", f"job {files.job[0]}" if files.job else "")
    alive = _alive(files)
    if alive.state in ("killed", "silent") and waiting and files.job:
        return Standing("queued", f"job {files.job[0]}")
    return alive


def _of_ending(files: RunFiles) -> Standing:
    status = files.ended
    assert status is not None
    if status.outcome == "done":
        return Standing("done")
    if status.outcome == "requeue":
        return Standing("requeued", status.cause or "")
    culprit = status.culprit
    who = f" (rank {culprit.rank} on {culprit.host})" if culprit else ""
    return Standing("failed", f"{status.cause or 'without a reason'}{who}")


def _alive(files: RunFiles) -> Standing:
    """Of an attempt that has not said that it is over."""
    age = heartbeat_age_s(files)
    if age is None:
        fresh = files.attempt is not None and files.now - (files.attempt.started or 0.0) < _START_S
        return Standing("starting" if fresh else "killed", "no rank was heard")
    lost = [culprit for seen in files.beats if (culprit := gone(seen.beat))]
    stopped = next((culprit for culprit in lost if culprit.how == "was stopped"), None)
    if stopped:
        return Standing("silent", str(stopped))
    left = [
        f"rank {beat.rank} on {beat.host} left with exit code {beat.ended.code} ({beat.ended.cause})"
        for beat in (seen.beat for seen in files.beats)
        if beat.ended
    ]
    why = next(iter([*map(str, lost), *left]), "")
    if len(lost) + len(left) == len(files.beats):
        return Standing("killed", why)
    if age > 2.2 * max(seen.beat.interval_s for seen in files.beats) + _SLACK_S and not why:
        silent = min(files.beats, key=lambda seen: seen.time).beat
        return Standing("silent", f"rank {silent.rank} on {silent.host} was heard {age:.0f} s ago")
    first = files.attempt.checkpoint if files.attempt else None
    began = int(first.removeprefix("step_")) if first else 0
    moves = any(seen.beat.step > began for seen in files.beats)
    return Standing("running" if moves else "starting", why or ("" if moves else files.beats[0].beat.phase))


def heartbeat_age_s(files: RunFiles) -> float | None:
    """Of the rank that was heard last of all; None where none was heard."""
    times = [seen.time for seen in files.beats]
    return max(0.0, files.now - min(times)) if times else None
