"""`dsbert experiment`: train a matrix of runs, and show what came out."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsbert.base.errors import UserError
from dsbert.cli.checkpoints import as_json_option, show
from dsbert.cli.parameters import PathName, examples

if TYPE_CHECKING:
    from dsbert.experiment.definition import Experiment
    from dsbert.experiment.planning import Plan

_file = click.argument("file", metavar="FILE", type=PathName())
_directory = click.option(
    "--dir", "directory", type=PathName(), help="Where cells are trained. Default: runs/experiments."
)
_size = click.option("--size", help="One of the sizes that FILE has. Default: its first.")
_records = click.option(
    "--records", type=PathName(), help="Results that `collect` has written: shown beside those in --dir."
)
_DEFAULT = Path("runs/experiments")


class _Group(click.Group):
    """A first word that is no subcommand is the file of `dsbert experiment run`."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["run", *args]
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Group,
    epilog=examples(
        "dsbert experiment experiments/smoke.yaml --dir runs/smoke --jobs 2",
        "dsbert experiment table experiments/smoke.yaml --dir runs/smoke --format markdown",
        "dsbert experiment experiments/blocks.yaml --size paper --slurm --nodes 4 --gpus-per-node 8 --time 24:00:00",
    ),
)
def experiment() -> None:
    """Train the runs that a FILE declares (arms, grid, seeds, sweeps), and show tables and plots of them.

    `dsbert experiment FILE` is short for `dsbert experiment run FILE`. A run that is done is never trained again, also
    if another file wants it; what was killed goes on; callers share the work.
    """


