"""`dsbert report`: the page holds what the run's files say, and needs nothing but itself."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dsbert.checkpoint.loading import read_topology, resolve_checkpoint
from dsbert.inspection.topologies import read_updates, topologies_after
from dsbert.reports.run_pictures import ReportedRun, pictures_of
from dsbert.reports.run_report import _names
from dsbert.reports.topology_films import MOST_FRAMES, STATES, Film, film
from dsbert.reports.topology_history import LayerMap, layer_histories, layer_maps
from dsbert.sparse import BlockTopology, DrawKey
from dsbert.sparse.journal import unpack
from dsbert.training.attempts import UpdateRecord
from tests.commands import complaint, dsbert

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def several(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The report of three runs: as it is; as an older dsbert would have written it, by another recipe; and one whose
    journal lacks its last update."""
    folder = tmp_path_factory.mktemp("several")
    for name in ("older", "torn"):
        shutil.copytree(run, folder / name)
    lines = (run / "masks.jsonl").read_text().splitlines(keepends=True)
    (folder / "torn" / "masks.jsonl").write_text("".join(lines[:2]))
    updates = [json.loads(line) for line in lines]
    for update in updates:
        del update["norms"]
    (folder / "older" / "masks.jsonl").write_text("".join(json.dumps(update) + "\n" for update in updates))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["recipe"]["seed"] = 2
    config["recipe"]["sparsity"]["regrow"] = "gradient"
    del config["recipe"]["optim"]["eps"]
    (folder / "older" / "config.yaml").write_text(yaml.safe_dump(config))
    paths = [str(run), str(folder / "older"), str(folder / "torn")]
    done = dsbert("report", *paths, "--to", str(folder / "to"), "--weights", "*output.dense", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), folder / "to"


def test_a_page_of_a_run(run: Path, tmp_path: Path) -> None:
    to = tmp_path / "report"
    done = dsbert("report", str(run), "--to", str(to), "--json")
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)
    assert json.loads((to / "report.json").read_text()) == numbers
    assert numbers["runs"][0]["state"] == "done"
    text = (to / "index.html").read_text()
    assert not re.search(r"<script|<link|(?:src|href)=[\"']?(?:https?:)?//", text)
    titles = re.findall("<figcaption>(.*?)</figcaption>", text)
    assert titles == [
        "Loss over the run", "Learning rate and gradient norm", "Speed", "Loss and what it cost", "Time line",
        "where blocks stand", "what updates moved", "what was explored", "norms of kept, dropped and new blocks",
        "age at death",
    ]  # fmt: skip
    films = {path.stem for path in to.glob("*.gif")}
    assert len(films) == 6
    assert len(list(to.glob("*.png"))) == len(titles) + len(films)
    assert "\\mathdefault" not in text  # a tick that is a formula
    assert text.count("<svg") == len(titles)
    again = tmp_path / "again"
    dsbert("report", str(run), "--to", str(again))
    for name in ("loss-over-the-run.png", *(f"{stem}.gif" for stem in films)):
        assert (again / name).read_bytes() == (to / name).read_bytes()


def test_what_became_of_blocks(run: Path, several: tuple[dict[str, Any], Path]) -> None:
    """Against the journal, replayed slot by slot, and against what the checkpoint has: births, what was explored."""
    maps = layer_maps(run)
    histories = layer_histories(read_updates(run), maps)
    numbers = several[0]["updates"][run.name]
    updates = [json.loads(line) for line in (run / "masks.jsonl").read_text().splitlines()]
    assert numbers["steps"] == [update["step"] for update in updates] == [3, 6, 9]
    tensors = read_topology(resolve_checkpoint(run))
    for name, history in histories.items():
        born = np.zeros(len(tensors[f"{name}.rows"]), dtype=int)
        ages = []
        for update in updates:
            slots = unpack(update["layers"][name]["slots"]).tolist()
            ages += [update["update"] - born[slot] for slot in slots]
            born[slots] = update["update"]
        layer = maps[name]
        told = numbers["weights"][name]
        assert history.deaths.tolist() == [ages.count(age) for age in range(4)] == told["ages_at_death"]
        assert born.tolist() == tensors[f"{name}.born"].tolist()
        assert sum(history.churn) * len(born) == pytest.approx(len(ages))
        assert told["explored"][-1] == pytest.approx(layer.explored.mean())
        assert told["explored"] == sorted(told["explored"])
        assert (told["empty_rows"][-1], told["empty_cols"][-1]) == (layer.empty_rows, layer.empty_cols)
        for number, update in enumerate(updates):
            for group, summary in update["norms"][name].items():
                assert [told["norms"][f"{group}_{key}"][number] for key in ("mean", "p10", "p50", "p90")] == summary
        assert int(layer.active.sum()) == len(born)
        assert (layer.explored | ~layer.active).all()
        assert (layer.born >= 0).sum() == len(born)
    assert sum(int(history.deaths.sum()) for history in histories.values()) == sum(
        update["pruned"] for update in updates
    )


