"""The command `dsbert`: one thin function per subcommand. What is slow to import is imported when it is needed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from dsbert.cli_checkpoints import COMMANDS, as_json_option, show
from dsbert.cli_data import DATA_COMMANDS
from dsbert.errors import EXIT_INTERNAL, EXIT_OK, EXIT_REQUEUE, DsbertError, UserError, printable


def _take_local_rank(context: click.Context, parameter: click.Parameter, value: int | None) -> None:
    """The deepspeed launcher says it as the first argument, before the subcommand, as well as in the environment."""
    if value is not None:
        os.environ.setdefault("LOCAL_RANK", str(value))


_local_rank = click.option("--local_rank", type=int, hidden=True, expose_value=False, callback=_take_local_rank)


@click.group(no_args_is_help=True)
@_local_rank
def app() -> None:
    """Pre-train BERT with weights that are sparse from the first step to the last."""


@app.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[a.b=value]...")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Where the run lives. Default: runs/RECIPE.")
@click.option("--nproc", type=click.IntRange(min=1), help="Start this many ranks here. Default: one per GPU, else 1.")
@click.option(
    "--resume",
    type=click.Choice(["auto", "must", "never"]),
    default="auto",
    show_default=True,
    help="Go on from the newest checkpoint: where there is one, or else fail, or not.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=1),
    default=300.0,
    show_default=True,
    help="Seconds after which a rank that does not answer counts as dead.",
)
@_local_rank
@click.pass_obj
def pretrain(
    argv: list[str],
    recipe: str,
    overrides: tuple[str, ...],
    run_dir: Path | None,
    nproc: int | None,
    resume: str,
    timeout: float,
) -> None:
    """Pre-train RECIPE: a name in dsbert/recipes, or a YAML file.

    Starts its ranks itself, or takes its place under torchrun, deepspeed, srun or mpiexec.
    """
    from dsbert.launch import die_with_parent, launch, rank_command
    from dsbert.ranks import ranks_from_environment
    from dsbert.stopping import stop_on_signals

    with stop_on_signals() as stop:  # before the slow imports: a signal should not kill a rank that is starting
        die_with_parent()
        from dsbert.config import load_recipe

        loaded = load_recipe(recipe, overrides)
        if ranks_from_environment() is None:
            count = _num_ranks(nproc)
            if stop.wanted:
                raise SystemExit(EXIT_REQUEUE)
            if count > 1:
                raise SystemExit(launch(rank_command(_without_nproc(argv)), count))
        elif nproc is not None:
            raise UserError("expected no --nproc under another launcher, which starts the ranks itself; found both")
        from dsbert.pretrain import pretrain as train

        raise SystemExit(train(loaded, run_dir or Path("runs") / loaded.name, resume, timeout, stop))


@app.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[a.b=value]...")
@click.option("--nodes", type=click.IntRange(min=1), required=True)
@click.option("--time", required=True, help="The limit of one start, as SLURM writes it; the job goes on after it.")
@click.option("--partition")
@click.option("--account")
@click.option("--qos")
@click.option("--gpus-per-node", help="Also the number of ranks per node, unless --ntasks-per-node says otherwise.")
@click.option("--ntasks-per-node", type=click.IntRange(min=1), help="Ranks per node. Default: its GPUs, else 1.")
@click.option("--cpus-per-task", type=click.IntRange(min=1))
@click.option("--job-name", help="Default: the recipe's name.")
@click.option("--array", help="Which lines of the sweep, and how many at a time: 1-8%2. Default: all.")
@click.option("--sweep", type=click.Path(path_type=Path), help="A file: a line of overrides per array task.")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Default: runs/RECIPE. A sweep's tasks append -1, ...")
@click.option("--signal-lead", type=click.IntRange(min=1), help="Seconds before the limit to save. Default: 300.")
@click.option("--timeout", type=click.FloatRange(min=1), help="As in `dsbert pretrain`.")
@click.option("--setup", multiple=True, help="A line of shell to run first, as 'module load cuda'. Repeatable.")
@click.option("--sbatch", "further", multiple=True, help="Any option of sbatch, as --mem=64G. Repeatable.")
@click.option("--dry-run", is_flag=True, help="Print the script; needs no SLURM.")
@as_json_option
def submit(recipe: str, overrides: tuple[str, ...], dry_run: bool, as_json: bool, **options: Any) -> None:
    """Submit a SLURM job that pre-trains RECIPE, and requeues itself until it is done."""
    from dsbert.submit import job_from_options
    from dsbert.submit import submit as run

    result = run(job_from_options(recipe, overrides, options), dry_run=dry_run)
    if dry_run and not as_json:
        print(result["text"], end="")
        return
    if not as_json:
        del result["text"]
    show(result, as_json, heading="submitted")


for _command in (*DATA_COMMANDS, *COMMANDS):
    app.add_command(_command)


def main() -> None:
    """The console script."""
    code = run(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    if "torch" in sys.modules and "RANK" in os.environ:
        # Ranks leave without the interpreter's teardown: a communicator whose peer is gone may hang or abort in it.
        os._exit(code)
    sys.exit(code)


def run(argv: list[str]) -> int:
    """Run one command line and return its exit code. A DsbertError becomes one line on standard error."""
    try:
        app.main(argv, prog_name="dsbert", obj=argv)
    except DsbertError as error:
        print(f"dsbert: {printable(error)}", file=sys.stderr)
        return error.exit_code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception:  # a bug of ours: shown whole, and always exit code 1
        import traceback

        print(printable(traceback.format_exc(), lines=True), end="", file=sys.stderr)
        return EXIT_INTERNAL
    return EXIT_OK


def _without_nproc(argv: list[str]) -> list[str]:
    """The arguments of a rank: those of its launcher but for --nproc."""
    kept, skip = [], False
    for word in argv:
        if not (skip or word == "--nproc" or word.startswith("--nproc=")):
            kept.append(word)
        skip = word == "--nproc"
    return kept


def _num_ranks(nproc: int | None) -> int:
    """How many ranks to start here: one per GPU unless said otherwise, and never more than there are GPUs."""
    gpus = _num_gpus()
    if nproc and gpus and nproc > gpus:
        raise UserError(f"expected --nproc of at most the {gpus} GPUs here, found {nproc}")
    return nproc or gpus or 1


def _num_gpus() -> int:
    """Visible GPUs; torch is imported only where the machine could have one."""
    if not Path("/dev/nvidiactl").exists():
        return 0
    import torch

    return torch.cuda.device_count()
