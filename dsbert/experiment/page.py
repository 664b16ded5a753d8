"""One HTML page of an experiment: tables and pictures inside, no scripts, nothing from any network."""

from __future__ import annotations

from html import escape

from dsbert.experiment.planning import Plan
from dsbert.experiment.plots import pictures
from dsbert.experiment.result_tables import Table, cells_table, main_tables, notes

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


def page(plan: Plan, command: str) -> str:
    """The whole page. command: what makes it again. Raises UserError as `pictures` does."""
    experiment = plan.experiment
    title = escape(experiment.title or experiment.name)
    parts = [
        f"<h1>{title}</h1>",
        *(f'<p class="note">{escape(text)}</p>' for text in (experiment.note, *notes(plan)) if text),
        *map(_table, main_tables(plan)),
        '<div class="pictures">',
        *(f"<figure><figcaption>{escape(name)}</figcaption>{svg}</figure>" for name, svg in pictures(plan).items()),
        "</div>",
        _table(cells_table(plan)),
        f'<p class="note">Made by <code>{escape(command)}</code></p>',
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    return f'<h2>{escape(table.title)}</h2><div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'