def shown_states(film: Film) -> list[np.ndarray]:
    """What a reader of the pictures sees: each frame as the names of STATES, by the colour of its pixels."""
    names = list(STATES)
    found = []
    for number in range(len(film.frames)):
        image = Image.open(io.BytesIO(film.png(number))).convert("RGB")
        colours = np.asarray(image).reshape(-1, 3).tolist()
        states = [names.index(next(name for name in names if list(STATES[name]) == colour)) for colour in colours]
        found.append(np.array(states).reshape(image.height, image.width))
    return found


def test_a_film_shows_where_blocks_stood(run: Path) -> None:
    """Every frame against the topology after its update, and the GIF against the frames."""
    updates, maps = read_updates(run), layer_maps(run)
    for name, layer in maps.items():
        one = film(layer, updates)
        assert [caption.partition(":")[0] for caption in one.captions] == [
            "at the start", "update 1, step 3", "update 2, step 6", "update 3, step 9",
        ]  # fmt: skip
        seen = before = topologies_after(run, 0, updates)[name].mask().numpy()
        for step, states in zip((0, 3, 6, 9), shown_states(one), strict=True):
            active = topologies_after(run, step, updates)[name].mask().numpy()
            seen = seen | active
            assert ((states >= 2) == active).all()
            assert ((states == 3) == (active & ~before)).all(), "what has come"
            assert ((states == 1) == (seen & ~active)).all(), "what was left"
            before = active
        with Image.open(io.BytesIO(one.gif())) as gif:
            assert gif.n_frames == 4
        assert Image.open(io.BytesIO(one.still())).height > one.frames[0].shape[0]


def made_up_updates(layer: LayerMap, count: int) -> list[UpdateRecord]:
    """Each moves one block to the next position that is free."""
    active, rows, cols = layer.first.mask(), layer.first.rows.clone(), layer.first.cols.clone()
    found = []
    for number in range(1, count + 1):
        slot = number % len(rows)
        row, col = (~active).nonzero()[number % 7].tolist()
        active[rows[slot], cols[slot]], active[row, col] = False, True
        rows[slot], cols[slot] = row, col
        change: dict[str, list[int] | str] = {"slots": [slot], "rows": [row], "cols": [col]}
        found.append(UpdateRecord(step=10 * number, update=number, digest="0" * 32, pruned=1, layers={"x": change}))
    return found


def test_films_of_long_runs_and_large_weights_stay_small() -> None:
    """300 updates, and a grid of 300 x 1,000: thinned, and a cell is a square whose shade is its density."""
    first = BlockTopology.random((300, 1000), 1, 0.1, DrawKey(1, "test", 0, "x"))
    empty = np.zeros((300, 1000), dtype=bool)
    layer = LayerMap("x", 9999, 0.1, 0.1, 0, 0, empty, empty, empty.astype(int) - 1, first)
    updates = made_up_updates(layer, 300)
    one = film(layer, updates)
    assert len(one.frames) == MOST_FRAMES
    assert one.captions[0].startswith("at the start")
    assert one.captions[-1].startswith("update 300, step 3,000")
    assert one.frames[0].shape == (38, 125)
    assert sum(len(one.png(number)) for number in range(MOST_FRAMES)) < 150_000
    assert len(one.gif()) < 2_000_000
    whole = np.pad(first.mask().numpy(), ((0, 4), (0, 0))).reshape(38, 8, 125, 8).mean((1, 3))[:37]
    assert one.frames[0][:37] == pytest.approx(15 * whole / whole.max(), abs=1.5)


def test_a_player_shows_one_frame_at_a_time(several: tuple[dict[str, Any], Path]) -> None:
    """A radio button for each frame, the last one chosen, a folder of them for each weight that was asked for."""
    text = (several[1] / "index.html").read_text()
    groups = re.findall(
        r'<input type="radio" name="(film-\d-\d)" autocomplete="off" aria-label="[^"]*"( checked)?>', text
    )
    names = [f"film-{run}-{weight}" for run in (0, 1) for weight in (0, 1)]
    assert Counter(groups) == {(name, mark): 1 if mark else 3 for name in names for mark in ("", " checked")}
    assert len(re.findall(r"<details open>", text)) == 2
    assert {path.name for path in several[1].glob("*.gif")} == {
        f"{name}-topology-of-{weight}.gif"
        for name in ("small", "older")
        for weight in ("0-attention-output-dense", "layer-0-output-dense")
    }


