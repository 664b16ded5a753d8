"""Progress bars on standard error. rich is imported when a bar is shown."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dsbert.base.errors import printable

_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))


@contextmanager
def stage_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar per stage on standard error: call what it yields with (stage, done, total)."""
    from rich.console import Console
    from rich.progress import Progress, TaskID

    with Progress(console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage)
            bars.update(tasks[stage], completed=done, total=total or None)

        yield show


@contextmanager
def overall_bar(weights: Mapping[str, float], show: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """One bar with an estimate of the time left over several stages: call what it yields with (stage, done, total).

    weights: what each stage takes of the whole, in order; others take nothing. Where standard error is no terminal, a
    line for each stage and at every fifth of it.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description:<16}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(True))
    whole, names, said = sum(weights.values()), list(weights), [""]
    with Progress(*columns, console=console, disable=not (show and console.is_terminal)) as bar:
        task = bar.add_task("", total=1.0)

        def advance(stage: str, done: int, total: int) -> None:
            fraction = done / total if total else 0.0
            if stage in weights:
                before = sum(weights[name] for name in names[: names.index(stage)])
                bar.update(task, description=stage, completed=(before + fraction * weights[stage]) / whole)
            line = f"{stage} {int(5 * fraction) * 20} %"
            if show and bar.disable and line != said[0]:
                said[0] = line
                console.print(line, soft_wrap=True)

        yield advance


class TrainingBar:
    """A progress bar on standard error; where that is no terminal, a line a minute and one at the end."""

    def __init__(
        self, total: int, step: int, every_s: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """total, step: optimizer steps of the run, and those taken. every_s: between lines; the first comes with the
        first step, for whoever waits to see that it goes."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(stderr=True, highlight=False)
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._progress.add_task("", total=total, completed=step)
        self._total, self._speed = total, ""
        self._clock, self._every_s = clock, every_s
        self._first, self._said = (step, clock()), (step, -math.inf)  # (steps taken, when)
        self._progress.start()

    def show(self, record: dict[str, Any], objective: str) -> None:
        """Take speed, and validation of an objective, from a record of metrics.jsonl."""
        self._speed = f"{record['tokens_per_s']:,.0f} tokens/s"
        loss = record[f"val_{objective}_loss"]
        if loss is not None:
            self.print(f"step {record['step']}: held-out {objective.upper()} loss {loss:.3f}, dof {record['dof']:.2f}")

    def advance(self, step: int, losses: Mapping[str, float], lr: float, grad_norm: float) -> None:
        """Move to `step`, which had these losses by objective: their sum is shown, and the first one."""
        name, first = next(iter(losses.items()))
        text = f"loss {sum(losses.values()):.3f}  {name} {first:.3f}"
        self._progress.update(self._task, completed=step, description=f"{text}  {self._speed}".rstrip())
        now = self._clock()
        if not self._progress.disable or (now - self._said[1] < self._every_s and step < self._total):
            return
        before = self._first if self._said[1] == -math.inf else self._said
        step_s = (now - before[1]) / max(step - before[0], 1)
        left_s = (now - self._first[1]) / max(step - self._first[0], 1) * (self._total - step)
        self._said = (step, now)
        self.print(
            f"{time.strftime('%H:%M:%S')}  step {step} of {self._total}  {text}  lr {lr:.2e}  grad {grad_norm:.3g}  "
            f"{step_s:.3g} s a step  {self._speed + '  ' if self._speed else ''}{_memory()}  "
            f"{duration(left_s)} left"
        )

    def print(self, line: str) -> None:
        """A line above the bar."""
        self._console.print(f"dsbert: {printable(line)}", soft_wrap=True, markup=False, emoji=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._progress.stop()


def duration(seconds: float) -> str:
    """In the largest unit that fits, with one digit where it is small: 45 s, 3.5 min, 12 h."""
    for size, unit in _UNITS:
        if round(seconds) >= size:
            value = seconds / size
            return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"
    return f"{seconds:.0f} s"


def _memory() -> str:
    """The most that this process has had resident, and that its tensors have taken on a GPU."""
    resident = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB"
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return resident
    return f"{resident}, GPU {torch.cuda.max_memory_allocated() / 1e9:.2f} GB"