@experiment.command(epilog=examples("dsbert experiment experiments/smoke.yaml --dir runs/smoke --dry-run"))
@_file
@_size
@_directory
@click.option("--jobs", type=click.IntRange(1, 1024), default=1, show_default=True, help="Trainings at a time.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Of each training. Default: the cores shared out.")
@click.option("--dry-run", is_flag=True, help="Show the plan, with hours from a few timed steps; train nothing.")
@click.option("--slurm", is_flag=True, help="Submit what is missing as array jobs; the options below go with it.")
@click.option("--nodes", type=click.IntRange(min=1), help="Of each cell's job.")
@click.option("--time", help="The limit of one start of a cell, as SLURM writes it.")
@click.option("--gpus-per-node", metavar="[TYPE:]N")
@click.option("--ntasks-per-node", type=click.IntRange(min=1))
@click.option("--cpus-per-task", type=click.IntRange(min=1))
@click.option("--partition")
@click.option("--account")
@click.option("--array", help="Which cells, and how many at a time, as 1-40%8. Default: all.")
@click.option("--setup", multiple=True, help="As in `dsbert submit`. Repeatable.")
@click.option("--sbatch", "further", multiple=True, help="Any option of sbatch, as --mem=64G. Repeatable.")
@as_json_option
def run(
    file: Path, size: str | None, directory: Path | None, jobs: int, threads: int | None, dry_run: bool, slurm: bool,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Train what is missing of FILE."""
    from dsbert.experiment.definition import load_experiment
    from dsbert.experiment.planning import make_plan
    from dsbert.experiment.runner import Runner, prepare_data, say, threads_for

    declared, place = load_experiment(file, size), directory or _DEFAULT
    threads = threads or threads_for(jobs)
    if slurm:
        _submit(declared, place, options, dry_run=dry_run, as_json=as_json)
        return
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    if given:
        raise UserError(f"expected --slurm with {', '.join(given)}, found none: these are options of its jobs")
    if dry_run:
        place.mkdir(parents=True, exist_ok=True)
        prepare_data(declared, place, say)
        _show_plan(make_plan(declared, place), place, jobs, threads, as_json=as_json)
        return
    from dsbert.experiment.watching import watched

    with watched() as advance:
        plan, code = Runner(declared, place, jobs, threads, say, advance).run()
    found = _summary(plan)
    show(found, as_json, heading=f"{declared.name} in {place}")
    raise SystemExit(code)


@experiment.command()
@_file
@_size
@_directory
@_records
@as_json_option
def status(file: Path, size: str | None, directory: Path | None, records: Path | None, as_json: bool) -> None:
    """How far it is: cells done, at work, missing."""
    from dsbert.experiment.watching import progress_of

    place = directory or _DEFAULT
    plan = _plan(file, size, place, records)
    show(_summary(plan) | {"at work": progress_of(plan, place) or "none"}, as_json, heading=f"{file} in {place}")


@experiment.command()
@_file
@_size
@_directory
@_records
@click.option(
    "--format", "form", type=click.Choice(["terminal", "markdown", "latex", "csv", "json"]), default="terminal"
)
@click.option("--cells", is_flag=True, help="Also every cell, with its run.")
def table(file: Path, size: str | None, directory: Path | None, records: Path | None, form: str, cells: bool) -> None:
    """Losses with 95 % intervals, and differences paired by seed; missing cells are marked."""
    from dsbert.experiment.result_tables import cells_table, main_tables, notes

    plan = _plan(file, size, directory or _DEFAULT, records)
    tables = main_tables(plan)
    if cells:
        tables.append(cells_table(plan))
    _print_tables(tables, notes(plan), form)


@experiment.command()
@_file
@_size
@_directory
@_records
@click.option("--to", type=PathName(), required=True, help="A folder for page.html and the pictures.")
def plot(file: Path, size: str | None, directory: Path | None, records: Path | None, to: Path) -> None:
    """Losses against FLOPs and seconds, curves, and one HTML page that needs no network."""
    from dsbert.experiment.page import experiment_page
    from dsbert.experiment.plots import file_name, pictures

    plan = _plan(file, size, directory or _DEFAULT, records)
    to.mkdir(parents=True, exist_ok=True)
    command = shlex.join(
        ["dsbert", "experiment", "plot", str(file), *(["--size", size] if size else []), "--to", str(to)]
    )
    (to / "page.html").write_text(experiment_page(plan, command), encoding="utf-8")
    for title, svg in pictures(plan).items():
        (to / file_name(title)).write_text(svg, encoding="utf-8")
    print(to / "page.html")


@experiment.command()
@_file
@_size
@_directory
@click.option("--to", type=PathName(), required=True, help="A file; what it holds already stays.")
def collect(file: Path, size: str | None, directory: Path | None, to: Path) -> None:
    """Write the results, a line per cell: small enough for a repository, and enough for `table` and `plot`."""
    from dsbert.experiment.cell_results import load_records, save_records

    plan = _plan(file, size, directory or _DEFAULT, to)
    save_records(to, {**load_records(to), **plan.results})
    print(f"{len(plan.results)} of {len(plan.wanted)} cells: {to}")


def _plan(file: Path, size: str | None, directory: Path, records: Path | None) -> Plan:
    from dsbert.experiment.definition import load_experiment
    from dsbert.experiment.planning import make_plan

    return make_plan(load_experiment(file, size), directory, records)


def _summary(plan: Plan) -> dict[str, Any]:
    done = sum(cell.name in plan.results for cell in plan.wanted)
    found: dict[str, Any] = {"done": f"{done} of {len(plan.wanted)} cells"}
    if plan.unknown:
        found["after the sweep"] = f"{plan.unknown} more"
    if plan.given_up:
        found["failed twice"] = [cell.label for cell in plan.cells if cell.name in plan.given_up]
    return found


def _show_plan(plan: Plan, directory: Path, jobs: int, threads: int, *, as_json: bool) -> None:
    from dsbert.base.progress import stage_bars
    from dsbert.experiment.timing import hours, seconds_per_step

    with stage_bars() as bars:
        per_step = seconds_per_step(plan, directory, threads, lambda done, total: bars("times", done, total))
    flops = sum(cell.flops for cell in plan.missing)
    left = hours(plan.missing, per_step)
    if as_json:
        cells = [{"cell": cell.label, "name": cell.name, "flops": cell.flops} for cell in plan.missing]
        show({"missing": cells, "after_sweep": plan.unknown, "hours": left, "flops": flops}, True)
        return
    for cell in plan.missing:
        print(f"{cell.name}  {hours([cell], per_step) * 60:8.1f} min  {cell.label}")
    found = _summary(plan) | {
        "missing": f"{len(plan.missing)} cells, at most {flops:.3g} FLOPs",
        "hours": f"{left:.2f} of one training after the other with {threads} threads; {left / jobs:.2f} with "
        f"--jobs {jobs} if they do not slow each other",
    }
    show(found, False, heading=f"{plan.experiment.name} in {directory}")


def _submit(experiment: Experiment, directory: Path, options: dict[str, Any], *, dry_run: bool, as_json: bool) -> None:
    from dsbert.experiment.array_jobs import submit_missing
    from dsbert.experiment.planning import make_plan
    from dsbert.experiment.runner import prepare_data, say

    for name in ("nodes", "time"):
        if not options[name]:
            raise UserError(f"expected --{name} with --slurm, found none")
    prepare_data(experiment, directory, say)
    plan = make_plan(experiment, directory)
    for result in submit_missing(plan, directory, options, dry_run=dry_run, say=say):
        if dry_run and not as_json:
            print(result["text"], end="")
        else:
            show(
                result if as_json else {key: result[key] for key in ("job_id", "script")}, as_json, heading="submitted"
            )


def _print_tables(tables: list[Any], notes: list[str], form: str) -> None:
    import json

    from dsbert.experiment.result_tables import as_json, as_text

    if form == "json":
        print(json.dumps({"notes": notes} | {table.title: as_json(table) for table in tables}, indent=1))
        return
    if form == "terminal":
        _print_terminal(tables, notes)
        return
    print("\n\n".join(as_text(table, form) for table in tables))
    comment = {"latex": "% ", "csv": "# ", "markdown": "\n"}[form]
    for note in notes:
        print(f"{comment}{note}")


def _print_terminal(tables: list[Any], notes: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=1000)  # a file is not to be cut to a terminal's width
    for table in tables:
        shown = Table(title=table.title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in table.header:
            shown.add_column(name, no_wrap=True)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
        console.print()
    for note in notes:
        console.print(note, markup=False)
