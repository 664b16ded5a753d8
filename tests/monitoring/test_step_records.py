"""metrics.jsonl read on from look to look: the sums of any way there are those of reading it at once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dsbert.base.jsonl import parse_object
from dsbert.monitoring import step_records
from dsbert.monitoring.step_records import StepLog, StepSums, read_columns


def line(step: int, **values: Any) -> str:
    record = {
        "step": step,
        "time": 100.0 + step,
        "loss": 10.0 / step,
        "step_s": 0.5,
        "skipped": step % 2,
        "save_s": 1.0,
    }
    return json.dumps(record | values) + "\n"


def told(sums: StepSums) -> dict[str, Any]:
    return {"losses": list(sums.losses), "recent": sums.recent} | {
        key: getattr(sums, key) for key in ("val_loss", "skipped", "steps_s", "evaluation_s", "saves_s", "last")
    }


def parsed(log: StepLog, began: int = 0, started: float = 0.0) -> int:
    """How many lines a look parses; what it finds is what a first look finds."""
    with mock.patch.object(step_records, "parse_object", wraps=parse_object) as parse:
        sums = log.read(began, started)
        count = parse.call_count
    assert told(sums) == told(StepLog(log._path.parent).read(began, started))
    return int(count)


def test_a_line_is_parsed_once(tmp_path: Path) -> None:
    log, file = StepLog(tmp_path), tmp_path / "metrics.jsonl"
    assert parsed(log) == 0
    file.write_text("".join(line(step) for step in range(1, 31)))
    assert parsed(log) == 30
    assert parsed(log) == 0
    with file.open("a") as more:
        more.write(line(40, val_mlm_loss=4.5, validation_s=2.0) + line(41)[:-9])
    assert parsed(log) == 1
    sums = log.read(0, 0.0)
    assert (sums.steps_s, sums.evaluation_s, sums.val_loss, sums.skipped) == (20.0, 2.0, 4.5, 15)
    assert [one["step"] for one in sums.recent] == [*range(12, 31), 40]
    with file.open("a") as more:
        more.write(line(41)[-9:])
    assert parsed(log) == 1
    assert log.read(0, 0.0).last["step"] == 41


@pytest.mark.parametrize("regrown", [0, 4, 5, 9])
def test_a_file_that_was_cut_back_is_read_again(regrown: int, tmp_path: Path) -> None:
    """As on resume; by the next look it may be shorter than it was, as long, or longer."""
    log, file = StepLog(tmp_path), tmp_path / "metrics.jsonl"
    kept = "".join(line(step) for step in range(10, 15))
    file.write_text(kept + "".join(line(step) for step in range(15, 20)))
    assert parsed(log) == 10
    file.write_text(kept + "".join(line(step, time=200.0 + step) for step in range(15, 15 + regrown)))
    assert parsed(log) == 5 + regrown
    assert parsed(log) == 0
    file.unlink()
    assert parsed(log) == 0
    assert told(log.read(0, 0.0)) == told(StepSums())


def test_lines_of_the_attempt_before_do_not_count(tmp_path: Path) -> None:
    log, file = StepLog(tmp_path), tmp_path / "metrics.jsonl"
    file.write_text("".join(line(step) for step in (10, 20, 30)))
    assert parsed(log) == 3
    assert parsed(log, began=20, started=135.0) == 3
    assert log.read(20, 135.0).last["step"] == 20
    assert read_columns(tmp_path, 20, 135.0)["step"].tolist() == [10, 20]


def test_columns_have_a_number_for_every_line(tmp_path: Path) -> None:
    lines = [
        line(1, val_mlm_loss=None, text="x"), "no json\n", '{"step": null}\n', line(2, new=7, flag=True),
        line(3, val_mlm_loss=2.5, loss=None), '{"step": 4, "loss": Infinity}\n', line(5)[:-1],
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    columns = read_columns(tmp_path, 0, 0.0)
    assert {len(column) for column in columns.values()} == {4}
    found = {key: [None if math.isnan(value) else value for value in column] for key, column in columns.items()}
    assert found["step"] == [1, 2, 3, 4]
    assert found["loss"] == [10, 5, None, None]
    assert found["val_mlm_loss"] == [None, None, 2.5, None]
    assert found["new"] == [None, 7, None, None]
    assert not {"text", "flag"} & found.keys()
    assert read_columns(tmp_path / "none", 0, 0.0) == {}


def test_no_line_of_a_strangers_brings_columns_without_end(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(line(step, **{f"field{step}": 1.0}) for step in range(1, 1001)))
    assert len(read_columns(tmp_path, 0, 0.0)) == 200
