"""One HTML page of an experiment."""

from __future__ import annotations

from dsbert.experiment.planning import Plan
from dsbert.experiment.plots import pictures
from dsbert.experiment.result_tables import Table, cells_table, main_tables, notes
from dsbert.reports.web_page import figures, made_by, note, page, table


def experiment_page(plan: Plan, command: str) -> str:
    """The whole page. command: what makes it again. Raises UserError as `pictures` does."""
    experiment = plan.experiment
    parts = [
        *(note(text) for text in (experiment.note, *notes(plan)) if text),
        *map(_shown, main_tables(plan)),
        figures(pictures(plan)),
        _shown(cells_table(plan)),
        made_by(command),
    ]
    return page(experiment.title or experiment.name, parts)


def _shown(one: Table) -> str:
    return table(one.title, one.header, one.rows)
