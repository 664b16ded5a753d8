"""Journals: what is written is read back, each step stands once, and a crash costs one line at most."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from dsbert.base.jsonl import JsonlFile, to_json


@pytest.fixture
def journal(tmp_path: Path) -> JsonlFile:
    return JsonlFile(tmp_path / "masks.jsonl")


def steps(journal: JsonlFile) -> list[int]:
    return [record["step"] for record in journal.read()]


def fill(journal: JsonlFile, *numbers: int) -> None:
    for number in numbers:
        journal.append({"step": number, "loss": 1 / number})


def test_round_trip_is_on_disk_at_once(journal: JsonlFile) -> None:
    record = {"step": 1, "loss": 0.25, "layers": {"a": [1, 2]}, "ok": True, "none": None}
    journal.append(record)
    assert JsonlFile(journal.path).read() == [record]


def test_no_file_reads_as_nothing(journal: JsonlFile) -> None:
    assert journal.read() == []
    assert journal.cut_back(3, attempt=1) == 0
    assert not journal.path.exists()


def test_what_json_lacks() -> None:
    value = {"nan": math.nan, "inf": [math.inf, -math.inf], "numpy": np.float32(0.5), "array": np.arange(2), 3: (1, 2)}
    assert json.loads(to_json(value)) == {"nan": None, "inf": [None, None], "numpy": 0.5, "array": [0, 1], "3": [1, 2]}
    assert json.loads(to_json(np.float64("nan"))) is None
    with pytest.raises(TypeError):
        to_json({"a": object()})


def test_cut_back_moves_the_later_lines(journal: JsonlFile) -> None:
    fill(journal, 10, 20, 30, 40)
    assert journal.cut_back(20, attempt=3) == 2
    assert steps(journal) == [10, 20]
    assert steps(JsonlFile(journal.path.with_name("masks.3.jsonl"))) == [30, 40]
    fill(journal, 30)
    assert steps(journal) == [10, 20, 30]


@pytest.mark.parametrize(("step", "left"), [(0, []), (9, []), (10, [10]), (15, [10]), (20, [10, 20]), (99, [10, 20])])
def test_cut_back_at_any_step(journal: JsonlFile, step: int, left: list[int]) -> None:
    fill(journal, 10, 20)
    assert journal.cut_back(step, attempt=1) == 2 - len(left)
    assert steps(journal) == left
    assert journal.path.with_name("masks.1.jsonl").exists() == (len(left) < 2)


@pytest.mark.parametrize("torn", [b'{"step": 30, "lo', b"{", b"x" * 200_000])
def test_a_torn_last_line(journal: JsonlFile, torn: bytes) -> None:
    fill(journal, 10, 20)
    journal.close()
    with journal.path.open("ab") as file:
        file.write(torn)
    assert steps(journal) == [10, 20]
    fill(journal, 30)
    assert steps(journal) == [10, 20, 30]


@pytest.mark.parametrize("torn", [b"{", b"x" * 200_000])
def test_nothing_but_a_torn_line(journal: JsonlFile, torn: bytes) -> None:
    journal.path.write_bytes(torn)
    assert journal.read() == []
    fill(journal, 10)
    assert steps(journal) == [10]


def test_cut_back_drops_a_torn_line_and_moves_a_garbled_one(journal: JsonlFile) -> None:
    fill(journal, 10, 20)
    journal.close()
    with journal.path.open("ab") as file:
        file.write(b'\0\0\0\n{"step": 3')
    assert journal.cut_back(20, attempt=1) == 1
    assert steps(journal) == [10, 20]
    assert journal.path.with_name("masks.1.jsonl").read_bytes() == b"\0\0\0\n"


def test_a_garbled_line_in_the_middle_is_named(journal: JsonlFile) -> None:
    journal.path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"masks\.jsonl, line 2: expected a JSON object"):
        journal.read()


def test_a_copy_that_cannot_be_written_leaves_all_as_it_was(journal: JsonlFile) -> None:
    fill(journal, 10, 20)
    journal.path.with_name("masks.1.jsonl").mkdir()
    with pytest.raises(OSError, match="directory"):
        journal.cut_back(10, attempt=1)
    assert steps(journal) == [10, 20]


def test_append_after_a_full_disk(journal: JsonlFile) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    fill(journal, 10)
    journal.close()
    journal._file = full.open("ab")
    with pytest.raises(OSError, match="No space"):
        fill(journal, 20)
    fill(journal, 20)
    assert steps(journal) == [10, 20]
