"""An HTML page of tables and pictures that needs no network: no scripts, everything inside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; margin: 0.5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; }
.note { color: #57606a; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.3rem 0.8rem 0.3rem 0; border-bottom: 1px solid #d8dee4; white-space: nowrap; }
th { font-weight: 600; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1rem; }
.pictures { margin-top: 2rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; } figcaption { font-weight: 600; }
code { font-size: 0.85rem; background: #f3f4f6; padding: 0.1rem 0.3rem; }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """The whole page. parts: HTML, as the functions below make it."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join([f"<h1>{escape(title)}</h1>", *parts])
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def note(text: str) -> str:
    """A line beside the matter."""
    return f'<p class="note">{escape(text)}</p>'


def made_by(command: str) -> str:
    """What makes the page again."""
    return f'<p class="note">Made by <code>{escape(command)}</code></p>'


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Scrolls by itself where the window is narrow."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<h2>{escape(title)}</h2><div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def figures(pictures: Mapping[str, str]) -> str:
    """By title: SVG; as many beside each other as there is room for."""
    shown = (f"<figure><figcaption>{escape(name)}</figcaption>{svg}</figure>" for name, svg in pictures.items())
    return "\n".join(['<div class="pictures">', *shown, "</div>"])
