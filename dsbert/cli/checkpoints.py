"""The subcommands that look at checkpoints: evaluate, export, inspect, verify, checkpoints, diff. And how all show."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from dsbert.base.errors import EXIT_NO_CHECKPOINT, EXIT_OK, printable
from dsbert.cli.parameters import PathName, examples

as_json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
_source = click.argument("source", metavar="CHECKPOINT|RUN", type=PathName())
_Lines = Callable[[dict[str, Any]], Iterable[str]]


@click.command(epilog=examples("dsbert evaluate runs/demo", "dsbert evaluate runs/demo --text mine.txt --json"))
@_source
@click.option(
    "--text", multiple=True, metavar="SOURCE", help="Instead of the held-out documents: as of `prepare`. Repeatable."
)
@click.option("--documents", multiple=True, metavar="row|blank-line|rows:N", help="Of --text: as of `prepare`.")
@click.option("--text-column", help="Of --text: what tables call their text.  [default: text]")
@as_json_option
def evaluate(
    source: Path, text: tuple[str, ...], documents: tuple[str, ...], text_column: str | None, as_json: bool
) -> None:
    """Losses and accuracies on held-out or given text, with the same masks for everyone.

    Losses are in nats per masked token (mlm, unigram) and per sentence pair (nsp).
    """
    from dsbert.base.progress import stage_bars
    from dsbert.data.preparing.folders import left_out_lines
    from dsbert.training.evaluate import evaluate_checkpoint

    with stage_bars() as progress:
        result = evaluate_checkpoint(
            source,
            text,
            lambda done, total: progress("evaluate", done, total),
            documents=documents,
            text_column=text_column,
        )
    if "left_out" in result and not as_json:
        result["left_out"] = left_out_lines(result["left_out"]) or "no file"
    show(result, as_json, heading=f"{source} at step {result['step']}")


@click.command(
    epilog=examples(
        "dsbert export runs/demo --to exports/demo",
        "dsbert export runs/demo --to exports/sparse --form sparse",
        "dsbert export runs/demo --to exports/demo --push-to-hub me/my-model --private",
    )
)
@_source
@click.option("--to", type=PathName(), required=True, help="The directory to write, new or of an earlier export.")
@click.option(
    "--form",
    type=click.Choice(("dense", "sparse")),
    default="dense",
    show_default=True,
    help="dense: for transformers alone, and the blocks beside it. sparse: for transformers with `import dsbert.hf`.",
)
@click.option("--push-to-hub", metavar="NAME", help="Then upload it to this repository of the Hugging Face hub.")
@click.option("--private/--public", default=None, help="Of a repository that is made.  [default: as the hub has it]")
@as_json_option
def export(source: Path, to: Path, form: str, push_to_hub: str | None, private: bool | None, as_json: bool) -> None:
    """Write a transformers model, such as BertForPreTraining, with its tokenizer and a model card.

    Of an earlier export its own files are replaced; others stay, and so does a README.md that was changed.
    """
    from dsbert.hf.export import export as run

    show(run(source, to, form, push_to_hub, private), as_json, heading=f"exported {source}")


@click.command(epilog=examples("dsbert inspect runs/demo", "dsbert inspect runs/demo/checkpoints/step_00000200"))
@_source
@click.option("--kernels", is_flag=True, help="Instead: which kernels each layer ran on, and what they gained.")
@as_json_option
def inspect(source: Path, kernels: bool, as_json: bool) -> None:
    """Topology, density and bytes of a checkpoint."""
    from dsbert.inspection.summary import inspect_checkpoint, inspect_kernels, inspect_lines, kernel_lines

    if kernels:
        show(inspect_kernels(source), as_json, lines=kernel_lines)
    else:
        show(inspect_checkpoint(source), as_json, heading=str(source), lines=inspect_lines)


@click.command(epilog=examples("dsbert verify runs/demo", "dsbert verify data/sotu"))
@click.argument("source", metavar="CHECKPOINT|RUN|DATA", type=PathName())
@as_json_option
def verify(source: Path, as_json: bool) -> None:
    """Read everything, and name every file that is not what it should be: exit code 4."""
    from dsbert.base.progress import stage_bars
    from dsbert.inspection.audit_run import audit, report_lines

    with stage_bars() as progress:
        report = audit(source, progress)
    show(report, as_json, lines=report_lines)
    raise SystemExit(EXIT_OK if report["ok"] else EXIT_NO_CHECKPOINT)


@click.command(epilog=examples("dsbert checkpoints runs/demo --quick"))
@click.argument("run_dir", metavar="RUN", type=PathName())
@click.option("--quick", is_flag=True, help="List only; do not read everything to verify it.")
@as_json_option
def checkpoints(run_dir: Path, quick: bool, as_json: bool) -> None:
    """The checkpoints of a run, oldest first, and whether they are whole."""
    from dsbert.base.progress import stage_bars
    from dsbert.inspection.summary import checkpoint_table, list_checkpoints

    with stage_bars() as progress:
        listing = list_checkpoints(run_dir, quick, progress)
    show(listing, as_json, lines=checkpoint_table)


@click.command(epilog=examples("dsbert diff runs/a runs/b --exit-code"))
@click.argument("both", metavar="A B", nargs=2, type=PathName())
@click.option("--exit-code", is_flag=True, help="Exit with 1 if they differ.")
@as_json_option
def diff(both: tuple[Path, Path], exit_code: bool, as_json: bool) -> None:
    """Topology, weights, moments and identity of two checkpoints, or of the newest ones of runs, side by side."""
    from dsbert.base.progress import stage_bars
    from dsbert.inspection.comparison import compare_checkpoints, summary_lines

    with stage_bars() as progress:
        report = compare_checkpoints(*both, progress)
    show(report, as_json, lines=summary_lines)
    raise SystemExit(1 if exit_code and not report["identical"] else EXIT_OK)


COMMANDS = (evaluate, export, inspect, verify, checkpoints, diff)


def show(values: dict[str, Any], as_json: bool, heading: str = "", lines: _Lines | None = None) -> None:
    """One JSON document, or what `lines` makes of it for people, or else a heading and a line per entry."""
    if as_json:
        from dsbert.base.jsonl import to_json

        print(to_json(values))
        return
    if heading:
        print(printable(heading))
    if lines is not None:
        print("\n".join(printable(line, lines=True) for line in lines(values)))
        return
    for name, value in values.items():
        if isinstance(value, list):
            shown = "".join(f"\n    {printable(_in_words(item))}" for item in value) or "none"
        else:
            shown = printable(_in_words(value))
        print(f"  {printable(name):<14} {shown}")


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_in_words(entry)}" for name, entry in value.items()) or "none"
    if isinstance(value, list):
        return " ".join(map(_in_words, value)) or "none"
    if isinstance(value, float):
        return f"{value:.4f}"
    return "none" if value is None else str(value)
