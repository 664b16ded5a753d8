"""The subcommands that make and show data: prepare, data."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from dsbert.base.cores import usable_cores
from dsbert.base.errors import UserError
from dsbert.cli.checkpoints import as_json_option, show
from dsbert.cli.parameters import PathName, examples


@click.command(
    epilog=examples(
        "dsbert prepare --source sotu --to data/sotu --vocab-size 2048",
        "dsbert prepare --source texts/ --to data/mine --vocab-size 30522 --validation 0.01",
        "dsbert prepare --source rows.jsonl --text-column body --tokenizer bert-base-uncased --to data/rows",
    )
)
@click.option(
    "--source",
    multiple=True,
    required=True,
    metavar="SOURCE",
    help="Text: `sotu`, `wikibooks`, a file or folder (.txt .jsonl .csv .parquet; also .xz .gz .zst .bz2), a data set "
    "as NAME[@REVISION][:CONFIGURATION]. Repeatable.",
)
@click.option("--to", type=PathName(), required=True, help="The data directory to make.")
@click.option(
    "--documents",
    multiple=True,
    metavar="row|blank-line|rows:N",
    help="How rows (lines) make documents: each is one, empty ones stand between them, or N are one. Default: as the "
    "source is known for. Once, or once for each source.",
)
@click.option(
    "--tokenizer",
    default="train",
    show_default=True,
    help="Train one, or a directory's, or one by its name on the hub.",
)
@click.option("--vocab-size", type=int, help="Tokens of the WordPiece vocabulary that is trained.")
@click.option("--cased", is_flag=True, help="The vocabulary that is trained keeps case and accents.")
@click.option("--keep-accents", is_flag=True, help="It keeps accents and vowel signs, in lower case.")
@click.option("--validation", type=float, default=0.05, show_default=True, help="Fraction of the documents held out.")
@click.option("--min-words", type=click.IntRange(min=1), default=3, show_default=True, help="Drop shorter documents.")
@click.option("--near-duplicates", is_flag=True, help="Drop documents that nearly repeat another, too (MinHash).")
@click.option("--text-column", default="text", show_default=True, help="What tables call their text.")
@click.option(
    "--seq-len",
    multiple=True,
    type=int,
    metavar="TOKENS",
    help="Index samples of this length now: else the first start does, while its ranks wait. Repeatable.",
)
@click.option("--nproc", type=click.IntRange(min=1), help="Processes here. Default: one per core; of a rank, one.")
@as_json_option
def prepare(
    source: tuple[str, ...], to: Path, seq_len: tuple[int, ...], nproc: int | None, as_json: bool, **options: Any
) -> None:
    """Turn text into a tokenizer and token shards.

    Run it again after any interruption, and it goes on where it stopped. Under mpiexec or srun all ranks share the
    work.
    """
    from dsbert.base.progress import overall_bar
    from dsbert.cluster.ranks import ranks_from_environment
    from dsbert.data.preparing.folders import left_out_lines
    from dsbert.data.preparing.prepare import prepare as run
    from dsbert.data.preparing.prepare import work_directory
    from dsbert.data.preparing.work_queue import PeerFailedError, join_work_queue
    from dsbert.data.spans import check_length
    from dsbert.data.stream import index_samples

    for length in seq_len:
        check_length(length)
    ranks = ranks_from_environment()
    try:
        with (
            join_work_queue(ranks, work_directory(to)) as queue,
            overall_bar(_STAGE_WEIGHTS, show=queue.is_main) as progress,
        ):
            summary = run(source, to, progress=progress, nproc=nproc or _processes(ranks), queue=queue, **options)
    except PeerFailedError as error:  # that rank has said it
        raise SystemExit(error.exit_code) from None
    if queue.is_main:
        for length in seq_len:
            index_samples(to, length)
        for_people = {
            "left_out": left_out_lines(summary["left_out"]) or "no file",
            "unknown": f"{summary['unknown']:.2%} of the tokens are [UNK]",
        }
        _say_smaller_vocabulary(options["vocab_size"], to)
        show(
            summary if as_json else summary | for_people,
            as_json,
            heading=f"data in {to}" + (" is up to date" if summary["up_to_date"] else ""),
        )
        if summary["unknown"] > _MANY_UNKNOWN:
            click.echo(
                f"{summary['unknown']:.1%} of the tokens are [UNK], text that the vocabulary cannot spell: expected at "
                f"most {_MANY_UNKNOWN:.0%}; give a larger --vocab-size, or a --tokenizer made for this language",
                err=True,
            )


_MANY_UNKNOWN = 0.01


def _say_smaller_vocabulary(asked: int | None, to: Path) -> None:
    """WordPiece stops where no pair of pieces is left that repeats."""
    from dsbert.data.manifest import load_manifest

    got = load_manifest(to).tokenizer.vocab_size
    if asked is not None and got < asked:
        print(
            f"dsbert: --vocab-size {asked} gave {got} tokens: the text has no more pieces that repeat; it is trained "
            "on as it is",
            file=sys.stderr,
        )


# What each stage of a preparation takes of the whole, roughly, for the estimate of the time that is left.
_STAGE_WEIGHTS = {"look": 1, "read": 30, "decide": 1, "train tokenizer": 25, "encode": 38, "shards": 5}


def _processes(ranks: object) -> int:
    """Of this rank: what SLURM gives it, or one; without ranks, one per core that we may use."""
    given = os.environ.get("SLURM_CPUS_PER_TASK")
    if ranks is not None:
        if given and not given.isdecimal():
            raise UserError(f"expected a number in SLURM_CPUS_PER_TASK, found {given!r}: give --nproc")
        return max(1, int(given or 1))
    return usable_cores()


@click.command(epilog=examples("dsbert data data/sotu --seq-len 64 --examples 1"))
@click.argument("directory", metavar="DATA", type=PathName())
@click.option("--seq-len", type=int, default=128, show_default=True, help="Tokens of the samples to look at.")
@click.option("--examples", type=click.IntRange(min=0), default=3, show_default=True, help="How many samples to show.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the samples' order and masks.")
@click.option("--nsp/--no-nsp", default=True, show_default=True, help="Whether samples are pairs of sentences.")
@as_json_option
def data(directory: Path, seq_len: int, examples: int, seed: int, nsp: bool, as_json: bool) -> None:
    """What is in prepared data: counts, lengths, and samples as text with their masks shown as [word->seen]."""
    from dsbert.inspection.data_summary import inspect_data, report_lines

    show(inspect_data(directory, seq_len, examples, seed, nsp), as_json, lines=report_lines)


DATA_COMMANDS = (prepare, data)
