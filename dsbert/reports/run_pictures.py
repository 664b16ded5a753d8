"""Pictures of runs: losses and rate, speed, cost, and the time line of attempts; several runs in one picture each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsbert.monitoring.run_files import RunFiles
from dsbert.monitoring.run_status import RunStatus
from dsbert.reports.drawing import Picture, new_figure

_ENDS = {"done": "C2", "requeue": "C0", "failed": "C3", None: "C1"}


def pictures_of(runs: Mapping[str, tuple[RunFiles, RunStatus]]) -> dict[str, Picture]:
    """By title. runs: by the name that they are shown with, each with at least one record."""
    return {
        "Loss over the run": _losses(runs),
        "Learning rate and gradient norm": _rates(runs),
        "Speed": _speed(runs),
        "Held-out loss and what it cost": _cost(runs),
        "Time line": _time_line(runs),
    }


def _losses(runs: Mapping[str, tuple[RunFiles, RunStatus]]) -> Picture:
    figure, (axes,) = new_figure()
    for number, (name, (files, _)) in enumerate(runs.items()):
        color = f"C{number % 10}"
        axes.plot(*series(files, "loss_mlm"), color=color, alpha=0.35, linewidth=0.8)
        axes.plot(*series(files, "val_mlm_loss"), "o-", color=color, markersize=3, label=label(f"{name}, held out"))
    axes.set(xlabel="step", ylabel="MLM loss, nats per masked token")
    axes.legend(frameon=False, fontsize="small")
    return Picture(figure)


def _rates(runs: Mapping[str, tuple[RunFiles, RunStatus]]) -> Picture:
    figure, (left, right) = new_figure(2)
    for number, (name, (files, _)) in enumerate(runs.items()):
        left.plot(*series(files, "lr"), color=f"C{number % 10}", label=label(name))
        right.plot(*series(files, "grad_norm"), color=f"C{number % 10}", linewidth=0.8)
    left.set(xlabel="step", ylabel="learning rate")
    right.set(xlabel="step", ylabel="gradient norm", yscale="log")
    left.legend(frameon=False, fontsize="small")
    return Picture(figure)


def _speed(runs: Mapping[str, tuple[RunFiles, RunStatus]]) -> Picture:
    figure, (axes,) = new_figure()
    for number, (name, (files, _)) in enumerate(runs.items()):
        axes.plot(*series(files, "tokens_per_s"), color=f"C{number % 10}", label=label(name))
    axes.set(xlabel="step", ylabel="tokens a second, all ranks", ylim=(0, None))
    axes.legend(frameon=False, fontsize="small")
    return Picture(figure)


def _cost(runs: Mapping[str, tuple[RunFiles, RunStatus]]) -> Picture:
    """Against FLOPs, and against seconds of steps."""
    figure, (left, right) = new_figure(2)
    for number, (name, (files, _)) in enumerate(runs.items()):
        seconds, flops, losses = 0.0, [], []
        times, before = [], 0
        for record in files.metrics:
            seconds += _number(record, "step_s") * (record["step"] - before)
            before = record["step"]
            if record.get("val_mlm_loss") is not None:
                flops.append(_number(record, "flops_total"))
                times.append(seconds)
                losses.append(record["val_mlm_loss"])
        left.plot(flops, losses, "o-", markersize=3, color=f"C{number % 10}", label=label(name))
        right.plot(times, losses, "o-", markersize=3, color=f"C{number % 10}")
    left.set(xlabel="FLOPs", ylabel="held-out MLM loss")
    right.set(xlabel="seconds of steps", ylabel="held-out MLM loss")
    left.legend(frameon=False, fontsize="small")
    return Picture(figure)


def _time_line(runs: Mapping[str, tuple[RunFiles, RunStatus]]) -> Picture:
    """Attempts as bars, colored by how they ended; what lies between them is lost."""
    figure, (axes,) = new_figure(height=1.2 + 0.5 * len(runs))
    longest = max(status.spending.total for _, status in runs.values())
    unit, name = (3600.0, "hours") if longest > 3 * 3600 else (60.0, "minutes")
    for row, (files, status) in enumerate(runs.values()):
        starts = [one.started for one in status.attempts if one.started is not None]
        for one in status.attempts:
            if one.started is None:
                continue
            length = (one.ended if one.ended is not None else files.now) - one.started
            since, color = (one.started - min(starts)) / unit, _ENDS.get(one.outcome, "C1")
            axes.barh(row, length / unit, left=since, color=color, height=0.6, edgecolor="white")
    axes.set(xlabel=f"{name} since the first start", yticks=range(len(runs)))
    axes.set_yticklabels([run if len(run) <= 30 else f"…{run[-29:]}" for run in runs])
    axes.grid(visible=False, axis="y")
    for outcome, color in _ENDS.items():
        axes.barh(0, 0, color=color, label=outcome or "without a word, or goes on")
    axes.legend(frameon=False, fontsize="small", ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0))
    return Picture(figure)


def label(name: str) -> str:
    """Of a legend, which leaves out what begins with "_"."""
    return f" {name}" if name.startswith("_") else name


def series(files: RunFiles, key: str) -> tuple[Sequence[int], Sequence[float]]:
    """(steps, values) where the key was measured."""
    kept = [(record["step"], record[key]) for record in files.metrics if isinstance(record.get(key), int | float)]
    return [step for step, _ in kept], [value for _, value in kept]


def _number(record: Mapping[str, Any], key: str) -> float:
    value = record.get(key)
    return float(value) if isinstance(value, int | float) else 0.0
