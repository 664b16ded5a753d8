"""Commands, ranks, workers and W&B's process where the working directory holds what must not be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsbert.cluster.launcher import module_command
from tests.commands import SMALL, Done
from tests.text import write_corpus

ROOT = Path(__file__).parents[2]
# Of the standard library, of what ranks import, and of what W&B's process does.
DECOYS = ("random", "secrets", "xxhash", "torch", "numpy", "yaml", "click", "pydantic", "deepspeed", "wandb")
# Nothing leads to the checkout but the installation, as for a user.
OUTSIDE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """The folder above a checkout called dsbert, with modules that leave a mark when they are imported."""
    folder = tmp_path / "trap"
    folder.mkdir()
    (folder / "dsbert").symlink_to(ROOT)
    for name in DECOYS:
        (folder / f"{name}.py").write_text("open(__file__ + '.imported', 'w'); raise ImportError('a decoy')\n")
    return folder


def run_in(folder: Path, *command: str, **environment: str) -> Done:
    done = subprocess.run(
        command, cwd=folder, env=OUTSIDE | environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert not list(folder.glob("*.imported")), done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def test_a_script_above_the_checkout_imports_the_package(trap: Path) -> None:
    for decoy in trap.glob("*.py"):  # a script's own folder is Python's to look in
        decoy.unlink()
    (trap / "script.py").write_text("import dsbert.data.prefetch; print(dsbert.__file__)")
    for command in (["script.py"], ["-c", (trap / "script.py").read_text()]):
        done = run_in(trap, sys.executable, *command)
        assert (done.returncode, done.stdout.strip()) == (0, str(ROOT / "dsbert" / "__init__.py")), done.stderr


@pytest.mark.parametrize("started", ["module", "path", "child"])
def test_the_command_line_is_ours(started: str, trap: Path) -> None:
    command = {
        "module": [sys.executable, "-m", "dsbert"],
        "path": [str(Path(sys.executable).with_name("dsbert"))],
        "child": module_command("dsbert.cli"),
    }[started]
    done = run_in(trap, *command, "submit", "demo", "--nodes", "1", "--time", "1:00:00", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --time=1:00:00" in done.stdout


def test_a_child_finds_the_package_of_its_parent_without_an_installation(trap: Path) -> None:
    """Nor does it take another one that PYTHONPATH leads to; both are left to others, as they are."""
    other = trap / "other" / "dsbert"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise ImportError('another dsbert')")
    command = module_command("dsbert.cli", "--help")
    done = run_in(trap, command[0], "-S", *command[1:], PYTHONPATH=str(trap / "other"))
    assert "No module named 'click'" in done.stderr, "it came as far as our own imports, without site-packages"
    assert run_in(trap, *command, PYTHONPATH=str(trap / "other")).returncode == 0


@pytest.mark.slow  # a preparation and a run, with W&B: 20 s on two idle cores
def test_ranks_and_workers_import_what_their_parent_did(trap: Path) -> None:
    write_corpus(trap / "corpus.txt", num_documents=40)
    words = ("--source", "corpus.txt", "--to", "made", "--vocab-size", "200", "--validation", "0.2", "--nproc", "2")
    done = run_in(trap, sys.executable, "-m", "dsbert", "prepare", *words)
    assert done.returncode == 0, done.stderr
    changes = ("data.path=made", *SMALL, "log.wandb=true", "optim.total_steps=4", "optim.warmup_steps=1")
    command = [sys.executable, "-m", "dsbert", "pretrain", "demo", "--nproc", "2", "--run-dir", "run", *changes]
    done = run_in(trap, *command, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert "W&B: " not in done.stderr
    assert list(trap.glob("run/wandb/offline-run-*/run-*.wandb"))
