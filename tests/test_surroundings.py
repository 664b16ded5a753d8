"""What surrounds ranks, and goes wrong (docs/faults.md): networks, clocks and file systems, each disturbed for real.

Where their means are missing (root, Debian's packages) these tests are skipped; as root, continuous integration gets
them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ENVIRONMENT
from tests.fault_rows import FaultTable
from tests.faults import fault, final_files, status, unlucky_dsbert, wait_for, words_of
from tests.helpers import started

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
LATE_S = 8.0
LATE: list[tuple[int, list[dict[str, Any]], list[int]]] = [
    (1, [fault("step", "SIGTERM", rank=1, step=4)], [75, 75]),
    (0, [fault("step", "SIGKILL", rank=1, step=8)], [3, -9]),
    (1, [], [0, 0]),
]
HARM = {(75, 75): "SIGTERM to one rank", (3, -9): "SIGKILL of the other", (0, 0): "resumed, to the end"}
IN_CI = os.environ.get("CI") == "true"


def need(package: str, found: object) -> None:
    """Skip the test where there is no `found` and nobody may install the package."""
    if found:
        return
    if os.geteuid() != 0:
        pytest.skip(f"needs root and Debian's {package}")
    if not IN_CI and os.environ.get("DSBERT_APT") != "1":
        pytest.skip(f"needs Debian's {package}: apt-get install it, or set DSBERT_APT=1")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (("update",), ("install", "-y", "--no-install-recommends", package)):
        subprocess.run(("apt-get", *command), env=environment, check=True, timeout=300, stdout=subprocess.DEVNULL)


# 25: clocks that differ


def dsbert_by_other_clocks(words: list[str], offsets: list[str]) -> None:
    """A rank whose wall clock is off, as that of a node without NTP is; its files are dated by the file system's."""
    from dsbert.cluster.launcher import module_command

    command = module_command("dsbert.cli")
    os.execve(command[0], [*command, *words], os.environ | clock(offsets[int(os.environ["RANK"])]))


