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
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ENVIRONMENT
from tests.fault_rows import FaultTable
from tests.faults import fault, final_files, status, unlucky_dsbert, wait_for, words_of
from tests.helpers import Rank, started
from tests.networks import ADDRESSES, HOSTS, TUN, Cable, move_to

# Loaded before libc, it has a process see another wall clock, and nothing else: neither its waits nor the files' times.
# (libfaketime shifts what Python sleeps on as well.)
CLOCK = r"""
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long offset(void) { const char *text = getenv("DSBERT_TEST_CLOCK_S"); return text ? atol(text) : 0; }

int clock_gettime(clockid_t which, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, which, now);
    if (!failed && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) now->tv_sec += offset();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int failed = syscall(SYS_gettimeofday, now, zone);
    if (!failed) now->tv_sec += offset();
    return failed;
}

time_t time(time_t *where) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (where) *where = now.tv_sec;
    return now.tv_sec;
}
"""
HOUR_S = 3600
LATE_S = 8.0
DELAY_S = 0.02
CUT_S = 4.0  # TCP tries again 6.2 s after the first try, within the time limit of 10 s
LATE: list[tuple[int, list[dict[str, Any]], list[int]]] = [
    (1, [fault("step", "SIGTERM", rank=1, step=4)], [75, 75]),
    (0, [fault("step", "SIGKILL", rank=1, step=8)], [3, -9]),
    (1, [], [0, 0]),
]
HARM: dict[tuple[int, ...], str] = {
    (75, 75): "SIGTERM to one rank",
    (3, -9): "SIGKILL of the other",
    (0, 0): "resumed, to the end",
}
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


def dsbert_by_other_clocks(words: list[str], library: str, offsets: list[int]) -> None:
    """A rank whose wall clock is off, as that of a node without NTP is; its files are dated by the file system's."""
    from dsbert.cluster.launcher import module_command

    command = module_command("dsbert.cli")
    os.execve(command[0], [*command, *words], os.environ | clock(library, offsets[int(os.environ["RANK"])]))


def clock(library: str, seconds: int) -> dict[str, str]:
    """The environment of a process by whose clock it is so much later."""
    return {"LD_PRELOAD": library, "DSBERT_TEST_CLOCK_S": str(seconds)}


