"""The subcommands that look at how runs go, and where they are to go: status, runs, watch, report, doctor; and
wandb-sync, which has W&B show them."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsbert.base.errors import EXIT_OK, EXIT_USER, UserError, printable
from dsbert.cli.checkpoints import as_json_option
from dsbert.cli.parameters import PathName, Seconds, examples

if TYPE_CHECKING:
    from dsbert.monitoring.run_status import RunStatus

_DEFAULT = Path("runs")


@click.command(epilog=examples("dsbert status runs/demo", "dsbert status --json"))
@click.argument("run_dirs", metavar="[RUN]...", nargs=-1, type=PathName())
@as_json_option
def status(run_dirs: tuple[Path, ...], as_json: bool) -> None:
    """How runs go: state, step, time left, loss, speed, restarts and what they cost.

    Without RUN: those below runs/. From files alone: any machine that sees them will do, and a job may still wait.
    """
    from dsbert.base.jsonl import to_json
    from dsbert.monitoring.run_status import read_status
    from dsbert.monitoring.status_lines import status_lines

    found = [read_status(path) for path in _named(run_dirs)] if run_dirs else _statuses_below(_DEFAULT)
    if as_json:
        print(to_json([one.to_json() for one in found]))
        return
    print("\n\n".join("\n".join(status_lines(one)) for one in found))


@click.command(epilog=examples("dsbert runs", "dsbert runs /scratch/me --json"))
@click.argument("folder", metavar="[DIR]", default=_DEFAULT, type=PathName())
@as_json_option
def runs(folder: Path, as_json: bool) -> None:
    """The runs below a folder, a line each."""
    from dsbert.base.jsonl import to_json
    from dsbert.monitoring.status_lines import status_table

    found = _statuses_below(folder)
    print(to_json([one.to_json() for one in found]) if as_json else status_table(found))


@click.command(epilog=examples("dsbert watch runs/demo", "dsbert watch runs/*"))
@click.argument("run_dirs", metavar="RUN...", nargs=-1, required=True, type=PathName())
@click.option("--every", "every_s", default=2.0, show_default=True, type=Seconds(min=0.1, max=86400.0), help="Seconds.")
def watch(run_dirs: tuple[Path, ...], every_s: float) -> None:
    """The same, again and again, until Ctrl-C or until all runs are over."""
    from dsbert.monitoring.live import watch_runs

    watch_runs(_named(run_dirs), every_s)


@click.command(
    epilog=examples("dsbert report runs/demo --to reports/demo", "dsbert report runs/a runs/b --to reports/ab")
)
@click.argument("run_dirs", metavar="RUN...", nargs=-1, required=True, type=PathName())
@click.option(
    "--to", type=PathName(), required=True, help="The directory to write: index.html, report.json, PNGs and GIFs."
)
@click.option(
    "--weights",
    metavar="PATTERN",
    help="Which sparse weights are shown block by block, such as '*layer.11.*'; 6 at most.",
)
@as_json_option
@click.pass_obj
def report(argv: list[str], run_dirs: tuple[Path, ...], to: Path, weights: str | None, as_json: bool) -> None:
    """Runs as a page that needs no network: losses, speed, cost, interruptions, what became of blocks."""
    from dsbert.base.jsonl import to_json
    from dsbert.reports.run_report import report as write

    numbers = write(_named(run_dirs), to, shlex.join(["dsbert", *argv]), weights)
    print(to_json(numbers) if as_json else f"report in {to}: open {to / 'index.html'}")


@click.command("wandb-sync", epilog=examples("dsbert wandb-sync runs/demo", "dsbert wandb-sync runs/* --json"))
@click.argument("run_dirs", metavar="RUN...", nargs=-1, required=True, type=PathName())
@click.option(
    "--timeout",
    "timeout_s",
    type=Seconds(min=1, max=1e6),
    default=600.0,
    show_default=True,
    help="Seconds that W&B may take for one run.",
)
@as_json_option
def wandb_sync(run_dirs: tuple[Path, ...], timeout_s: float, as_json: bool) -> None:
    """Send to Weights & Biases what it lacks of runs, as of those on nodes without a network.

    Each step once, however often it is called, and whatever the files of offline starts are worth.
    """
    from dsbert.base.jsonl import to_json
    from dsbert.training.wandb_sync import assert_online, sync_run

    assert_online()
    found = []
    for path in _named(run_dirs):
        synced = sync_run(path, timeout_s)
        found.append(synced.to_json())
        for note in synced.notes:
            print(f"dsbert: W&B: {printable(f'{path}: {note}')}", file=sys.stderr)
        if not as_json:
            has = f"W&B has its steps up to {synced.last}" if synced.last else "it has no steps yet"
            print(printable(f"{path}: {synced.sent} steps sent, {has}: {synced.url}"))
    if as_json:
        print(to_json(found))


@click.command(epilog=examples("dsbert doctor", "dsbert doctor --run-dir /scratch/me/runs --data /data/wikibooks"))
@click.option("--run-dir", default=_DEFAULT, type=PathName(), help="Where runs are to be written.  [default: runs]")
@click.option("--data", type=PathName(), help="Where prepared data are to be read.")
@as_json_option
def doctor(run_dir: Path, data: Path | None, as_json: bool) -> None:
    """Whether this machine can train, and what to do where it cannot: exit code 2.

    To look at a node: `srun dsbert doctor`.
    """
    from dsbert.base.jsonl import to_json
    from dsbert.base.text_table import table
    from dsbert.inspection.doctor import examine

    found = examine(run_dir, data)
    if as_json:
        print(to_json([finding._asdict() for finding in found]))
    else:
        print(table(("what", "", "found"), found, fold="found"))
    raise SystemExit(EXIT_USER if any(finding.verdict == "fail" for finding in found) else EXIT_OK)


def _named(paths: Sequence[Path]) -> list[Path]:
    """What was asked for. Of several, without files: `runs/*` also takes the scripts that `dsbert submit` writes."""
    folders = [path for path in paths if not os.path.isfile(path)]
    return folders if len(paths) > 1 and folders else list(paths)


def _statuses_below(folder: Path) -> list[RunStatus]:
    """Of all runs that can be read; a line for each of the others."""
    from dsbert.monitoring.finding import find_runs
    from dsbert.monitoring.run_status import read_status

    found = []
    for path in find_runs(folder) if os.path.isdir(folder) else []:
        try:
            found.append(read_status(path))
        except UserError as error:
            print(f"dsbert: left out: {printable(error)}", file=sys.stderr)
    if not found:
        raise UserError(f"expected runs below {folder}, found none: name a folder with runs of `dsbert pretrain` in it")
    return found


MONITORING_COMMANDS = (status, runs, watch, report, wandb_sync, doctor)
