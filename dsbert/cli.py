"""The command `dsbert`: one thin function per subcommand. What is slow to import is imported when it is needed."""

from __future__ import annotations

import io
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsbert import __version__
from dsbert.cli_checkpoints import COMMANDS, as_json_option, show
from dsbert.cli_data import DATA_COMMANDS
from dsbert.cli_types import PathName, Seconds, examples
from dsbert.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_OK, EXIT_REQUEUE, DsbertError, UserError, printable
from dsbert.output import flush, lose_output_too, protect

if TYPE_CHECKING:
    from dsbert.config import Recipe
    from dsbert.ranks import Ranks


def _take_local_rank(context: click.Context, parameter: click.Parameter, value: int | None) -> None:
    """The deepspeed launcher says it as the first argument, before the subcommand, as well as in the environment."""
    if value is not None:
        os.environ.setdefault("LOCAL_RANK", str(value))


_local_rank = click.option("--local_rank", type=int, hidden=True, expose_value=False, callback=_take_local_rank)


@click.group(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dsbert")
@_local_rank
def app() -> None:
    """Pre-train BERT with weights that are sparse from the first step to the last."""


@app.command(
    epilog=examples(
        "dsbert pretrain demo --nproc 2",
        "dsbert pretrain bert-base data.path=data/mine optim.total_steps=100000",
        "dsbert pretrain mine.yaml --run-dir runs/mine --resume must",
        "torchrun --nproc-per-node 8 -m dsbert pretrain bert-base data.path=data/mine",
    )
)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[a.b=value]...")
@click.option("--run-dir", type=PathName(), help="Where the run lives. Default: runs/RECIPE.")
@click.option("--nproc", type=click.IntRange(1, 1024), help="Start this many ranks here. Default: one per GPU, else 1.")
@click.option(
    "--resume",
    type=click.Choice(["auto", "must", "never"]),
    default="auto",
    show_default=True,
    help="Go on from the newest checkpoint: where there is one, or else fail, or not.",
)
@click.option("--take-over", is_flag=True, help="Take the run from an attempt that is at work on it; that one leaves.")
@click.option(
    "--timeout",
    type=Seconds(min=1, max=1e6),
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
    take_over: bool,
    timeout: float,
) -> None:
    """Pre-train RECIPE: a name in dsbert/recipes, or a YAML file.

    Starts its ranks itself, or takes its place under torchrun, deepspeed, srun or mpiexec.
    """
    lose_output_too()
    from dsbert.launch import die_with_parent, launch, module_command
    from dsbert.ranks import rank_variables, ranks_from_environment
    from dsbert.stopping import stop_on_signals

    with stop_on_signals() as stop:  # before the slow imports: a signal should not kill a rank that is starting
        again = shlex.join(["dsbert", *argv])
        launched = die_with_parent()
        ranks = ranks_from_environment()
        if not launched and (ranks is None or ranks.rank == 0):  # else the launcher, or rank 0, says it for all
            stop.again = again
        from dsbert.config import load_recipe
        from dsbert.preflight import said_once

        with said_once(ranks):
            loaded = load_recipe(recipe, overrides)
            count = ranks.world_size if ranks else _num_ranks(nproc)
            batch = loaded.batch.on_ranks(count)  # refuses more ranks than samples before any of them starts
            run_dir = run_dir or Path("runs") / loaded.name
            _assert_startable(loaded, run_dir, ranks, take_over)
            if ranks and nproc is not None:
                found = rank_variables()
                raise UserError(
                    "expected no --nproc under another launcher, which starts the ranks itself; found both: "
                    f"{found[0]} is set: where no launcher is at work, as in `srun --pty bash`, unset {' '.join(found)}"
                )
        if ranks is None:
            if stop.wanted:
                raise SystemExit(EXIT_REQUEUE)
            if count > 1:
                less = f"lower batch.micro_batch (now {batch.micro_batch}) or --nproc (now {count})"
                command = module_command("dsbert.cli", *_without_nproc(argv))
                raise SystemExit(launch(command, count, again=again, less_memory=less))
        from dsbert.pretrain import pretrain as train

        raise SystemExit(train(loaded, run_dir, resume, timeout, stop))


@app.command(epilog=examples("dsbert submit bert-base data.path=data/mine --nodes 2 --gpus-per-node 8 --time 24:00:00"))
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[a.b=value]...")
@click.option("--nodes", type=click.IntRange(min=1), required=True)
@click.option("--time", required=True, help="The limit of one start, as SLURM writes it; the job goes on after it.")
@click.option("--partition", help="Which queue: `sinfo` lists them, with their time limits. Default: the site's.")
@click.option("--account", help="Who pays. Default: your own, as the site has it.")
@click.option("--qos", help="Quality of service: priority and limits, as the site names them.")
@click.option(
    "--gpus-per-node",
    metavar="[TYPE:]N",
    help="Also the number of ranks per node, unless --ntasks-per-node says otherwise.",
)
@click.option("--ntasks-per-node", type=click.IntRange(min=1), help="Ranks per node. Default: its GPUs, else 1.")
@click.option("--cpus-per-task", type=click.IntRange(min=1))
@click.option("--mem", help="Memory per node, as 64G.")
@click.option("--constraint", help="Features that the nodes must have.")
@click.option("--exclude", help="Nodes that it must not run on.")
@click.option("--dependency", help="As SLURM writes it: afterok:JOB waits for the job that prepares the data.")
@click.option("--mail-type", help="When to write a mail: END,FAIL.")
@click.option("--mail-user", help="To whom.")
@click.option("--job-name", help="Default: the recipe's name.")
@click.option("--array", help="Which lines of the sweep, and how many at a time: 1-8%2. Default: all.")
@click.option("--sweep", type=PathName(), help="A file: a line of overrides per array task.")
@click.option("--run-dir", type=PathName(), help="Default: runs/RECIPE. A sweep's tasks append -1, ...")
@click.option("--after", is_flag=True, help="Wait for the end of jobs that are on the same run, instead of refusing.")
@click.option(
    "--signal-lead", type=click.IntRange(min=1, max=65535), help="Seconds before the limit to save. Default: 300."
)
@click.option("--timeout", type=Seconds(min=1, max=1e6), help="As in `dsbert pretrain`.")
@click.option("--setup", multiple=True, help="A line of shell to run first, as 'module load cuda'. Repeatable.")
@click.option("--launch-prefix", metavar="WORDS", help="What to put before dsbert, as 'apptainer exec image.sif'.")
@click.option("--srun-args", multiple=True, metavar="WORDS", help="More options of srun, as '--mpi=pmix'. Repeatable.")
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
    protect()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files that are no text
    code = run(sys.argv[1:])
    try:
        flush()
    except (DsbertError, OSError) as error:
        code = code or EXIT_INTERNAL
        if isinstance(error, DsbertError):
            print(f"dsbert: {error}", file=sys.stderr)
    if "torch" in sys.modules and "RANK" in os.environ:
        # Ranks leave without the interpreter's teardown: a communicator whose peer is gone may hang or abort in it.
        os._exit(code)
    sys.exit(code)


def run(argv: list[str]) -> int:
    """Run one command line and return its exit code. A DsbertError becomes one line on standard error."""
    try:
        _assert_utf8(argv)
        code = app.main(argv, prog_name="dsbert", obj=argv, standalone_mode=False)
        return code if isinstance(code, int) else EXIT_OK
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        place = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "dsbert"
        message = printable(" ".join(error.format_message().split()).rstrip("."))
        print(f"dsbert: {message}; see `{place} --help`", file=sys.stderr)
        return error.exit_code
    except click.Abort:
        # What is made aside is renamed when it is whole, and a preparation keeps its pieces.
        print("dsbert: interrupted: nothing is half done; the same command goes on or begins again", file=sys.stderr)
        return EXIT_INTERRUPTED
    except DsbertError as error:
        if not error.shared or os.environ.get("RANK", "0") == "0":
            print(f"dsbert: {printable(error)}", file=sys.stderr)
        return error.exit_code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception:  # a bug of ours: shown whole, and always exit code 1
        import traceback

        print(printable(traceback.format_exc(), lines=True), end="", file=sys.stderr)
        return EXIT_INTERNAL


def _assert_utf8(argv: list[str]) -> None:
    """Records are JSON and YAML, which cannot name a file by bytes that are no text."""
    for word in (*argv, os.getcwd()):
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"expected arguments and a working directory in UTF-8, found {os.fsencode(word)!r}"
            ) from None


def _assert_startable(recipe: Recipe, run_dir: Path, ranks: Ranks | None, take_over: bool) -> None:
    """Raise UserError for what can be seen before ranks start: by their launcher, once, where that is us.

    Ranks whose launcher gives them no name (RANK and no more) may be the next start of the attempt that is at work.
    """
    from dsbert.ownership import assert_free
    from dsbert.preflight import assert_startable

    if ranks is None:
        assert_startable(recipe, run_dir)
    named = ranks is None or ranks.launcher != "environment" or "TORCHELASTIC_RUN_ID" in os.environ
    if named and not take_over:
        assert_free(run_dir, "choose another --run-dir, or take the run from it with --take-over")


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


if __name__ == "__main__":
    main()