def said_by(library: str, seconds: int, *words: str) -> subprocess.CompletedProcess[str]:
    """By `python WORDS` on a machine with another clock."""
    environment = ENVIRONMENT | clock(library, seconds)
    return subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def other_clock(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The library that shifts the clock."""
    compiler = shutil.which("cc")
    if compiler is None:
        (pytest.fail if IN_CI else pytest.skip)("needs a C compiler")
    source = tmp_path_factory.mktemp("clock") / "clock.c"
    source.write_text(CLOCK)
    library = source.with_suffix(".so")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source], check=True, timeout=60)
    shown = said_by(str(library), HOUR_S, "-c", "import time; print(time.time()); time.sleep(0.1)")
    assert abs(float(shown.stdout) - time.time() - HOUR_S) < 60, "else these tests would show nothing"
    return str(library)


@pytest.mark.slow
def test_clocks_that_differ_by_an_hour(
    other_clock: str, run: Path, data: Path, tmp_path: Path, fault_table: FaultTable
) -> None:
    """Rank 1 ahead, and killed; then rank 0 behind, to the end: steps, names of the guilty, checkpoints as ever."""
    run_dir, rows = tmp_path / "run", []
    args = {"words": words_of(run_dir, data), "library": other_clock}
    with started(dsbert_by_other_clocks, 2, args | {"offsets": [0, HOUR_S]}) as ranks:
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
    with started(dsbert_by_other_clocks, 2, args | {"offsets": [-HOUR_S, 0]}) as ranks:
        ended = wait_for(ranks, set(), 120)
    assert [rank.code for rank in ended] == [0, 0], ended[0].stderr
    rows.append(fault_table.row("25", "a clock an hour behind on rank 0", time.time() - start, [0, 0], None))
    assert final_files(run_dir) == final_files(run)
    fault_table.identical(rows)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [HOUR_S, -HOUR_S])
def test_a_living_owner_is_seen_by_another_clock(seconds: int, other_clock: str, data: Path, tmp_path: Path) -> None:
    """A second start, and `dsbert status`, on a machine whose clock is off."""
    from dsbert.cluster.health import Heartbeat
    from dsbert.training.run_directory import RunDirectory
    from tests.workbench import recipe

    directory = RunDirectory(tmp_path / "run")
    directory.mark("ab")
    directory.open_attempt(recipe(data={"path": str(data)}), {}, None, "ab", 1)
    heart = Heartbeat(directory.heartbeats("ab"), 0, ["here"], timeout_s=1)
    heart.start()
    heart.enter("train")
    heart.advance(4)
    look = f"from dsbert.training.ownership import *; assert_free(Path({str(directory.path)!r}), 'go')"
    second = said_by(other_clock, seconds, "-c", look)
    assert "expected nobody at work on the run" in second.stderr
    shown = said_by(other_clock, seconds, "-m", "dsbert", "status", str(directory.path), "--json")
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


# 23, 24: networks


@pytest.fixture
def cable() -> Iterator[Cable]:
    """Between two nodes."""
    need("iproute2", shutil.which("ip"))
    if os.geteuid() != 0 or not os.access(TUN, os.W_OK):
        (pytest.fail if IN_CI and os.geteuid() == 0 else pytest.skip)(f"needs root and {TUN}")
    with Cable() as one:
        yield one


def on_a_node(nodes: list[str], **more: Any) -> None:
    """A rank of its own node."""
    rank = int(os.environ["RANK"])
    move_to(nodes[rank], HOSTS[rank])
    unlucky_dsbert(**more)


def on_nodes(cable: Cable, words: list[str], *faults: dict[str, Any]) -> AbstractContextManager[list[Rank]]:
    """A rank on either node."""
    args = {"nodes": cable.nodes, "words": words, "faults": list(faults), "record": None}
    return started(on_a_node, 2, args, env={"MASTER_ADDR": ADDRESSES[0]})


def round_trip_s(cable: Cable) -> float:
    """Until a node is told that nobody listens at the other one."""
    tries = (
        "import socket, time",
        "start = time.monotonic()",
        f"socket.socket().connect_ex(({ADDRESSES[1]!r}, 9))",
        "print(time.monotonic() - start)",
    )
    command = ("ip", "netns", "exec", cable.nodes[0], sys.executable, "-c", "; ".join(tries))
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)


@pytest.mark.slow
def test_a_slow_link(cable: Cable, run: Path, data: Path, tmp_path: Path, fault_table: FaultTable) -> None:
    cable.delay_s = DELAY_S
    assert round_trip_s(cable) >= 2 * DELAY_S, "else the test would show nothing"
    start = time.time()
    with on_nodes(cable, words_of(tmp_path / "run", data)) as ranks:
        ended = wait_for(ranks, set(), 120)
    assert [rank.code for rank in ended] == [0, 0], "\n".join(rank.stderr for rank in ended)
    assert "1 on n1, 1 on n2" in ended[0].stderr
    assert final_files(tmp_path / "run") == final_files(run)
    what = f"each packet of one node {DELAY_S * 1000:g} ms late, both ways"
    fault_table.identical([fault_table.row("24", what, time.time() - start, [0, 0], None)])


@pytest.mark.slow
def test_two_nodes_cut_off_from_each_other(
    cable: Cable, run: Path, data: Path, tmp_path: Path, fault_table: FaultTable
) -> None:
    """For less than the time limit, and back; then for good: only the network is accused. Once more, to the end."""
    run_dir, rows = tmp_path / "run", []
    with on_nodes(cable, words_of(run_dir, data), fault("from step", "slow", step=4)) as ranks:
        reach(run_dir, 5)
        start = time.time()
        cable.cut = True
        time.sleep(CUT_S)
        before = steps(run_dir)
        cable.cut = False
        reach(run_dir, before + 1)
        what = f"two nodes cut off from each other for {CUT_S:g} s, and back"
        rows.append(fault_table.row("23", what, time.time() - start, ["both train on"], None))
        assert before < 9, "they have not waited for each other"
        reach(run_dir, 9)
        start = time.time()
        cable.cut = True
        ended = wait_for(ranks, set(), 60)
    seconds = time.time() - start
    assert [rank.code for rank in ended] == [3, 3], "\n".join(rank.stderr for rank in ended)
    assert seconds < 10 + 30
    for rank in ended:
        assert "no rank is silent: see to the network between the nodes" in rank.stderr
    found = status(run_dir)
    assert (found["outcome"], found["culprit"]) == ("failed", None)
    assert "see to the network" in found["cause"]
    what, named = "two nodes cut off from each other for good", {"named": "the network"}
    rows.append(fault_table.row("23", what, seconds, [3, 3], named))
    cable.cut = False
    with on_nodes(cable, words_of(run_dir, data)) as ranks:
        ended = wait_for(ranks, set(), 60)
    assert [rank.code for rank in ended] == [0, 0], "\n".join(rank.stderr for rank in ended)
    assert final_files(run_dir) == final_files(run)
    fault_table.identical(rows)


def steps(run_dir: Path) -> int:
    """That a run has recorded."""
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def reach(run_dir: Path, step: int, seconds: float = 90.0) -> None:
    """Wait until a run has recorded a step."""
    deadline = time.monotonic() + seconds
    while steps(run_dir) < step:
        assert time.monotonic() < deadline, f"no step {step} after {seconds:g} s"
        time.sleep(0.005)
