"""How pictures look: drawn by matplotlib, as SVG text that is the same from call to call, or as PNG."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsbert.base.errors import UserError

_DPI = 110


class Picture:
    """A drawn figure; a notebook shows it. figure: matplotlib's."""

    def __init__(self, figure: Any) -> None:
        self.figure = figure

    def svg(self) -> str:
        """Without what differs from call to call."""
        with _settings():
            buffer = io.StringIO()
            self.figure.savefig(buffer, format="svg", metadata={"Date": None})
        text = buffer.getvalue()
        return text[text.index("<svg") :]

    def png(self) -> bytes:
        """At a fixed resolution."""
        buffer = io.BytesIO()
        with _settings():
            self.figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
        return buffer.getvalue()

    def save(self, path: str | Path) -> None:
        """As SVG or PNG, by the name. Raises UserError where it cannot be written."""
        path = Path(path)
        if path.suffix not in (".svg", ".png"):
            raise UserError(f"expected a file that ends in .svg or .png, found {path}")
        try:
            path.write_bytes(self.png() if path.suffix == ".png" else self.svg().encode())
        except OSError as error:
            raise UserError(f"expected to write {path}, found: {error.strerror}") from None

    def _repr_png_(self) -> bytes:
        return self.png()


_WIDTH = 7.2  # inches, of every picture: so that letters are of one size where several stand beside each other


def new_figure(panels: int = 1, height: float | None = None, rows: int = 1) -> tuple[Any, list[Any]]:
    """A figure and its axes, row by row. Raises UserError where matplotlib is missing."""
    with _settings():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(_WIDTH, height or (4.2 if panels == 1 else 3.4)), constrained_layout=True)
        axes = list(figure.subplots(rows, -(-panels // rows), squeeze=False).flat)
        for unused in axes[panels:]:
            unused.set_axis_off()
        axes = axes[:panels]
        for one in axes:
            one.spines[["top", "right"]].set_visible(False)
            one.grid(alpha=0.2)
    return figure, axes


def make_logarithmic(axis: Any) -> None:
    """An axis of a figure's axes; its ticks are numbers: matplotlib's own are formulas, which are text here."""
    from matplotlib.ticker import LogFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    for set_formatter in (axis.set_major_formatter, axis.set_minor_formatter):
        set_formatter(LogFormatter(minor_thresholds=(2, 0.5)))


@contextmanager
def _settings() -> Iterator[None]:
    try:
        import matplotlib
    except ImportError:
        raise UserError("expected matplotlib for pictures, found none: pip install 'dsbert[experiment]'") from None
    settings = {
        "text.parse_math": False,  # names of runs are no formulas
        "svg.hashsalt": "dsbert",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 10,
    }
    with matplotlib.rc_context(settings):
        yield
