"""`dsbert finetune`: ranks are started, or this is one of them."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from dsbert.base.errors import EXIT_OK, EXIT_REQUEUE, UserError
from dsbert.cli.checkpoints import as_json_option, show
from dsbert.cli.parameters import PathName, examples, local_rank_option, nproc_option, timeout_option
from dsbert.cli.training import num_ranks, without_nproc


@click.command(
    epilog=examples(
        "dsbert finetune runs/demo --task tasks/trec/task.yaml --to runs/trec",
        "dsbert finetune exports/demo --task sst2 --to runs/sst2 learning_rate=1e-4 num_train_epochs=5",
        "dsbert finetune runs/demo --task mine.yaml --to runs/mine --pattern dynamic sparsity.regrow=gradient",
        "dsbert finetune runs/demo --task squad --data copies/squad --to runs/squad --nproc 2",
    )
)
@click.argument("model", metavar="MODEL", type=PathName())
@click.argument("overrides", nargs=-1, metavar="[name=value]...")
@click.option("--task", required=True, metavar="NAME|FILE", help="A task of GLUE, squad, squad_v2, or a YAML file.")
@click.option("--to", type=PathName(), required=True, help="The directory to write; that of an earlier start goes on.")
@click.option(
    "--pattern",
    type=click.Choice(["keep", "dense", "dynamic"]),
    help="Of a sparse model: its blocks stay where they are, or become dense weights, or move.  [default: keep]",
)
@click.option("--data", type=PathName(), help="Of a NAME: a copy of its data set's repository, in place of the hub.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Of a step, over all ranks.")
@click.option("--max-length", type=click.IntRange(8), help="Tokens of an example.  [default: 128; of answers 384]")
@click.option("--best", is_flag=True, help="Keep the model of the best validation, not of the last step.")
@nproc_option
@timeout_option
@as_json_option
@local_rank_option
@click.pass_obj
def finetune(
    argv: list[str],
    model: Path,
    overrides: tuple[str, ...],
    task: str,
    to: Path,
    pattern: str | None,
    data: Path | None,
    batch_size: int,
    max_length: int | None,
    best: bool,
    nproc: int | None,
    timeout: float,
    as_json: bool,
) -> None:
    """Train MODEL on a task: a run, a checkpoint, an export or a directory of transformers.

    name=value sets what transformers.TrainingArguments has; sparsity.name=value how a dynamic pattern moves. Run it
    again and it resumes. Starts its ranks itself, or takes its place under torchrun, deepspeed, srun or mpiexec.
    """
    from dsbert.cluster.launcher import die_with_parent, launch, module_command
    from dsbert.cluster.ranks import ranks_from_environment
    from dsbert.cluster.signals import stop_on_signals
    from dsbert.training.preflight import said_once

    with stop_on_signals() as stop:
        again = shlex.join(["dsbert", *argv])
        launched = die_with_parent()
        ranks = ranks_from_environment()
        if not launched and (ranks is None or ranks.rank == 0):
            stop.again = again
        if ranks and nproc is not None:
            raise UserError("expected no --nproc under another launcher, which starts the ranks itself; found both")
        with said_once(ranks):
            from dsbert.hf.finetuning.task_file import load_task

            loaded = load_task(task, data)
        count = ranks.world_size if ranks else num_ranks(nproc)
        if count > 1 and ranks is None:
            command = module_command("dsbert.cli", *without_nproc(argv))
            raise SystemExit(launch(command, count, again=again, less_memory="lower --batch-size or --nproc"))
        with said_once(ranks):
            from dsbert.hf.finetuning.finetune_settings import Settings, parse_overrides

            trainer, sparsity = parse_overrides(overrides)
            settings = Settings(pattern, batch_size, max_length, best, trainer, sparsity)
        from dsbert.hf.finetuning.finetune import finetune as train

        code, metrics = train(model, loaded, to, settings, stop, timeout)
    if code == EXIT_REQUEUE:
        raise SystemExit(code)
    if ranks is None or ranks.rank == 0:
        for split in metrics.values():
            if isinstance(split, dict):
                split.pop("confusion", None)
        show(metrics, as_json, heading=f"{model} on {loaded.name}: {to}")
    raise SystemExit(EXIT_OK)
