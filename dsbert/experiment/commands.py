"""The command `dsbert pretrain` of a cell, and what a command that failed has said."""

from __future__ import annotations

from pathlib import Path

from dsbert.base.errors import printable
from dsbert.cluster.launcher import module_command
from dsbert.experiment.cells import Cell


def pretrain_command(cell: Cell, recipe: Path, run_dir: Path, *overrides: str) -> list[str]:
    """On one rank. recipe: the file that it is written to."""
    recipe.write_text(cell.recipe.as_document(), encoding="utf-8")
    return module_command("dsbert.cli", "pretrain", str(recipe), *overrides, "--run-dir", str(run_dir), "--nproc", "1")


def said_last(output: str) -> str:
    """The last line, which is the complaint where a command failed; it can be printed."""
    lines = output.strip().splitlines() or ["no output"]
    return printable(lines[-1].removeprefix("dsbert: "))
