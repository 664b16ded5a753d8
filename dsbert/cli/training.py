"""`dsbert pretrain`: what can be refused is, then ranks are started, or this is one of them."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsbert.base.errors import EXIT_REQUEUE, UserError
from dsbert.base.output import lose_output_too
from dsbert.cli.parameters import PathName, examples, local_rank_option, nproc_option, timeout_option

if TYPE_CHECKING:
    from dsbert.cluster.ranks import RankInfo
    from dsbert.config.recipe import Recipe


@click.command(
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
@nproc_option
@click.option(
    "--resume",
    type=click.Choice(["auto", "must", "never"]),
    default="auto",
    show_default=True,
    help="Go on from the newest checkpoint: where there is one, or else fail, or not.",
)
@click.option("--take-over", is_flag=True, help="Take the run from an attempt that is at work on it; that one leaves.")
@timeout_option
@local_rank_option
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
    from dsbert.cluster.launcher import die_with_parent, launch, module_command
    from dsbert.cluster.ranks import rank_variables, ranks_from_environment
    from dsbert.cluster.signals import stop_on_signals

    with stop_on_signals() as stop:  # before the slow imports: a signal should not kill a rank that is starting
        again = shlex.join(["dsbert", *argv])
        launched = die_with_parent()
        ranks = ranks_from_environment()
        if not launched and (ranks is None or ranks.rank == 0):  # else the launcher, or rank 0, says it for all
            stop.again = again
        from dsbert.config.recipe import load_recipe
        from dsbert.training.preflight import said_once

        with said_once(ranks):
            loaded = load_recipe(recipe, overrides)
            count = ranks.world_size if ranks else num_ranks(nproc)
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
            if stop.requested:
                raise SystemExit(EXIT_REQUEUE)
            if count > 1:
                less = f"lower batch.micro_batch (now {batch.micro_batch}) or --nproc (now {count})"
                command = module_command("dsbert.cli", *without_nproc(argv))
                raise SystemExit(launch(command, count, again=again, less_memory=less))
        from dsbert.training.pretrain import pretrain as train

        raise SystemExit(train(loaded, run_dir, resume, timeout, stop))


def _assert_startable(recipe: Recipe, run_dir: Path, ranks: RankInfo | None, take_over: bool) -> None:
    """Raise UserError for what can be seen before ranks start: by their launcher, once, where that is us.

    Ranks whose launcher gives them no name (RANK and no more) may be the next start of the attempt that is at work.
    """
    from dsbert.training.ownership import assert_free
    from dsbert.training.preflight import assert_startable

    if ranks is None:
        assert_startable(recipe, run_dir)
    named = ranks is None or ranks.launcher != "environment" or "TORCHELASTIC_RUN_ID" in os.environ
    if named and not take_over:
        assert_free(run_dir, "choose another --run-dir, or take the run from it with --take-over")


def without_nproc(argv: list[str]) -> list[str]:
    """The arguments of a rank: those of its launcher but for --nproc."""
    kept, skip = [], False
    for word in argv:
        if not (skip or word == "--nproc" or word.startswith("--nproc=")):
            kept.append(word)
        skip = word == "--nproc"
    return kept


def num_ranks(nproc: int | None) -> int:
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
