"""An HTML page of tables and pictures that needs no network: no scripts, everything inside."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape

_FRAME_S = 0.3  # of each picture of a player

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
details { margin: 0.5rem 0; } summary { font-weight: 600; cursor: pointer; overflow-wrap: anywhere; }
.film { display: grid; gap: 0 1px; align-items: center; max-width: 40rem; margin-top: 0.5rem; }
.film label { display: contents; } .film input { width: 100%; min-width: 0; margin: 0; }
.film .play { width: 1rem; }
.film .frame { grid-row: 1; grid-column: 1 / -1; visibility: hidden; }
.film input:checked + .frame { visibility: visible; }
.film img { display: block; height: 20rem; max-width: 100%; object-fit: contain; object-position: left;
  image-rendering: pixelated; border: 1px solid #d8dee4; }
.key span { display: inline-block; width: 0.8rem; height: 0.8rem; border: 1px solid #d8dee4; margin: 0 0.3rem 0 0; }
.key { font-size: 0.9rem; } .key b { font-weight: 400; display: inline-block; margin-right: 1rem; }
code { font-size: 0.85rem; background: #f3f4f6; padding: 0.1rem 0.3rem; }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """The whole page. parts: HTML, as the functions below make it."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join([f"<h1>{escape(title)}</h1>", *parts])
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def heading(text: str) -> str:
    """Above a part of the page."""
    return f"<h2>{escape(text)}</h2>"


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
    return f'{heading(title)}<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def figures(pictures: Mapping[str, str]) -> str:
    """By title: SVG; as many beside each other as there is room for."""
    shown = (f"<figure><figcaption>{escape(name)}</figcaption>{svg}</figure>" for name, svg in pictures.items())
    return "\n".join(['<div class="pictures">', *shown, "</div>"])


def player(title: str, group: str, frames: Sequence[tuple[str, bytes]], key: Mapping[str, str], opened: bool) -> str:
    """Pictures of which one is shown, by a row of buttons, or all in turn; no script is needed for it.

    group: a word of its own for each player of a page. frames: captions and PNGs. key: what colours mean. Folded up, if
    it is not opened.
    """
    count = len(frames)
    cycle = f"{group} {count * _FRAME_S:.1f}s step-end infinite"
    style = (
        f"@keyframes {group} {{ 0% {{ visibility: visible }} {100 / count:.4f}%, 100% {{ visibility: hidden }} }}\n"
        f".{group} .play:checked ~ label .frame {{ animation: {cycle} }}"
    )
    columns = f"grid-template-columns: auto auto repeat({count}, minmax(0, 1fr))"
    # Browsers remember what was chosen when a page is loaded anew; pictures that play must begin in one moment.
    button = f'<input type="radio" name="{group}" autocomplete="off"'
    shown = [
        f'<label>{button} aria-label="{escape(caption)}"{" checked" * (number == count - 1)}>'
        f'<span class="frame" style="animation-delay: {number * _FRAME_S:.1f}s"><img alt="" src="{_png(png)}">'
        f"{escape(caption)}</span></label>"
        for number, (caption, png) in enumerate(frames)
    ]
    colours = "".join(
        f'<b><span style="background: {colour}"></span>{escape(word)}</b>' for word, colour in key.items()
    )
    return "\n".join(
        [
            f"<details{' open' * opened}><summary>{escape(title)}</summary><style>{style}</style>",
            f'<div class="film {group}" style="{columns}">',
            f'{button} class="play" id="{group}-play"><label for="{group}-play">play</label>',
            *shown,
            f'</div><p class="key">{colours}</p></details>',
        ]
    )


def _png(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
