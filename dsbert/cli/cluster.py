"""The subcommands about jobs to come: plan, submit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dsbert.base.errors import EXIT_OK, EXIT_USER
from dsbert.cli.checkpoints import as_json_option, show
from dsbert.cli.parameters import PathName, Seconds, examples


@click.command(
    epilog=examples("dsbert submit bert-base data.path=data/mine --nodes 2 --gpus-per-node 8 --time 24:00:00")
)
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
@click.option(
    "--spare-nodes",
    type=click.IntRange(min=0),
    default=0,
    metavar="K",
    help="So many nodes more, which take the place of those that fail. Default: 0.",
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
    from dsbert.jobs.submit import job_from_options
    from dsbert.jobs.submit import submit as run

    result = run(job_from_options(recipe, overrides, options), dry_run=dry_run)
    if dry_run and not as_json:
        print(result["text"], end="")
        return
    if not as_json:
        del result["text"]
    show(result, as_json, heading="submitted")


@click.command(
    epilog=examples(
        "dsbert plan bert-base data.path=data/mine --nodes 2 --gpus-per-node 8",
        "dsbert plan demo --nodes 1 --ntasks-per-node 2 --card cpu",
    )
)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[a.b=value]...")
@click.option("--nodes", type=click.IntRange(min=1, max=100_000), required=True)
@click.option(
    "--gpus-per-node",
    "--ntasks-per-node",
    "ranks_per_node",
    type=click.IntRange(min=1, max=1024),
    required=True,
    help="Ranks on each node.",
)
@click.option(
    "--card",
    default="h100",
    show_default=True,
    metavar="h100|a100|FILE|cpu",
    help="What a rank computes on; cpu: this machine, where a few steps are taken and timed.",
)
@click.option("--run-dir", type=PathName(), help="Where it is to live. Default: runs/RECIPE.")
@click.option(
    "--mtbf",
    "mtbf_h",
    type=Seconds(min=1e-3, max=1e9),
    help="Hours between failures of one node, on average.  [default: 6300]",
)
@click.option(
    "--restart",
    "restart_s",
    type=Seconds(min=0, max=1e7),
    help="Seconds from a failure to the next step.  [default: 300]",
)
@click.option(
    "--vocab-size", type=click.IntRange(min=8), help="Where there is no data yet. Default: the data's, or 30522."
)
@as_json_option
def plan(
    recipe: str,
    overrides: tuple[str, ...],
    nodes: int,
    ranks_per_node: int,
    run_dir: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """What RECIPE will need and take: memory, traffic, time, saves, failures.

    Checks what `dsbert submit` checks: exit code 2 where the run could not begin. Each figure says whether it was
    measured, computed or estimated, and from what.
    """
    from dsbert.config.recipe import load_recipe
    from dsbert.jobs.capacity.plan_lines import plan_lines
    from dsbert.jobs.capacity.run_plan import Question, make_plan

    loaded = load_recipe(recipe, overrides)
    where = run_dir or Path("runs") / loaded.name
    given = {name: value for name, value in options.items() if value is not None}
    found = make_plan(Question(loaded, nodes, ranks_per_node, where, **given))
    show(found.to_json(), as_json, lines=lambda _: plan_lines(found))
    raise SystemExit(EXIT_OK if found.can_work else EXIT_USER)


JOB_COMMANDS = (plan, submit)
