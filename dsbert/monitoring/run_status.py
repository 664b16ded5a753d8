"""All that is to be said of how a run goes, in one record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsbert.monitoring.card_peaks import peak_flops_per_s
from dsbert.monitoring.run_files import RunFiles, read_files
from dsbert.monitoring.standing import Standing, heartbeat_age_s, standing
from dsbert.monitoring.step_records import StepLog
from dsbert.monitoring.timeline import Spending, Stretch, spending, step_seconds, stretches

# Losses are shown over the run by so many points.
CURVE_POINTS = 30


@dataclass(frozen=True)
class SlowestRank:
    """By the newest record that says so: own_s: seconds of its own a step, without waiting for others; median_s: the
    median rank's; cause: data, compute, save or other; straggler: it was named as one and has not kept up since."""

    rank: int
    host: str | None
    own_s: float
    median_s: float
    ratio: float
    cause: str
    straggler: bool


@dataclass(frozen=True)
class RunStatus:
    """How a run goes. Seconds, steps, tokens; None where it is not known (yet).

    step: the newest that is known, of total_steps; eta_s: until the last step, by the newest records, evaluations and
    saves included. loss: of the newest record; val_loss: held-out MLM loss, of the newest evaluation; curve: training
    losses over the run, at most CURVE_POINTS. flops_per_s: of all ranks, by the paper's count, of weights that are
    kept; mfu: the share of what the cards can do at most that this is (card_peaks.py). slowest: the rank that has taken
    fewest steps, if not all have taken as many. slowest_rank: by its own time, None in a world of one.
    """

    run: str
    name: str | None
    standing: Standing
    ranks: int | None
    hosts: tuple[str, ...]
    step: int
    total_steps: int | None
    eta_s: float | None
    loss: float | None
    val_loss: float | None
    curve: tuple[float, ...]
    step_s: float | None
    tokens_per_s: float | None
    flops_per_s: float | None
    mfu: float | None
    skipped: int
    attempts: tuple[Stretch, ...]
    spending: Spending
    checkpoint: str | None
    checkpoint_age_s: float | None
    heartbeat_age_s: float | None
    slowest: str | None
    slowest_rank: SlowestRank | None

    @property
    def lost_steps(self) -> int:
        """Taken again after restarts."""
        return sum(one.lost_steps for one in self.attempts)

    def to_json(self) -> dict[str, Any]:
        """For scripts: as the fields, and what follows from them."""
        values = asdict(self)
        state = values.pop("standing")
        derived = {"lost_steps": self.lost_steps, "goodput": self.spending.goodput, "restarts": self.restarts}
        return {"run": values.pop("run"), **state, **values, **derived}

    @property
    def restarts(self) -> int:
        return max(0, len(self.attempts) - 1)


def read_status(path: Path) -> RunStatus:
    """Of the run in a directory. Raises UserError where there is none."""
    return read_run(path)[1]


def read_run(path: Path, log: StepLog | None = None) -> tuple[RunFiles, RunStatus]:
    """The same with what it was read from. Who seems to be gone may have ended, or have been followed by another
    attempt, while the files were read: then they say so now. log: of this run, where it is looked at again and
    again."""
    log = log or StepLog(path)
    files = read_files(path, log)
    status = status_of(files)
    if status.standing.state != "killed":
        return files, status
    files = read_files(path, log)
    return files, status_of(files)


def status_of(files: RunFiles) -> RunStatus:
    """Of what was read."""
    found, last = standing(files), files.metrics.last
    attempts = stretches(files, found.at_work)
    at_work = found.at_work
    # Heartbeats know of steps whose records were not written, also once the ranks are gone.
    step = max([int(last.get("step", 0)), *(seen.beat.step for seen in files.beats)])
    losses = files.metrics.losses
    seconds = step_seconds(files)
    flops_per_s = _flops_per_s(files, seconds)
    return RunStatus(
        run=str(files.path),
        name=files.name,
        standing=found,
        ranks=files.attempt.world_size if files.attempt else None,
        hosts=tuple(sorted({seen.beat.host for seen in files.beats})),
        step=step,
        total_steps=files.total_steps,
        eta_s=_eta_s(files, step) if found.state in ("running", "starting") else None,
        loss=losses[-1] if losses else None,
        val_loss=files.metrics.val_loss,
        curve=thinned(losses, CURVE_POINTS),
        step_s=seconds,
        tokens_per_s=last.get("tokens_per_s"),
        flops_per_s=flops_per_s,
        mfu=_mfu(files, flops_per_s),
        skipped=files.metrics.skipped,
        attempts=tuple(attempts),
        spending=spending(files, attempts),
        checkpoint=files.saved[0] if files.saved else None,
        checkpoint_age_s=max(0.0, files.now - files.saved[1]) if files.saved else None,
        heartbeat_age_s=heartbeat_age_s(files) if at_work else None,
        slowest=_slowest(files) if at_work else None,
        slowest_rank=_slowest_rank(files),
    )


def thinned(values: Sequence[float], most: int) -> tuple[float, ...]:
    """At most so many, evenly spread, the last among them."""
    if len(values) <= most:
        return tuple(values)
    return tuple(values[round(index * (len(values) - 1) / (most - 1))] for index in range(most))


def _eta_s(files: RunFiles, step: int) -> float | None:
    """By the clock between the newest records of this attempt; by the time of steps where there is one only."""
    if files.total_steps is None:
        return None
    started = (files.attempt.started if files.attempt else None) or 0.0
    recent = [one for one in files.metrics.recent if one.get("time", -1.0) >= started]
    left = max(0, files.total_steps - step)
    if len(recent) > 1 and recent[-1]["step"] > recent[0]["step"] and recent[-1]["time"] > recent[0]["time"]:
        return float(left * (recent[-1]["time"] - recent[0]["time"]) / (recent[-1]["step"] - recent[0]["step"]))
    seconds = step_seconds(files)
    return None if seconds is None else left * seconds


def _flops_per_s(files: RunFiles, seconds: float | None) -> float | None:
    last = files.metrics.last
    flops = last.get("flops_total")
    return flops / last["step"] / seconds if flops is not None and seconds else None


def _mfu(files: RunFiles, flops_per_s: float | None) -> float | None:
    peak, ranks = peak_flops_per_s(files.config), files.attempt.world_size if files.attempt else None
    return flops_per_s / (peak * ranks) if flops_per_s is not None and peak and ranks else None


def _slowest(files: RunFiles) -> str | None:
    steps = {seen.beat.step for seen in files.beats}
    if len(steps) < 2:
        return None
    beat = min(files.beats, key=lambda seen: seen.beat.step).beat
    return f"rank {beat.rank} on {beat.host} at step {beat.step} in phase {beat.phase}"


def _slowest_rank(files: RunFiles) -> SlowestRank | None:
    last, words = files.metrics.last, files.metrics.words
    if not {"slowest_rank", "slowest_own_s", "own_s", "slowest_ratio"} <= last.keys():
        return None
    rank = int(last["slowest_rank"])
    return SlowestRank(
        rank=rank,
        host=next((seen.beat.host for seen in files.beats if seen.beat.rank == rank), None),
        own_s=last["slowest_own_s"],
        median_s=last["own_s"],
        ratio=last["slowest_ratio"],
        cause=words.get("slowest_cause", "unknown"),
        straggler=str(rank) in words.get("stragglers", "").split(","),
    )
