"""Sweeps, missing cells, tables and statistics: on results that are made up, of cells that are real."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from dsbert.experiment.cell_results import CellResult, MaskStep, Measurement, load_records, save_records
from dsbert.experiment.cells import all_cells
from dsbert.experiment.definition import load_experiment
from dsbert.experiment.paired_statistics import estimate
from dsbert.experiment.planning import Plan, make_plan
from dsbert.experiment.result_tables import arms_table, as_json, as_text, cells_table, comparisons, notes
from dsbert.training.provenance import NUMERICS
from tests.commands import dsbert
from tests.experiment.test_definition import TEXT, written


def result(cell, loss, seconds=10.0, revision="r1"):
    measurements = tuple(
        Measurement(step, 10 * step, 100 * step, 1000 * step, seconds * step / 50, value, 0.1)
        for step, value in ((10, loss + 3), (30, loss + 1.4), (50, loss))
    )
    masks = (MaskStep(25, 0.3, 0.5), MaskStep(50, 0.5, 0.1))
    return CellResult(cell.name, cell.identity, measurements, masks, 0.1, {"torch": "2"}, revision)


@pytest.fixture
def cells(tmp_path):
    return all_cells(load_experiment(written(tmp_path, TEXT)), tmp_path)


def plan_with(cells, losses, given_up=frozenset(), tmp_path=None):
    """losses: by label, of the cells that are done."""
    done = {cell.name: result(cell, losses[cell.label]) for cell in cells if cell.label in losses}
    return Plan(load_experiment(written(tmp_path, TEXT)), tuple(cells), done, given_up)


def test_cells_of_another_arithmetic_are_not_mixed_in(cells, tmp_path):
    experiment, records = load_experiment(written(tmp_path, TEXT)), tmp_path / "records.jsonl"
    before = all_cells(experiment, tmp_path, numerics=NUMERICS - 1)
    assert [cell.label for cell in before] == [cell.label for cell in cells]
    save_records(records, {cell.name: result(cell, 5.0) for cell in (*before[:2], *cells[2:3])})
    for numerics, expected in ((NUMERICS - 1, before[:2]), (NUMERICS, cells[2:3])):
        plan = make_plan(experiment, tmp_path, records, numerics)
        assert sorted(plan.results) == sorted(cell.name for cell in expected)
    assert make_plan(experiment, tmp_path, records).results.keys() == plan.results.keys()


def test_a_sweep_comes_first_and_its_best_is_trained_with_every_seed(cells, tmp_path):
    plan = plan_with(cells, {}, tmp_path=tmp_path)
    assert len(plan.missing) == 2 + 4 * 3  # dense has one value; four groups try three rates with the first seed
    assert plan.unknown == 4
    losses = {
        f"static block_size=4 lr={lr} seed=1": loss for lr, loss in (("0.001", 5.0), ("0.002", 4.0), ("0.004", 4.5))
    }
    plan = plan_with(cells, losses, tmp_path=tmp_path)
    assert plan.unknown == 3
    group = ("static", (("sparsity.block_size", 4),))
    assert plan.best[group] == (("optim.lr", 2e-3),)
    assert "static block_size=4 lr=0.002 seed=2" in [cell.label for cell in plan.missing]
    assert "static block_size=4 lr=0.001 seed=2" not in [cell.label for cell in plan.wanted]


def test_a_value_that_failed_twice_or_diverged_is_not_the_best(cells, tmp_path):
    labels = [f"static block_size=4 lr={lr} seed=1" for lr in ("0.001", "0.002", "0.004")]
    failed = next(cell.name for cell in cells if cell.label == labels[2])
    plan = plan_with(cells, {labels[0]: 5.0, labels[1]: math.nan}, frozenset({failed}), tmp_path)
    assert plan.best["static", (("sparsity.block_size", 4),)] == (("optim.lr", 1e-3),)
    assert failed not in [cell.name for cell in plan.missing]
    assert "failed twice" in as_text(cells_table(plan), "csv")


def test_differences_are_paired_by_seed(cells, tmp_path):
    """Seeds that differ by far more than the arms do not hide the difference."""
    losses = {}
    for lr in ("0.001", "0.002", "0.004"):
        for block in (4, 16):
            for seed, offset in ((1, 0.0), (2, 3.0)):
                worse = 0.0 if lr == "0.002" else 1.0
                losses[f"static block_size={block} lr={lr} seed={seed}"] = 5.0 + offset + worse
                losses[f"dynamic block_size={block} lr={lr} seed={seed}"] = 4.9 + offset + worse + 0.01 * seed
    plan = plan_with(cells, losses, tmp_path=tmp_path)
    found = comparisons(plan)
    assert [one.point for one in found] == [(("sparsity.block_size", 4),), (("sparsity.block_size", 16),)]
    for one in found:
        assert one.difference.mean == pytest.approx(-0.085)
        assert one.difference.n == 2
        assert one.difference.half == pytest.approx(12.7062 * 0.005, rel=1e-4)  # t of one degree of freedom, at 97.5 %
    rows = as_json(arms_table(plan))
    assert rows[1]["lr"] == "0.002"
    assert rows[1]["loss"].startswith("6.5000 ± ")
    assert rows[1]["half way"] == "30"
    assert rows[0]["loss"] == "missing"
    assert rows[0]["n"] == "0 of 2"


def test_an_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = [abs(found.mean) <= found.half for found in (estimate(rng.normal(size=3).tolist()) for _ in range(4000))]
    assert np.mean(held) == pytest.approx(0.95, abs=0.012)
    assert math.isinf(estimate([1.0]).half)
    assert str(estimate([])) == "missing"


def test_what_a_reader_must_know_is_said(cells, tmp_path):
    plan = plan_with(cells, {"dense lr=0.0005 seed=1": 4.0, "dense lr=0.0005 seed=2": 4.0}, tmp_path=tmp_path)
    assert notes(plan)[0] == "12 of 14 cells are missing, and 4 more once sweeps are over"
    other = {
        name: replace(one, revision="r2") if index else one for index, (name, one) in enumerate(plan.results.items())
    }
    assert "trained at 2 revisions: r1, r2" in notes(replace(plan, results=other))


def test_records_give_the_same_tables_as_runs(cells, tmp_path):
    plan = plan_with(cells, {"dense lr=0.0005 seed=1": 4.0}, tmp_path=tmp_path)
    records = tmp_path / "records.jsonl"
    save_records(records, dict(plan.results))
    assert load_records(records) == dict(plan.results)
    again = make_plan(plan.experiment, tmp_path, records)
    for form in ("markdown", "latex", "csv"):
        assert as_text(arms_table(again), form) == as_text(arms_table(plan), form)
    assert [json.loads(line)["name"] for line in records.read_text().splitlines()] == sorted(plan.results)


def test_collect_keeps_what_other_experiments_have_shown(cells, tmp_path):
    records = tmp_path / "records.jsonl"
    others = {cell.name: result(cell, 4.0) for cell in cells[:2]}
    assert {cell.arm for cell in cells[:2]} == {"dense"}
    save_records(records, others)
    lines = [line for line in TEXT.splitlines(keepends=True) if not line.startswith(("  dense", "  static", "compare"))]
    fewer = written(tmp_path, "".join(lines))
    done = dsbert("experiment", "collect", str(fewer), "--dir", str(tmp_path), "--to", str(records))
    assert done.returncode == 0, done.stderr
    assert load_records(records) == others