def test_a_journal_that_leads_elsewhere_costs_only_what_it_tells(several: tuple[dict[str, Any], Path]) -> None:
    numbers, to = several
    assert set(numbers["updates"]) == {"small", "older"}
    assert len(numbers["layers"]["torn"]) == 6
    text = (to / "index.html").read_text()
    assert "torn: what updates did is left out: masks.jsonl does not lead to where the blocks of" in text
    assert "<figcaption>torn: where blocks stand<" in text
    assert "<figcaption>torn: what updates moved<" not in text


def test_journals_of_before_have_no_norms(several: tuple[dict[str, Any], Path]) -> None:
    numbers, to = several
    titles = re.findall("<figcaption>(.*?)</figcaption>", (to / "index.html").read_text())
    assert [title for title in titles if "norms" in title] == ["small: norms of kept, dropped and new blocks"]
    for told in numbers["updates"]["older"]["weights"].values():
        assert len(told["churn"]) == 3
        assert told["norms"]["kept_mean"] == [None, None, None]
    assert dsbert("verify", str(to.parent / "older")).returncode == 0


def test_what_recipes_differ_in(several: tuple[dict[str, Any], Path]) -> None:
    numbers, to = several
    assert numbers["differences"] == {
        "seed": {"small": 1, "older": 2, "torn": 1},
        "sparsity.regrow": {"small": "random", "older": "gradient", "torn": "random"},
        "optim.eps": {"small": 1e-6, "older": None, "torn": 1e-6},
    }
    row = "<tr><td>sparsity.regrow</td><td>random</td><td>gradient</td><td>random</td></tr>"
    assert row in (to / "index.html").read_text()


def test_no_weight_of_that_name_is_one_line(run: Path, tmp_path: Path) -> None:
    done = dsbert("report", str(run), "--to", str(tmp_path), "--weights", "x")
    assert "'x' matches, found none: bert.encoder" in complaint(done)


def test_losses_of_all_runs_are_in_one_picture(run: Path, tmp_path: Path) -> None:
    """Over steps, FLOPs and seconds of steps."""
    other = tmp_path / "other"
    other.symlink_to(run)
    runs = {name: ReportedRun.read(path) for name, path in (("a", run), ("b", other))}
    pictures = pictures_of(runs)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if line["val_mlm_loss"] is not None]
    over_steps = pictures["Loss over the run"].figure.axes[0].lines
    assert len(over_steps) == 4
    assert over_steps[3].get_ydata().tolist() == [line["val_mlm_loss"] for line in evaluated]
    flops, seconds = (axes.lines for axes in pictures["Loss and what it cost"].figure.axes)
    for over in (flops, seconds):
        assert [len(one.get_xdata()) for one in over] == [12, 2, 12, 2]
        assert over[2].get_ydata().tolist() == [line["loss_mlm"] for line in lines]
        assert over[3].get_ydata().tolist() == [line["val_mlm_loss"] for line in evaluated]
    assert flops[3].get_xdata().tolist() == [line["flops_total"] for line in evaluated]
    taken = np.cumsum([line["step_s"] for line in lines])
    assert seconds[2].get_xdata() == pytest.approx(taken)
    assert seconds[3].get_xdata() == pytest.approx([taken[5], taken[11]])


def test_a_long_runs_lines_are_thinned(tmp_path: Path) -> None:
    (tmp_path / "attempts.jsonl").write_text('{"number": 1, "nonce": "a"}\n')
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {n}, "loss": {n % 10}}}\n' for n in range(1, 10_001)))
    steps, losses = ReportedRun.read(tmp_path).series("loss")
    assert len(steps) == len(losses) == 2000
    assert steps.mean() == pytest.approx(5000.5)
    assert losses.mean() == pytest.approx(4.5)


def test_seconds_of_steps_count_those_between_lines(tmp_path: Path) -> None:
    (tmp_path / "attempts.jsonl").write_text('{"number": 1, "nonce": "a"}\n')
    lines = ['{"step": 10, "step_s": 2.0}', '{"step": 20, "step_s": null}', '{"step": 50, "step_s": 1.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    assert ReportedRun.read(tmp_path).step_seconds().tolist() == [20.0, 20.0, 50.0]


def test_runs_of_one_name_are_told_apart(run: Path, several: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    other = tmp_path / run.name
    other.symlink_to(run)
    assert _names([run, other]) == [f"{run.parent.name}/{run.name}", f"{tmp_path.name}/{run.name}"]
    assert "<h1>3 runs</h1>" in (several[1] / "index.html").read_text()
    assert "found one twice" in complaint(dsbert("report", str(run), str(run), "--to", str(tmp_path / "to")))


def test_what_cannot_be_reported_is_one_line(tmp_path: Path) -> None:
    assert "expected a run in" in complaint(dsbert("report", str(tmp_path), "--to", str(tmp_path / "to")))
    (tmp_path / "attempts.jsonl").write_text('{"number": 1, "nonce": "a"}\n')
    assert "found none yet" in complaint(dsbert("report", str(tmp_path), "--to", str(tmp_path / "to")))
