"""Runs whose samples an older dsbert made: not resumed, but looked at as ever."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dsbert.base.errors import UserError
from dsbert.config.recipe import load_recipe
from dsbert.data.manifest import load_manifest
from dsbert.training.preflight import assert_identity
from tests.commands import SMALL, complaint, dsbert, dsbert_process
from tests.inspection.test_auditing import edit_state


@pytest.fixture
def older(run: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("wandb", "heartbeats")))
    for checkpoint in (copy / "checkpoints").glob("step_*"):
        edit_state(checkpoint, lambda state: state["identity"].pop("samples"))
    return copy


def test_a_run_of_other_samples_is_not_resumed(data: Path, older: Path) -> None:
    before = (older / "attempts.jsonl").read_text()
    words = ["demo", "--run-dir", str(older), f"data.path={data}", *SMALL]
    found = complaint(dsbert_process("pretrain", *words))
    assert "of samples as this dsbert makes them (version 4)" in found
    assert "found version 1: start anew in another --run-dir, or go on with the dsbert that began it" in found
    assert (older / "attempts.jsonl").read_text() == before


def test_no_job_is_submitted_for_one(data: Path, older: Path) -> None:
    digest = load_manifest(data).digest
    recipe = load_recipe("demo", [f"data.path={data}", *SMALL])
    with pytest.raises(UserError, match="found version 1: start anew"):
        assert_identity(recipe, digest, older, None)


def test_but_it_is_looked_at_as_ever(older: Path, tmp_path: Path) -> None:
    for command in (
        ["inspect"],
        ["checkpoints"],
        ["evaluate"],
        ["export", "--to", str(tmp_path / "exported")],
    ):
        done = dsbert(command[0], str(older), *command[1:])
        assert done.returncode == 0, done.stderr
