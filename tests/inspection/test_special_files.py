"""`dsbert verify` ends, whatever stands where it reads: a pipe nobody writes into, a device without an end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import complaint, dsbert


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


CASES = [
    ("data", "train-00000.arrow", "train-00000.arrow", pipe, "a pipe"),
    ("data", "manifest.json", "manifest.json", endless, "a device"),
    ("data", "tokenizer/tokenizer.json", "tokenizer/tokenizer.json", endless, "a device"),
    ("run", "metrics.jsonl", "metrics.jsonl", pipe, "a pipe"),
    ("run", "checkpoints/latest", "checkpoints/latest", pipe, "a pipe"),
    ("run", "checkpoints/step_00000012/manifest.json", "checkpoints/step_00000012/manifest.json", pipe, "a pipe"),
    ("run/checkpoints/step_00000012", "topology.safetensors", "topology.safetensors", endless, "a device"),
    ("run/checkpoints/step_00000012", "state.json", "state.json", pipe, "a pipe"),
]


@pytest.mark.parametrize(("where", "file", "named", "become", "kind"), CASES)
def test_what_is_no_file_is_named_and_not_read(
    data: Path, run: Path, tmp_path: Path, where: str, file: str, named: str, become: Callable[[Path], None], kind: str
) -> None:
    first, _, below = where.partition("/")
    ignored = shutil.ignore_patterns("wandb", "heartbeats")
    copy = Path(shutil.copytree({"data": data, "run": run}[first], tmp_path / first, ignore=ignored)) / below
    become(copy / file)
    done = dsbert("verify", str(copy), "--json")
    assert done.returncode == 4, done.stderr
    report = json.loads(done.stdout)
    assert report["problems"] == [
        {"file": named, "problem": f"expected a file, found {kind}, of which nothing is read: remove it"}
    ]


def test_a_folder_with_nothing_but_a_pipe(tmp_path: Path) -> None:
    """For a manifest that cannot be read there is no telling what the folder was."""
    os.mkfifo(tmp_path / "manifest.json")
    assert dsbert("verify", str(tmp_path)).returncode == 4


@pytest.mark.parametrize("name", ["pipe", "step_00000012", "/dev/zero", "/dev/null", "/dev"])
def test_a_path_that_is_no_folder_of_ours_is_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if not path.exists():
        os.mkfifo(path)
    done = dsbert("verify", str(path))
    if name == "step_00000012":  # by its name a checkpoint
        assert (done.returncode, len(done.stdout.splitlines())) == (4, 2)
    else:
        assert "expected a run directory, a checkpoint or prepared data" in complaint(done)
