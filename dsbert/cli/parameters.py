"""What the subcommands share of click: paths that are one, examples under the help text."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import click

from dsbert.base.errors import UserError


class PathName(click.Path):
    """A path. An empty one, as of an unset variable, would be the working directory, or a default."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            name = (
                param.opts[0] if isinstance(param, click.Option) else param.human_readable_name if param else "argument"
            )
            raise UserError(f"expected a path as {name}, found none: '' (is a variable unset?)")
        return super().convert(value, param, ctx)


class Seconds(click.FloatRange):
    """A range that holds no NaN either, which is neither below nor above anything."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail("nan is no number of seconds", param, ctx)
        return number


def examples(*lines: str) -> str:
    """The end of a help text."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def _take_local_rank(context: click.Context, parameter: click.Parameter, value: int | None) -> None:
    """The deepspeed launcher says it as the first argument, before the subcommand, as well as in the environment."""
    if value is not None:
        os.environ.setdefault("LOCAL_RANK", str(value))


nproc_option = click.option(
    "--nproc", type=click.IntRange(1, 1024), help="Start this many ranks here. Default: one per GPU, else 1."
)
timeout_option = click.option(
    "--timeout",
    type=Seconds(min=1, max=1e6),
    default=300.0,
    show_default=True,
    help="Seconds after which a rank that does not answer counts as dead.",
)
local_rank_option = click.option("--local_rank", type=int, hidden=True, expose_value=False, callback=_take_local_rank)
