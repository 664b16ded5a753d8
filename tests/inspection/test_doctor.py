"""`dsbert doctor`: what it finds here, and that it sees what it is there to see."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dsbert.inspection import doctor
from dsbert.inspection.doctor_storage import storage_facts
from tests.commands import dsbert


def test_this_machine_can_train(tmp_path: Path, data: Path) -> None:
    done = dsbert("doctor", "--run-dir", str(tmp_path / "runs"), "--data", str(data), "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0, found
    assert {one["verdict"] for one in found} <= {"ok", "note"}
    about = {one["about"]: one["text"] for one in found}
    assert "torch 2." in about["software"]
    assert about["data"].startswith("prepared: train ") or "tokens" in about["data"]
    assert "written through in" in about["runs"]
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    done = dsbert("doctor", "--run-dir", "/proc/runs")
    assert done.returncode == 2
    assert "--run-dir on another file system" in done.stdout


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_data_that_cannot_be_trained_on(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "data"
    if kind == "empty":
        path.mkdir()
    if kind == "file":
        path.write_text("text")
    verdicts = [one.verdict for one in doctor._data(path)]
    assert verdicts[-1] == "fail"


def test_what_cannot_be_looked_at_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_processor", lambda: iter([1 / 0]))
    found = {one.about: one for one in doctor.examine(tmp_path)}
    assert found["processor"] == ("processor", "fail", "ZeroDivisionError: division by zero")
    assert found["limits"].verdict in ("ok", "note")


def test_kernels_that_cannot_be_compiled_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsbert.sparse.kernels.cpu import build

    monkeypatch.setattr(build, "unavailable", lambda: "no C++ compiler was found: install g++, or set CXX")
    found = {one.about: one for one in doctor._processor()}
    assert found["cpu kernels"].verdict == "note"
    assert "install g++" in found["cpu kernels"].text


def test_a_clock_that_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    now = time.time
    monkeypatch.setattr("dsbert.inspection.doctor_storage.time.time", lambda: now() + 100)
    assert any(
        verdict == "note" and "clock is +100 s off" in text for verdict, text in storage_facts(tmp_path, writes=True)
    )


def test_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 4096))
    assert any(one.verdict == "note" and "ulimit -n" in one.text for one in doctor._limits())


def test_a_controller_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, body in (("sbatch", ""), ("sinfo", "echo slurm 22.05.8"), ("scontrol", "echo down; exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (found,) = doctor._slurm()
    assert (found.verdict, found.text) == ("note", "slurm 22.05.8, no controller answers")
