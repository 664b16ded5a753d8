"""The tables of a report: runs, their attempts, what their recipes differ in, and their weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dsbert.base.jsonl import to_json
from dsbert.base.progress import duration
from dsbert.monitoring.run_status import RunStatus
from dsbert.reports.run_pictures import ReportedRun
from dsbert.reports.topology_history import GROUPS, LayerHistory, LayerMap
from dsbert.reports.web_page import note, table

Row = tuple[str, ...]

LAYER_HEADS = (
    "weight", "density", "explored", "churn", "removed-new ratio", "age at death", "norm kept", "norm dropped",
    "norm new", "empty rows", "empty columns",
)  # fmt: skip


def summary_table(runs: Mapping[str, ReportedRun]) -> str:
    """A row for each run."""
    heads = (
        "run", "state", "steps", "loss", "held-out MLM", "FLOPs", "tokens/s", "time", "goodput", "restarts",
        "taken again",
    )  # fmt: skip
    rows = [
        (
            name,
            status.standing.state,
            f"{status.step:,} of {status.total_steps:,}" if status.total_steps else f"{status.step:,}",
            f"{status.loss:.4f}" if status.loss is not None else "",
            f"{status.val_loss:.4f}" if status.val_loss is not None else "",
            f"{flops:.3g}" if (flops := run.files.metrics.last.get("flops_total")) is not None else "",
            f"{status.tokens_per_s:,.0f}" if status.tokens_per_s is not None else "",
            duration(status.spending.total),
            f"{status.spending.goodput:.1%}",
            str(status.restarts),
            str(status.lost_steps),
        )
        for name, run in runs.items()
        for status in (run.status,)
    ]
    return table("runs", heads, rows)


def attempts_table(name: str, status: RunStatus) -> str:
    """A row for each attempt of a run that was restarted."""
    if not status.restarts:
        return note(f"{name}: one attempt, no restart")
    heads = ("attempt", "job", "ranks", "steps", "taken again", "hours", "ended")
    rows = [
        (
            str(one.number),
            one.job_id or "",
            str(one.ranks or ""),
            f"{one.first_step} to {one.last_step}",
            str(one.lost_steps or ""),
            f"{(one.ended - one.started) / 3600:.2f}" if one.ended and one.started else "",
            f"{one.outcome or ''}{f': {one.cause}' if one.cause else ''}",
        )
        for one in status.attempts
    ]
    return table(f"attempts of {name}", heads, rows)


def recipe_differences(recipes: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By dotted key, what each run's recipe says, of the keys in which they are not all alike; None where one has none.

    recipes: by run.
    """
    flat = {name: dict(_entries(recipe)) for name, recipe in recipes.items()}
    keys = dict.fromkeys(key for one in flat.values() for key in one)
    found = {key: {name: one.get(key) for name, one in flat.items()} for key in keys}
    return {key: values for key, values in found.items() if len({to_json(value) for value in values.values()}) > 1}


def differences_table(differences: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> str:
    """A row for each key, a column for each run."""
    if not differences:
        return note("the recipes of these runs are the same")
    rows = [(key, *(_word(values[name]) for name in names)) for key, values in differences.items()]
    return table("what the recipes differ in", ("key", *names), rows)


def layer_rows(maps: Mapping[str, LayerMap], histories: Mapping[str, LayerHistory]) -> list[Row]:
    """As LAYER_HEADS. churn and removed-new ratio: means over the updates; age at death: the mean, in updates; norms:
    means over the blocks at the last update, of all that it kept and dropped, and of those that the one before had put
    there."""
    rows: list[Row] = []
    for name, layer in maps.items():
        history = histories.get(name) or LayerHistory(name)
        norms = [(history.norms.get(f"{group}_mean") or [math.nan])[-1] for group in GROUPS]
        rows.append(
            (
                name,
                f"{layer.density:.4f}",
                f"{layer.explored_share:.3f}",
                f"{_mean(history.churn):.3f}" if history.churn else "",
                f"{_mean(history.removed_new_ratio[1:]):.3f}" if len(history.removed_new_ratio) > 1 else "",
                f"{age:.1f}" if (age := _mean_age(history)) is not None else "",
                *("" if math.isnan(norm) else f"{norm:.3g}" for norm in norms),
                str(layer.empty_rows),
                str(layer.empty_cols),
            )
        )
    return rows


def _entries(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Of nested tables, by dotted key."""
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _entries(entry, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _word(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else to_json(value)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_age(history: LayerHistory) -> float | None:
    """At death, in updates; None where no block was pruned."""
    died = int(history.deaths.sum())
    return float(history.deaths @ np.arange(history.deaths.size)) / died if died else None
