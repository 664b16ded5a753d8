"""`dsbert report`: one page, pictures as PNG, and the numbers, in a directory."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsbert.base.durable import replace_durably
from dsbert.base.errors import UserError
from dsbert.base.jsonl import to_json
from dsbert.base.progress import duration
from dsbert.monitoring.run_files import RunFiles
from dsbert.monitoring.run_status import RunStatus, read_run
from dsbert.reports.drawing import Picture
from dsbert.reports.run_pictures import pictures_of
from dsbert.reports.topology_history import LayerHistory, LayerMap, layer_histories, layer_maps
from dsbert.reports.topology_pictures import age_picture, churn_picture, map_picture
from dsbert.reports.web_page import figures, made_by, note, page, table


def report(paths: Sequence[Path], to: Path, command: str) -> dict[str, Any]:
    """Write index.html, report.json and the pictures of runs to a directory; return what report.json has.

    Raises UserError where a path is no run, no run has a record, or matplotlib is missing.
    """
    names = _names(paths)
    runs: dict[str, tuple[RunFiles, RunStatus]] = {}
    for name, path in zip(names, paths, strict=True):
        runs[name] = read_run(path)
    drawn = {name: run for name, run in runs.items() if run[0].metrics}
    if not drawn:
        raise UserError(f"expected steps in {', '.join(map(str, paths))}, found none yet: wait for the first")
    pictures = pictures_of(drawn)
    parts, layers = [_summary(runs), *(_attempts(name, status) for name, (_, status) in runs.items())], {}
    for name, path in zip(names, paths, strict=True):
        maps = layer_maps(path)
        steps, histories = layer_histories(path, maps)
        prefix = f"{name}: " if len(runs) > 1 else ""
        if maps:
            layers[name] = _layer_rows(maps, histories)
            parts.append(table(f"{prefix}weights", _LAYER_HEADS, layers[name]))
            pictures[f"{prefix}where blocks stand"] = map_picture(maps, len(steps))
        if maps and steps:
            pictures[f"{prefix}what updates moved"] = churn_picture(steps, histories)
            pictures[f"{prefix}age at death"] = age_picture(histories, len(steps))
    numbers = {
        "runs": [status.to_json() for _, status in runs.values()],
        "layers": {name: [dict(zip(_LAYER_HEADS, row, strict=True)) for row in rows] for name, rows in layers.items()},
    }
    title = names[0] if len(names) == 1 else f"{len(names)} runs"
    try:
        _write(to, title, parts, pictures, numbers, command)
    except OSError as error:
        raise UserError(f"expected to write {to}, found: {error.strerror}: give another --to") from None
    return numbers


def _write(
    to: Path, title: str, parts: list[str], pictures: dict[str, Picture], numbers: dict[str, Any], command: str
) -> None:
    to.mkdir(parents=True, exist_ok=True)
    shown = {name: picture.svg() for name, picture in pictures.items()}
    for file, picture in zip(_file_names(list(pictures)), pictures.values(), strict=True):
        replace_durably(to / file, picture.png())
    text = page(title, [*parts[:1], figures(shown), *parts[1:], made_by(command)])
    replace_durably(to / "index.html", text.encode(errors="backslashreplace"))
    replace_durably(to / "report.json", to_json(numbers).encode())


def _summary(runs: dict[str, tuple[RunFiles, RunStatus]]) -> str:
    heads = ("run", "state", "steps", "loss", "held-out MLM", "tokens/s", "time", "goodput", "restarts", "taken again")
    rows = [
        (
            name,
            status.standing.state,
            f"{status.step:,} of {status.total_steps:,}" if status.total_steps else f"{status.step:,}",
            f"{status.loss:.4f}" if status.loss is not None else "",
            f"{status.val_loss:.4f}" if status.val_loss is not None else "",
            f"{status.tokens_per_s:,.0f}" if status.tokens_per_s is not None else "",
            duration(status.spending.total),
            f"{status.spending.goodput:.1%}",
            str(status.restarts),
            str(status.lost_steps),
        )
        for name, (_, status) in runs.items()
    ]
    return table("runs", heads, rows)


def _attempts(name: str, status: RunStatus) -> str:
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


_LAYER_HEADS = ("weight", "density", "explored", "churn", "new again", "age at death", "empty rows", "empty columns")


def _layer_rows(maps: dict[str, LayerMap], histories: dict[str, LayerHistory]) -> list[tuple[str, ...]]:
    """churn and new again: means over the updates; age at death: the mean, in updates."""
    rows: list[tuple[str, ...]] = []
    for name, layer in maps.items():
        history = histories[name]
        rows.append(
            (
                name,
                f"{layer.density:.4f}",
                f"{layer.explored_share:.3f}",
                f"{_mean(history.churn):.3f}" if history.churn else "",
                f"{_mean(history.new_again[1:]):.3f}" if len(history.new_again) > 1 else "",
                f"{_mean(history.ages):.1f}" if history.ages else "",
                str(layer.empty_rows),
                str(layer.empty_cols),
            )
        )
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _names(paths: Sequence[Path]) -> list[str]:
    """The ends of the paths, as short as tells them apart. Raises UserError where one stands twice."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    if len(set(parts)) < len(parts):
        raise UserError(f"expected each run once, found one twice among {', '.join(map(str, paths))}")
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _file_names(titles: Sequence[str]) -> list[str]:
    """Of pictures, each another one."""
    found: list[str] = []
    for title in titles:
        plain = re.sub(r"[^\w]+", "-", title.lower()).strip("-")
        again = sum(name.partition(".")[0] == plain for name in found)
        found.append(f"{plain}.{again + 1}.png" if again else f"{plain}.png")
    return found
