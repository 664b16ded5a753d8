"""Pictures of runs: losses and rate, speed, cost, and the time line of attempts; several runs in one picture each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsbert.monitoring.run_files import RunFiles, since
from dsbert.monitoring.run_status import RunStatus, read_run
from dsbert.monitoring.step_records import read_columns
from dsbert.reports.drawing import Picture, make_logarithmic, new_figure

_ENDS = {"done": "C2", "requeue": "C0", "failed": "C3", None: "C1"}
# Of a line: more are not seen, and a page of a long run would be large.
_MOST_POINTS = 2000
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ReportedRun:
    """A run as it is drawn. columns: of metrics.jsonl, by field, a number for each of its lines (step_records.py)."""

    files: RunFiles
    status: RunStatus
    columns: Mapping[str, Floats]

    @classmethod
    def read(cls, path: Path) -> ReportedRun:
        """Raises UserError where there is no run."""
        files, status = read_run(path)
        columns = read_columns(path, *since(files.attempt))
        return cls(files, status, {key: np.frombuffer(column) for key, column in columns.items()})

    def column(self, key: str) -> Floats:
        """A number for each line, NaN where it was not measured."""
        return self.columns.get(key, np.full(len(self.columns.get("step", ())), np.nan))

    def series(self, key: str, over: Floats | None = None) -> tuple[Floats, Floats]:
        """(steps, values) where the key was measured; of very many, means of neighbours. over: a number for each line,
        in place of steps."""
        over = self.column("step") if over is None else over
        known = ~np.isnan(self.column(key)) & ~np.isnan(over)
        return _thinned(over[known]), _thinned(self.column(key)[known])

    def step_seconds(self) -> Floats:
        """At each line, the seconds that all steps have taken up to there."""
        taken = np.diff(self.column("step"), prepend=0.0) * np.nan_to_num(self.column("step_s"))
        seconds: Floats = np.cumsum(taken)
        return seconds


def pictures_of(runs: Mapping[str, ReportedRun]) -> dict[str, Picture]:
    """By title. runs: by the name that they are shown with, each with at least one record."""
    return {title: draw(runs) for title, draw in PICTURES.items()}


def _losses(runs: Mapping[str, ReportedRun]) -> Picture:
    figure, (axes,) = new_figure()
    for number, (name, run) in enumerate(runs.items()):
        color = f"C{number % 10}"
        axes.plot(*run.series("loss_mlm"), color=color, alpha=0.35, linewidth=0.8)
        axes.plot(*run.series("val_mlm_loss"), "o-", color=color, markersize=3, label=label(f"{name}, held out"))
    axes.set(xlabel="step", ylabel="MLM loss, nats per masked token")
    axes.legend(frameon=False, fontsize="small")
    return Picture(figure)


def _rates(runs: Mapping[str, ReportedRun]) -> Picture:
    figure, (left, right) = new_figure(2)
    for number, (name, run) in enumerate(runs.items()):
        left.plot(*run.series("lr"), color=f"C{number % 10}", label=label(name))
        right.plot(*run.series("grad_norm"), color=f"C{number % 10}", linewidth=0.8)
    left.set(xlabel="step", ylabel="learning rate")
    right.set(xlabel="step", ylabel="gradient norm")
    make_logarithmic(right.yaxis)
    left.legend(frameon=False, fontsize="small")
    return Picture(figure)


def _speed(runs: Mapping[str, ReportedRun]) -> Picture:
    figure, (axes,) = new_figure()
    for number, (name, run) in enumerate(runs.items()):
        axes.plot(*run.series("tokens_per_s"), color=f"C{number % 10}", label=label(name))
    axes.set(xlabel="step", ylabel="tokens a second, all ranks", ylim=(0, None))
    axes.legend(frameon=False, fontsize="small")
    return Picture(figure)


def _cost(runs: Mapping[str, ReportedRun]) -> Picture:
    """Against FLOPs, and against seconds of steps."""
    figure, (left, right) = new_figure(2)
    for number, (name, run) in enumerate(runs.items()):
        for axes, cost in ((left, run.column("flops_total")), (right, run.step_seconds())):
            color = f"C{number % 10}"
            axes.plot(*run.series("loss_mlm", cost), color=color, alpha=0.35, linewidth=0.8)
            axes.plot(*run.series("val_mlm_loss", cost), "o-", color=color, markersize=3, label=label(name))
    left.set(xlabel="FLOPs", ylabel="MLM loss; dots: held out")
    right.set(xlabel="seconds of steps", ylabel="MLM loss; dots: held out")
    left.legend(frameon=False, fontsize="small")
    return Picture(figure)


def _time_line(runs: Mapping[str, ReportedRun]) -> Picture:
    """Attempts as bars, colored by how they ended; what lies between them is lost."""
    figure, (axes,) = new_figure(height=1.2 + 0.5 * len(runs))
    longest = max(run.status.spending.total for run in runs.values())
    unit, unit_name = (3600.0, "hours") if longest > 3 * 3600 else (60.0, "minutes")
    for row, run in enumerate(runs.values()):
        starts = [one.started for one in run.status.attempts if one.started is not None]
        for one in run.status.attempts:
            if one.started is None:
                continue
            length = (one.ended if one.ended is not None else run.files.now) - one.started
            left, color = (one.started - min(starts)) / unit, _ENDS.get(one.outcome, "C1")
            axes.barh(row, length / unit, left=left, color=color, height=0.6, edgecolor="white")
    axes.set(xlabel=f"{unit_name} since the first start", yticks=range(len(runs)))
    axes.set_yticklabels([name if len(name) <= 30 else f"…{name[-29:]}" for name in runs])
    axes.grid(visible=False, axis="y")
    for outcome, color in _ENDS.items():
        axes.barh(0, 0, color=color, label=outcome or "without a word, or goes on")
    axes.legend(frameon=False, fontsize="small", ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0))
    return Picture(figure)


def label(name: str) -> str:
    """Of a legend, which leaves out what begins with "_"."""
    return f" {name}" if name.startswith("_") else name


def _thinned(values: Floats) -> Floats:
    """At most _MOST_POINTS: means of as many neighbours each."""
    times = -(-len(values) // _MOST_POINTS)
    if times <= 1:
        return values
    starts = np.arange(0, len(values), times)
    means: Floats = np.add.reduceat(values, starts) / np.diff(np.append(starts, len(values)))
    return means


# By title, in their order on the page.
PICTURES: dict[str, Callable[[Mapping[str, ReportedRun]], Picture]] = {
    "Loss over the run": _losses,
    "Learning rate and gradient norm": _rates,
    "Speed": _speed,
    "Loss and what it cost": _cost,
    "Time line": _time_line,
}