def clock(offset: str) -> dict[str, str]:
    """Environment of a process by whose clock it is so much later."""
    if not offset:
        return {}
    return {"LD_PRELOAD": str(FAKETIME), "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}


def said_by(offset: str, *words: str) -> subprocess.CompletedProcess[str]:
    """By `python WORDS` on a machine with another clock."""
    environment = ENVIRONMENT | clock(offset)
    return subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.slow
def test_clocks_that_differ_by_an_hour(run: Path, data: Path, tmp_path: Path, fault_table: FaultTable) -> None:
    """Rank 1 ahead, and killed; then rank 0 behind, to the end: steps, names of the guilty, checkpoints as ever."""
    need("libfaketime", FAKETIME.exists())
    shown = said_by("+1h", "-c", "import time; print(time.time())")
    assert 3500 < float(shown.stdout) - time.time() < 3700, "the clock is not off: the test would show nothing"
    run_dir, rows = tmp_path / "run", []
    words = words_of(run_dir, data)
    with started(dsbert_by_other_clocks, 2, {"words": words, "offsets": ["", "+1h"]}) as ranks:
        reach(run_dir, 4)
        struck = time.time()
        ranks[1].kill()
        ended = wait_for(ranks, set(), 60)
    assert [rank.code for rank in ended] == [3, -9], ended[0].stderr
    culprit = status(run_dir)["culprit"]
    assert culprit["rank"] == 1
    assert "rank 1 on" in ended[0].stderr
    what = "a clock an hour ahead on one rank, which is then killed"
    rows.append(fault_table.row("25", what, time.time() - struck, [3, -9], culprit))
    start = time.time()
    with started(dsbert_by_other_clocks, 2, {"words": words, "offsets": ["-1h", ""]}) as ranks:
        ended = wait_for(ranks, set(), 120)
    assert [rank.code for rank in ended] == [0, 0], ended[0].stderr
    rows.append(fault_table.row("25", "a clock an hour behind on rank 0", time.time() - start, [0, 0], None))
    assert final_files(run_dir) == final_files(run)
    fault_table.identical(rows)


@pytest.mark.parametrize("offset", ["+1h", "-1h"])
def test_a_living_owner_is_seen_by_another_clock(offset: str, data: Path, tmp_path: Path) -> None:
    """A second start, and `dsbert status`, on a machine whose clock is off."""
    from dsbert.cluster.health import Heartbeat
    from dsbert.training.run_directory import RunDirectory
    from tests.workbench import recipe

    need("libfaketime", FAKETIME.exists())
    directory = RunDirectory(tmp_path / "run")
    directory.mark("ab")
    directory.open_attempt(recipe(data={"path": str(data)}), {}, None, "ab", 1)
    heart = Heartbeat(directory.heartbeats("ab"), 0, ["here"], timeout_s=1)
    heart.start()
    heart.enter("train")
    heart.advance(4)
    look = f"from dsbert.training.ownership import *; assert_free(Path({str(directory.path)!r}), 'go')"
    second = said_by(offset, "-c", look)
    assert "expected nobody at work on the run" in second.stderr
    shown = said_by(offset, "-m", "dsbert", "status", str(directory.path), "--json")
    assert json.loads(shown.stdout)[0]["state"] == "running", shown
    heart.end(3)


# 26: a file system that shows files late


def on_late_files(words: list[str], late: int, mounted: str, **more: Any) -> None:
    """One rank sees the run directory where files are shown late."""
    if os.environ["RANK"] == str(late):
        words = [*words]
        words[words.index("--run-dir") + 1] = mounted
    unlucky_dsbert(words, **more)


@contextmanager
def shown_late(folder: Path, at: Path, seconds: float) -> Iterator[None]:
    """The folder once more, by a file system whose client remembers that a name was missing, and the size and time of
    files, for so long, as NFS does."""
    at.mkdir()
    caches = ",".join(f"{name}_timeout={seconds:g}" for name in ("attr", "entry", "negative"))
    subprocess.run(["bindfs", "-o", caches, folder, at], check=True, timeout=30)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", at], check=True, timeout=30)


@pytest.mark.slow
def test_a_file_system_that_shows_files_late(run: Path, data: Path, tmp_path: Path, fault_table: FaultTable) -> None:
    """To rank 1, which is stopped by a signal; to rank 0, whose peer is killed; to rank 1 again, to the end."""
    need("bindfs", shutil.which("bindfs"))
    if not os.access("/dev/fuse", os.W_OK):
        pytest.skip("needs /dev/fuse")
    (tmp_path / "real").mkdir()
    rows = []
    with shown_late(tmp_path / "real", tmp_path / "late", LATE_S):
        here, there = tmp_path / "real" / "run", tmp_path / "late" / "run"
        assert_late(tmp_path / "real", tmp_path / "late")
        for late, harm, codes in LATE:
            words = words_of(here, data)
            args = {"words": words, "faults": harm, "record": None, "late": late, "mounted": str(there)}
            start = time.time()
            with started(on_late_files, 2, args) as ranks:
                ended = wait_for(ranks, set(), 120)
            assert [rank.code for rank in ended] == codes, "\n".join(rank.stderr for rank in ended)
            found = status(here)
            if 3 in codes:
                assert found["culprit"]["rank"] == 1
            what = f"files shown {LATE_S:g} s late to rank {late}; {HARM[tuple(codes)]}"
            seconds = max(rank.seconds for rank in ended) if harm else time.time() - start
            rows.append(fault_table.row("26", what, seconds, codes, found["culprit"]))
    assert final_files(here) == final_files(run)
    fault_table.identical(rows)


def assert_late(real: Path, late: Path) -> None:
    """Else the test would show nothing."""
    assert not (late / "probe").exists()
    (real / "probe").touch()
    start = time.monotonic()
    while not (late / "probe").exists():
        time.sleep(0.05)
        assert time.monotonic() - start < 3 * LATE_S
    assert time.monotonic() - start > LATE_S / 2


def reach(run_dir: Path, step: int, seconds: float = 90.0) -> None:
    """Wait until a run has recorded a step."""
    path, deadline = run_dir / "metrics.jsonl", time.monotonic() + seconds
    while not path.exists() or path.read_bytes().count(b"\n") < step:
        assert time.monotonic() < deadline, f"no step {step} after {seconds:g} s"
        time.sleep(0.005)
