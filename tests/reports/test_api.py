"""`dsbert.Run`: what it gives is what the run's files, its checkpoints and its export hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dsbert
from dsbert.checkpoint.loading import read_topology
from dsbert.sparse.topology import combined_digest
from tests.commands import ENVIRONMENT
from tests.commands import dsbert as command


def test_what_is_light_stays_light(run: Path) -> None:
    """No torch for the package, nor for status and metrics."""
    program = (
        "import sys, dsbert; assert not {'torch', 'pydantic', 'yaml'} & set(sys.modules); "
        "run = dsbert.Run(sys.argv[1]); print(run.status().step, len(run.metrics())); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(run)], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["12", "12"], done.stderr


def test_metrics_are_those_of_the_file(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    table = dsbert.Run(str(run)).metrics()
    assert isinstance(table, pandas.DataFrame)
    assert table["step"].tolist() == list(range(1, 13))
    assert str(table["step"].dtype) == "int64"
    assert table["loss"].tolist() == [line["loss"] for line in lines]
    assert table["val_mlm_loss"].dropna().tolist() == [line["val_mlm_loss"] for line in (lines[5], lines[11])]
    assert table["pruned"].dropna().tolist() == [line["pruned"] for line in lines if line["pruned"] is not None]
    monkeypatch.setitem(sys.modules, "pandas", None)
    rows = dsbert.Run(run).metrics()
    assert [row["loss"] for row in rows] == [line["loss"] for line in lines]
    assert type(rows[0]["step"]) is int


def test_topologies_are_those_that_were_trained_on(run: Path) -> None:
    """At every step the digest that metrics.jsonl names; at those of checkpoints, slot by slot."""
    reader = dsbert.Run(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len({line["topology_digest"] for line in lines}) == 4
    for line in lines:
        found = reader.topology(line["step"])
        digests = {name: topology.digest() for name, topology in found.items()}
        assert combined_digest(digests) == line["topology_digest"], line["step"]
    for entry in reader.checkpoints():
        tensors = read_topology(run / "checkpoints" / entry["name"])
        for name, topology in reader.topology(entry["step"]).items():
            assert torch.equal(topology.rows, tensors[f"{name}.rows"])
            grid = topology.mask()
            assert grid.dtype == torch.bool
            assert grid[tensors[f"{name}.rows"].long(), tensors[f"{name}.cols"].long()].all()
            assert int(grid.sum()) == len(tensors[f"{name}.rows"])
            assert topology.density == pytest.approx(float(grid.float().mean()))
    assert [entry["step"] for entry in reader.checkpoints()] == [6, 12]
    last, newest = reader.topology(12), reader.topology()
    assert all(newest[name].digest() == one.digest() for name, one in last.items())
    assert any(reader.topology(0)[name].digest() != one.digest() for name, one in last.items())


def test_updates_are_those_of_the_journal(run: Path) -> None:
    table = dsbert.Run(run).updates()
    updates = [json.loads(line) for line in (run / "masks.jsonl").read_text().splitlines()]
    lines = {line["step"]: line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    for update in updates:
        rows = table[table["step"] == update["step"]]
        assert set(rows["weight"]) == set(update["layers"])
        for _, row in rows.iterrows():
            norms = update["norms"][row["weight"]]
            assert ("dropped" in norms) == bool(update["layers"][row["weight"]]["slots"])
            for group, summary in norms.items():
                assert [row[f"{group}_{key}"] for key in ("mean", "p10", "p50", "p90")] == summary
            assert not row["dropped_p90"] > row["kept_p10"]
        # All weights are of one shape per kind here: the run's own figure is their mean by size.
        sizes = {name: topology.mask().numel() for name, topology in dsbert.Run(run).topology(0).items()}
        explored = sum(row["explored"] * sizes[row["weight"]] for _, row in rows.iterrows()) / sum(sizes.values())
        assert explored == pytest.approx(lines[update["step"]]["dof"])
        pruned = [len(update["layers"][row["weight"]]["slots"]) for _, row in rows.iterrows()]
        again = sum(row["removed_new_ratio"] * n for (_, row), n in zip(rows.iterrows(), pruned, strict=True))
        assert again / sum(pruned) == pytest.approx(lines[update["step"]]["removed_new_ratio"])


def test_a_model_is_that_of_the_export(run: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertForPreTraining

    reader = dsbert.Run(run)
    assert command("export", str(run), "--to", str(tmp_path / "export")).returncode == 0
    exported = BertForPreTraining.from_pretrained(tmp_path / "export").eval()
    text = "the quick brown fox"
    ids = reader.tokenizer().encode(text).ids
    assert ids == AutoTokenizer.from_pretrained(tmp_path / "export")(text)["input_ids"]
    model = reader.model()
    assert not model.training
    with torch.no_grad():
        found, expected = (one(torch.tensor([ids])).prediction_logits for one in (model, exported))
    assert torch.equal(found, expected)
    before = reader.model(6).bert.encoder.layer[0].intermediate.dense.weight
    mask = reader.topology(6)["bert.encoder.layer.0.intermediate.dense"].mask()
    blocks = before.view(mask.shape[0], 8, mask.shape[1], 8).abs().sum((1, 3))
    update = [json.loads(line) for line in (run / "masks.jsonl").read_text().splitlines()][1]
    fresh = len(update["layers"]["bert.encoder.layer.0.intermediate.dense"]["slots"])  # of step 6: zero as yet
    assert not blocks[~mask].any()
    assert int((blocks > 0).sum()) == int(mask.sum()) - fresh
    assert not torch.equal(before, model.bert.encoder.layer[0].intermediate.dense.weight)
    assert torch.equal(reader.model("step_00000006").bert.encoder.layer[0].intermediate.dense.weight, before)


@pytest.mark.parametrize("what", ["loss", "cost", "attempts", "blocks", "churn", "explored", "norms", "ages"])
def test_plots(what: str, run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = dsbert.Run(run).plot(what)
    assert picture.figure.axes
    picture.save(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().startswith("<svg")
    if what == "loss":
        assert picture._repr_png_()[:4] == b"\x89PNG", "what a notebook shows"


def test_what_cannot_be_had_is_one_line(run: Path, tmp_path: Path) -> None:
    reader = dsbert.Run(run)
    for call, words in (
        (lambda: dsbert.Run(tmp_path), "expected a run in"),
        (lambda: reader.topology(13), "expected a step of 0 to 12"),
        (lambda: reader.topology(-1), "expected a step of 0 to 12"),
        (lambda: reader.model(7), r"expected a checkpoint step_00000007 .* found step_00000006, step_00000012"),
        (lambda: reader.model("best"), "expected a checkpoint best"),
        (lambda: reader.plot("lose"), r"expected one of loss, rates, .* found 'lose'"),
        (lambda: reader.plot("loss").save(tmp_path / "a.pdf"), r"ends in \.svg or \.png"),
    ):
        with pytest.raises(dsbert.UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(AttributeError, match="no attribute 'Runs'"):
        _ = dsbert.Runs


def test_a_run_without_a_checkpoint_has_no_topology_yet(tmp_path: Path) -> None:
    (tmp_path / "attempts.jsonl").write_text('{"number": 1, "nonce": "a"}\n')
    reader = dsbert.Run(tmp_path)
    assert len(reader.metrics()) == 0
    assert reader.checkpoints() == []
    for call in (reader.topology, reader.updates, lambda: reader.plot("churn")):
        with pytest.raises(dsbert.UserError, match=r"expected a checkpoint in .* found none"):
            call()


def test_a_journal_that_lacks_an_update_leads_nowhere(run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    lines = (copy / "masks.jsonl").read_text().splitlines(keepends=True)
    (copy / "masks.jsonl").write_text(lines[0] + lines[2])
    reader = dsbert.Run(copy)
    assert reader.topology(3)
    with pytest.raises(dsbert.CheckpointError, match=r"expected update 2, found update 3.*dsbert verify"):
        reader.topology(9)
    with pytest.raises(dsbert.UserError, match="expected a whole journal"):
        reader.updates()
