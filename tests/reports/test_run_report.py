"""`dsbert report`: the page holds what the run's files say, and needs nothing but itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from dsbert.checkpoint.loading import read_topology, resolve_checkpoint
from dsbert.reports.topology_history import layer_histories, layer_maps
from dsbert.sparse.journal import unpack
from tests.commands import complaint, dsbert

pytest.importorskip("matplotlib")


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
        "Loss over the run", "Learning rate and gradient norm", "Speed", "Held-out loss and what it cost", "Time line",
        "where blocks stand", "what updates moved", "age at death",
    ]  # fmt: skip
    assert len(list(to.glob("*.png"))) == len(titles)
    assert text.count("<svg") == len(titles)
    again = tmp_path / "again"
    dsbert("report", str(run), "--to", str(again))
    assert (again / "loss-over-the-run.png").read_bytes() == (to / "loss-over-the-run.png").read_bytes()


def test_what_became_of_blocks(run: Path) -> None:
    """Against the journal, replayed slot by slot, and against the births that the checkpoint has."""
    maps = layer_maps(run)
    steps, histories = layer_histories(run, maps)
    updates = [json.loads(line) for line in (run / "masks.jsonl").read_text().splitlines()]
    assert steps == [update["step"] for update in updates] == [3, 6, 9]
    tensors = read_topology(resolve_checkpoint(run))
    for name, history in histories.items():
        born = np.zeros(len(tensors[f"{name}.rows"]), dtype=int)
        ages = []
        for update in updates:
            slots = unpack(update["layers"][name]["slots"]).tolist()
            ages += [update["update"] - born[slot] for slot in slots]
            born[slots] = update["update"]
        assert list(history.ages) == ages
        assert born.tolist() == tensors[f"{name}.born"].tolist()
        assert sum(history.churn) * len(born) == pytest.approx(len(ages))
        layer = maps[name]
        assert int(layer.active.sum()) == len(born)
        assert (layer.explored | ~layer.active).all()
        assert (layer.born >= 0).sum() == len(born)
    assert sum(len(history.ages) for history in histories.values()) == sum(update["pruned"] for update in updates)


def test_two_runs_side_by_side(run: Path, tmp_path: Path) -> None:
    to = tmp_path / "both"
    other = tmp_path / run.name
    other.symlink_to(run)
    assert dsbert("report", str(run), str(other), "--to", str(to)).returncode == 0
    text = (to / "index.html").read_text()
    assert "<h1>2 runs</h1>" in text
    assert f"{tmp_path.name}/{run.name}: where blocks stand" in text
    assert "found one twice" in complaint(dsbert("report", str(run), str(run), "--to", str(to)))


def test_what_cannot_be_reported_is_one_line(tmp_path: Path) -> None:
    assert "expected a run in" in complaint(dsbert("report", str(tmp_path), "--to", str(tmp_path / "to")))
    (tmp_path / "attempts.jsonl").write_text('{"number": 1, "nonce": "a"}\n')
    assert "found none yet" in complaint(dsbert("report", str(tmp_path), "--to", str(tmp_path / "to")))
