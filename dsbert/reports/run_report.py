"""`dsbert report`: one page, pictures as PNG and GIF, and the numbers, in a directory."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dsbert.base.durable import replace_durably
from dsbert.base.errors import UserError
from dsbert.base.jsonl import to_json
from dsbert.inspection.topologies import read_updates
from dsbert.reports.drawing import Picture
from dsbert.reports.run_pictures import ReportedRun, pictures_of
from dsbert.reports.run_tables import (
    LAYER_HEADS,
    attempts_table,
    differences_table,
    layer_rows,
    recipe_differences,
    summary_table,
)
from dsbert.reports.topology_films import Film, film
from dsbert.reports.topology_history import LayerHistory, layer_histories, layer_maps
from dsbert.reports.topology_pictures import (
    MOST_WEIGHTS,
    age_picture,
    churn_picture,
    explored_picture,
    map_picture,
    norm_picture,
    short_name,
)
from dsbert.reports.web_page import figures, heading, made_by, note, page, player, table


@dataclass
class _Parts:
    """What a page is made of. films: by the words before their weights' names."""

    pictures: dict[str, Picture]
    films: dict[str, list[Film]] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    weights: dict[str, Any] = field(default_factory=dict)
    updates: dict[str, Any] = field(default_factory=dict)


def report(paths: Sequence[Path], to: Path, command: str, weights: str | None = None) -> dict[str, Any]:
    """Write index.html, report.json and the pictures of runs to a directory; return what report.json has.

    weights: a pattern (fnmatch) over the names of sparse weights: which are shown, block by block; by default the
    first. Raises UserError where a path is no run, no run has a record, no weight is called so, or matplotlib is
    missing.
    """
    names = _names(paths)
    runs = {name: ReportedRun.read(path) for name, path in zip(names, paths, strict=True)}
    drawn = {name: run for name, run in runs.items() if run.files.metrics.last}
    if not drawn:
        raise UserError(f"expected steps in {', '.join(map(str, paths))}, found none yet: wait for the first")
    parts = _Parts(pictures_of(drawn))
    for name, run in runs.items():
        _add_topology(parts, name, run.files.path, f"{name}: " if len(runs) > 1 else "", weights)
    numbers: dict[str, Any] = {"runs": [run.status.to_json() for run in runs.values()]}
    before = [summary_table(runs)]
    if len(runs) > 1:
        numbers["differences"] = recipe_differences({name: run.files.recipe for name, run in runs.items()})
        before.append(differences_table(numbers["differences"], names))
    parts.tables[:0] = [attempts_table(name, run.status) for name, run in runs.items()]
    numbers |= {"layers": parts.weights, "updates": parts.updates}
    try:
        _write(to, names[0] if len(names) == 1 else f"{len(names)} runs", before, parts, numbers, command)
    except OSError as error:
        raise UserError(f"expected to write {to}, found: {error.strerror}: give another --to") from None
    return numbers


def _add_topology(parts: _Parts, name: str, run: Path, prefix: str, weights: str | None) -> None:
    """What became of blocks in one of the runs."""
    maps, updates, histories = layer_maps(run), read_updates(run), {}
    if not maps:
        return
    shown = {key: one for key, one in maps.items() if weights is None or fnmatchcase(key, weights)}
    if not shown:
        raise UserError(
            f"expected sparse weights of {run} that {weights!r} matches, found none: {next(iter(maps))} is one"
        )
    shown = dict(list(shown.items())[:MOST_WEIGHTS])
    parts.pictures[f"{prefix}where blocks stand"] = map_picture(shown)
    try:
        histories = layer_histories(updates, maps)
    except ValueError as error:
        parts.tables.append(note(f"{name}: what updates did is left out: {error}"))
    rows = layer_rows(maps, histories)
    parts.tables.append(table(f"{prefix}weights", LAYER_HEADS, rows))
    parts.weights[name] = [dict(zip(LAYER_HEADS, row, strict=True)) for row in rows]
    if histories and updates:
        steps = [update.step for update in updates]
        pictures = {
            "what updates moved": churn_picture(steps, histories),
            "what was explored": explored_picture(steps, histories),
            "norms of kept, dropped and new blocks": norm_picture(steps, histories),
            "age at death": age_picture(histories),
        }
        parts.pictures |= {f"{prefix}{title}": picture for title, picture in pictures.items() if picture}
        parts.films[prefix] = [film(one, updates) for one in shown.values()]
        parts.updates[name] = {"steps": steps, "weights": _numbers(histories)}


def _numbers(histories: Mapping[str, LayerHistory]) -> dict[str, Any]:
    """By weight, a number for each update; ages_at_death: how many blocks had lived so many updates, from 0 on."""
    return {
        name: {
            "churn": one.churn,
            "removed_new_ratio": one.removed_new_ratio,
            "explored": one.explored,
            "empty_rows": one.empty_rows,
            "empty_cols": one.empty_cols,
            "norms": one.norms,
            "ages_at_death": one.deaths,
        }
        for name, one in histories.items()
    }


def _write(to: Path, title: str, before: list[str], parts: _Parts, numbers: dict[str, Any], command: str) -> None:
    to.mkdir(parents=True, exist_ok=True)
    files = {name: picture.png() for name, picture in parts.pictures.items()}
    for name, data in zip(_file_names(list(files), "png"), files.values(), strict=True):
        replace_durably(to / name, data)
    for stem, one in _named_films(parts.films):
        replace_durably(to / f"{stem}.png", one.still())
        replace_durably(to / f"{stem}.gif", one.gif())
    shown = {name: picture.svg() for name, picture in parts.pictures.items()}
    text = page(title, [*before, figures(shown), *_players(parts.films), *parts.tables, made_by(command)])
    replace_durably(to / "index.html", text.encode(errors="backslashreplace"))
    replace_durably(to / "report.json", to_json(numbers).encode())


def _players(films: Mapping[str, Sequence[Film]]) -> list[str]:
    found = []
    for run, (prefix, of_run) in enumerate(films.items()):
        found.append(heading(f"{prefix}where blocks stood, update by update"))
        for number, one in enumerate(of_run):
            frames = [(caption, one.png(index)) for index, caption in enumerate(one.captions)]
            key = {word: "#{:02x}{:02x}{:02x}".format(*colour) for word, colour in one.scale.items()}
            found.append(player(one.name, f"film-{run}-{number}", frames, key, opened=number == 0))
    return found


def _named_films(films: Mapping[str, Sequence[Film]]) -> list[tuple[str, Film]]:
    """With the stems of their files' names."""
    titled = [
        (f"{prefix}topology of {short_name(one.name)}", one) for prefix, of_run in films.items() for one in of_run
    ]
    stems = _file_names([title for title, _ in titled], "gif")
    return [(stem.removesuffix(".gif"), one) for stem, (_, one) in zip(stems, titled, strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """The ends of the paths, as short as tells them apart. Raises UserError where one stands twice."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    if len(set(parts)) < len(parts):
        raise UserError(f"expected each run once, found one twice among {', '.join(map(str, paths))}")
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _file_names(titles: Sequence[str], ending: str) -> list[str]:
    """Of pictures, each another one."""
    found: list[str] = []
    for title in titles:
        plain = re.sub(r"[^\w]+", "-", title.lower()).strip("-")
        again = sum(name.partition(".")[0] == plain for name in found)
        found.append(f"{plain}.{again + 1}.{ending}" if again else f"{plain}.{ending}")
    return found
