"""What a run is at, as its files tell it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsbert.base.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_NO_CHECKPOINT, EXIT_OK, EXIT_REQUEUE, EXIT_USER
from dsbert.base.progress import duration
from dsbert.cluster.heartbeats import SeenBeat, gone
from dsbert.monitoring.run_files import RunFiles, first_step

State = Literal["queued", "starting", "running", "silent", "killed", "requeued", "failed", "done"]
# Clocks of machines differ, and a file system shows a file's time late.
_SLACK_S = 30.0
# From an attempt's claim of the run to the first heartbeat.
_START_S = 120.0
# After these slurm/job.sh does not requeue its job: it would only happen again.
_FINAL = {EXIT_INTERNAL, EXIT_USER, EXIT_NO_CHECKPOINT, EXIT_INTERRUPTED}


@dataclass(frozen=True)
class Standing:
    """A run's state, and why.

    queued: a job was submitted and has not begun. starting: the ranks are up and have taken no step. running: they
    beat. silent: they do not, and the machine where they run cannot be looked at from here, or they are suspended.
    killed: they are gone without a word. requeued: over for now, to go on in its next start: it has saved, or a rank of
    a job was lost. failed, done: as it said.
    """

    state: State
    why: str = ""

    @property
    def at_work(self) -> bool:
        """Whether there are ranks, as far as anybody knows."""
        return self.state in ("starting", "running", "silent")

    @property
    def over(self) -> bool:
        """Whether nothing more happens by itself."""
        return self.state in ("done", "failed", "killed")


def standing(files: RunFiles) -> Standing:
    """Of a run: by what it said last, else by its heartbeats."""
    fresh = [seen for seen in files.coming if files.now - seen.time < _patience_s([seen]) and not seen.beat.ended]
    if fresh and (files.ended is None or (files.ended.time or 0.0) < max(seen.time for seen in fresh)):
        return Standing("starting", fresh[0].beat.phase)
    found = _of_ending(files) if files.ended else _alive(files) if files.attempt else None
    if found is not None and (found.at_work or found.state == "done"):
        return found
    waiting = _waiting(files)
    if waiting is None:
        return found or Standing("killed", "its ranks met, and never began")
    before = f"; before: {found.state}" + (f" ({found.why})" if found.why else "") if found else ""
    return Standing("queued", waiting + before)


def heartbeat_age_s(files: RunFiles) -> float | None:
    """Of the rank that was heard last of all that have not left; None where none was heard."""
    times = [seen.time for seen in files.beats if not seen.beat.ended]
    return max(0.0, files.now - min(times)) if times else None


def _waiting(files: RunFiles) -> str | None:
    """The job that was submitted after the newest attempt, which is another's."""
    attempt = files.attempt
    if files.job is None:
        return None
    job_id, submitted = files.job
    if attempt is not None and (job_id in (attempt.job, attempt.job_id) or submitted <= (attempt.started or 0.0)):
        return None
    return f"job {job_id}, submitted {duration(max(0.0, files.now - submitted))} ago"


def _of_ending(files: RunFiles) -> Standing:
    status, attempt = files.ended, files.attempt
    assert status is not None
    if status.outcome == "done":
        return Standing("done")
    if status.outcome == "requeue":
        return Standing("requeued", status.cause or "")
    culprit = status.culprit
    why = f"{status.cause or 'without a reason'}{f' (rank {culprit.rank} on {culprit.host})' if culprit else ''}"
    return _lost(files, "failed", why) if attempt else Standing("failed", why)


def _lost(files: RunFiles, state: Literal["failed", "killed"], why: str) -> Standing:
    """A job requeues itself, but where a rank has left with what is final; the heartbeats know."""
    codes = {seen.beat.ended.code for seen in files.beats if seen.beat.ended}
    job_id = files.attempt.job if files.attempt else None
    if job_id is None or codes & _FINAL or (state == "failed" and not files.beats):
        return Standing(state, why)
    return Standing("requeued", f"{why}; job {job_id} requeues itself, unless it has given up")


def _alive(files: RunFiles) -> Standing:
    """Of an attempt that has not said that it is over."""
    attempt, beats = files.attempt, files.beats
    if not beats:
        if files.closed:
            return Standing("silent", "its heartbeats cannot be read")
        fresh = attempt is not None and files.now - (attempt.started or 0.0) < _START_S
        return Standing("starting" if fresh else "killed", "no rank was heard")
    lost = {seen.beat.rank: culprit for seen in beats if (culprit := gone(seen.beat))}
    stopped = next((culprit for culprit in lost.values() if culprit.how == "was stopped"), None)
    if stopped:
        return Standing("silent", str(stopped))
    left = [seen.beat for seen in beats if seen.beat.ended]
    codes = {beat.ended.code for beat in left if beat.ended}
    why = next(map(str, lost.values()), "") or next(
        (f"rank {b.rank} on {b.host} left with exit code {b.ended.code} ({b.ended.cause})" for b in left if b.ended), ""
    )
    present = [seen for seen in beats if not seen.beat.ended and seen.beat.rank not in lost]
    if not present:
        if codes and not lost and codes <= {EXIT_OK, EXIT_REQUEUE}:  # and status.json could not be written
            return Standing("requeued" if EXIT_REQUEUE in codes else "done")
        return _lost(files, "killed", why)
    oldest = min(present, key=lambda seen: seen.time)
    if files.now - oldest.time > _patience_s(present):
        beat = oldest.beat
        return Standing("silent", f"rank {beat.rank} on {beat.host} was heard {duration(files.now - oldest.time)} ago")
    moves = any(seen.beat.step > first_step(attempt) for seen in beats)
    return Standing("running" if moves else "starting", why or ("" if moves else beats[0].beat.phase))


def _patience_s(beats: list[SeenBeat]) -> float:
    return 2.2 * max(seen.beat.interval_s for seen in beats) + _SLACK_S
