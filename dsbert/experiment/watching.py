"""How far the cells are that are at work, and a bar for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dsbert.base.errors import UserError
from dsbert.experiment.planning import Plan, run_directory
from dsbert.monitoring.run_status import read_status


def progress_of(plan: Plan, directory: Path) -> list[str]:
    """A line for each cell that has begun and is not over: its label, and the last step that was seen."""
    found = []
    for cell in plan.missing:
        step = _last_step(run_directory(directory, cell))
        if step is not None:
            found.append(f"{cell.label}: step {step} of {cell.recipe.optim.total_steps}")
    return found


def _last_step(run_dir: Path) -> int | None:
    """None of a run that has not begun."""
    with suppress(UserError):
        return read_status(run_dir).step
    return None


@contextmanager
def watched() -> Iterator[Callable[[Plan], None]]:
    """Call what it yields with the plan: a bar of steps over all cells with the time left; where standard error is no
    terminal, a line whenever a cell is done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    said = [-1]
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)

        def advance(plan: Plan) -> None:
            done = [cell for cell in plan.wanted if cell.name in plan.results]
            line = f"{len(done)} of {len(plan.wanted) + plan.unknown} cells"
            if bar.disable:
                if len(done) != said[0]:
                    console.print(f"dsbert: {line}", soft_wrap=True)
                said[0] = len(done)
                return
            steps = sum(cell.recipe.optim.total_steps for cell in done)
            total = sum(cell.recipe.optim.total_steps for cell in plan.wanted)
            bar.update(task, description=line, completed=steps / total)

        yield advance
