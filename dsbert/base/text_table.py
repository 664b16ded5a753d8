"""Tables for people: as wide as the terminal, and as wide as they are where the output is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dsbert.base.errors import printable

# Of a line in a pipe or a file, which nobody may fold: wider than any row.
_UNBOUNDED = 1 << 20


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], fold: str | None = None) -> str:
    """Lines of aligned columns under their heads, without styles; on a terminal, one column is folded to fit: that of
    the head `fold`, or the first."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="")
    for head in heads:
        drawn.add_column(head, overflow="fold", no_wrap=head != (fold or heads[0]))
    for row in rows:
        drawn.add_row(*(Text(printable(cell)) for cell in row))  # names are no markup
    is_terminal = sys.stdout.isatty()
    console = Console(color_system=None, force_terminal=is_terminal, width=None if is_terminal else _UNBOUNDED)
    with console.capture() as lines:
        console.print(drawn, soft_wrap=not is_terminal)
    return "\n".join(line.rstrip() for line in lines.get().splitlines())
