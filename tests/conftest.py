"""Settings of every test, and the one run that many look at. Plain functions stand in helpers.py and commands.py."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import SMALL, dsbert, dsbert_process
from tests.fault_rows import FaultTable
from tests.text import write_corpus

# Two test processes on two cores with two threads each would mostly wait for each other. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A test that needs the network is a broken test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_corpus(root / "corpus.txt", num_documents=60)
    done = dsbert(
        "prepare", "--source", str(root / "corpus.txt"), "--to", str(root / "made"), "--vocab-size", "200",
        "--validation", "0.2", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert {"documents", "sentences", "tokens", "duplicates", "shards", "digest", "seconds"} <= summary.keys()
    assert summary["documents"] == 60
    return root / "made"


@pytest.fixture(scope="session")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, twelve steps, three mask updates, two checkpoints."""
    run_dir = tmp_path_factory.mktemp("runs") / "small"
    words = ["pretrain", "demo", "--nproc", "2", "--run-dir", str(run_dir), f"data.path={data}", *SMALL]
    done = dsbert_process(*words)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.fixture(scope="session")
def fault_table() -> Iterator[FaultTable]:
    table = FaultTable()
    yield table
    table.write()
