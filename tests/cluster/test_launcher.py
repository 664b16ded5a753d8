"""The launcher with tiny programs as ranks: real processes, real signals, and no torch."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dsbert.base.errors import combine_exit_codes
from dsbert.cluster.launcher import launch

# A launcher in a process of its own, for tests that send it signals: argv is the number of ranks and their program.
LAUNCHER = """
import sys
from dsbert.cluster.launcher import launch
sys.exit(launch([sys.executable, "-c", sys.argv[2]], int(sys.argv[1]), grace_s=0.3, term_s=0.3))
"""
# What the rank programs begin with. One write a line: the ranks share a pipe.
PRELUDE = """
import os, signal, subprocess, sys, time
from dsbert.cluster.launcher import die_with_parent
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
"""
# A rank that says each signal that it gets, until TERM.
SIGNAL_RANK = (
    PRELUDE
    + """
def note(number, frame):
    say("rank", os.environ["RANK"], signal.Signals(number).name)
    if number == signal.SIGTERM:
        sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, note)
die_with_parent()
say("rank", os.environ["RANK"], os.getpid())
while True:
    time.sleep(0.01)
"""
)
# A rank that minds neither its peers nor TERM, as one that is stuck in a collective, and has a process of its own.
STUCK_RANK = (
    PRELUDE
    + """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
say("rank", os.environ["RANK"], os.getpid())
say("child", os.environ["RANK"], subprocess.Popen(["sleep", "60"]).pid)
time.sleep(60)
"""
)
ORPHAN_RANK = (
    PRELUDE
    + """
die_with_parent()
say("rank", os.environ["RANK"], os.getpid())
time.sleep(60)
"""
)


def rank(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def start_launcher(program: str, nproc: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(nproc), program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,
    )


def read_pids(launcher: subprocess.Popen[str], count: int) -> dict[str, int]:
    """The process ids in the next `count` lines, "rank 0 PID" or "child 0 PID", by what stands before them."""
    assert launcher.stdout is not None
    lines = [launcher.stdout.readline().rpartition(" ") for _ in range(count)]
    return {name: int(pid) for name, _, pid in lines}


def state_of(pid: int) -> str:
    """The kernel's letter for what a process does; a zombie's where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def runs(pid: int) -> bool:
    """Whether the process is there and no zombie, which nobody in a container may collect."""
    return state_of(pid) != "Z"


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], 0),
        ([75, 75], 75),
        ([7, 7], 7),
        ([3, 2, 3], 2),
        ([3, 1, 3], 1),
        ([3, 4], 4),
        ([75, 130], 130),
        ([75, 3, 0], 3),
        ([0, 75], 75),
        ([0, -9, 75], 3),
        ([-9, -15], 3),
        ([-11, 1], 1),
        ([0, 7], 7),
        ([3, 7], 3),
        ([3, 74], 74),
        ([74, 1], 1),
    ],
)
def test_combined_exit_code(codes: list[int], expected: int) -> None:
    assert combine_exit_codes(codes) == expected


@pytest.mark.parametrize(("program", "expected"), [("", 0), ("raise SystemExit(2)", 2)])
def test_ranks_that_agree_give_their_code(program: str, expected: int) -> None:
    assert launch(rank(program), 2) == expected


def test_output_and_environment(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR OMP_NUM_THREADS"
    program = f"import os, sys; sys.stdout.write(' '.join(os.environ[n] for n in '{names}'.split()) + '\\n')"
    assert launch(rank(program + "; sys.stderr.write('aside\\n')"), 2) == 0
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    captured = capfd.readouterr()
    assert sorted(captured.out.splitlines()) == [f"0 0 2 2 127.0.0.1 {threads}", f"1 1 2 2 127.0.0.1 {threads}"]
    assert captured.err == "aside\naside\n"


def test_the_users_thread_count_stays(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert launch(rank("import os; print(os.environ['OMP_NUM_THREADS'])"), 1) == 0
    assert capfd.readouterr().out == "7\n"


def test_rank_0_gets_the_listening_socket_of_the_port() -> None:
    program = """
import os, socket
port = int(os.environ["MASTER_PORT"])
if os.environ["RANK"] == "0":
    with socket.socket(fileno=int(os.environ["DSBERT_LISTEN_FD"])) as listener:
        assert listener.getsockname() == ("127.0.0.1", port)
        connection, _ = listener.accept()
        assert connection.recv(5) == b"hello"
else:
    assert "DSBERT_LISTEN_FD" not in os.environ
    socket.create_connection(("127.0.0.1", port)).sendall(b"hello")
"""
    assert launch(rank(program), 2) == 0


def test_the_port_closes_with_rank_0() -> None:
    """Ranks that connect to a dead rank 0 must be refused, and not wait."""
    program = """
import os, socket, sys, time
if os.environ["RANK"] == "1":
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", int(os.environ["MASTER_PORT"]))).close()
        except ConnectionRefusedError:
            sys.exit(0)
        time.sleep(0.02)
    sys.exit(1)
"""
    assert launch(rank(program), 2) == 0


def test_forwards_each_signal_once_to_every_rank() -> None:
    launcher = start_launcher(SIGNAL_RANK, 2)
    read_pids(launcher, 2)
    assert launcher.stdout is not None
    seen = []
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        os.killpg(launcher.pid, number)  # as a terminal's Ctrl-C does: to the whole group
        seen += sorted(launcher.stdout.readline().strip() for _ in range(2))
    launcher.send_signal(signal.SIGTERM)
    out, err = launcher.communicate(timeout=10)
    seen += sorted(out.splitlines())
    names = ("SIGUSR1", "SIGUSR2", "SIGINT", "SIGTERM")
    assert seen == [f"rank {number} {name}" for name in names for number in range(2)]
    assert err == ""
    assert launcher.returncode == 75


def test_a_signal_while_a_rank_starts_is_kept_for_it() -> None:
    """As it is while the interpreter starts and imports: no handler is set yet, and the default would be death."""
    early, late = SIGNAL_RANK.split("def note")
    said, handlers = (
        'say("rank", os.environ["RANK"], os.getpid())\n',
        "def note" + late.replace("os.getpid())", '"up")'),
    )
    launcher = start_launcher(early + said + "time.sleep(0.5)\n" + handlers, 2)
    read_pids(launcher, 2)
    launcher.send_signal(signal.SIGTERM)
    out, _ = launcher.communicate(timeout=10)
    assert launcher.returncode == 75
    assert sorted(line for line in out.splitlines() if "SIGTERM" in line) == ["rank 0 SIGTERM", "rank 1 SIGTERM"]


def test_ctrl_z_suspends_the_ranks_as_well() -> None:
    launcher = start_launcher(SIGNAL_RANK, 2)
    pids = read_pids(launcher, 2)
    launcher.send_signal(signal.SIGTSTP)
    # The launcher stops itself after its ranks. A shell, too, wakes it no sooner than it has seen it stop.
    assert eventually(lambda: all(state_of(pid) == "T" for pid in [*pids.values(), launcher.pid]))
    launcher.send_signal(signal.SIGCONT)
    assert eventually(lambda: all(state_of(pid) in "SR" for pid in pids.values()))
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=10)
    assert launcher.returncode == 75


def test_a_killed_rank_is_named_and_nothing_is_left() -> None:
    launcher = start_launcher(STUCK_RANK, 2)
    pids = read_pids(launcher, 4)
    os.kill(pids["rank 1"], signal.SIGKILL)
    _, err = launcher.communicate(timeout=10)
    lines = err.splitlines()
    assert launcher.returncode == 3
    assert len(lines) == 2, err
    assert "rank 1" in lines[0]
    assert "SIGKILL" in lines[0]
    assert lines[1].endswith("stopping: rank 0")
    assert not any(runs(pid) for pid in pids.values())


def test_ranks_have_time_to_end_by_themselves_after_a_failure(capfd: pytest.CaptureFixture[str]) -> None:
    program = "import os, sys, time; r = os.environ['RANK']; time.sleep(0.5 if r == '0' else 0); sys.exit(3 - int(r))"
    assert launch(rank(program), 2, grace_s=20) == 2
    assert capfd.readouterr().err == ""


def test_ranks_die_with_a_launcher_that_is_killed() -> None:
    launcher = start_launcher(ORPHAN_RANK, 2)
    pids = read_pids(launcher, 2)
    assert all(runs(pid) for pid in pids.values())
    launcher.kill()
    assert eventually(lambda: not any(runs(pid) for pid in pids.values()))
    launcher.communicate()


def test_a_rank_whose_launcher_is_gone_before_it_asks_ends() -> None:
    program = "from dsbert.cluster.launcher import die_with_parent; die_with_parent(); print('survived')"
    environment = os.environ | {"DSBERT_PARENT_PID": str(2**22 + 1), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(rank(program), env=environment, capture_output=True, text=True, timeout=10)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == ""


def test_old_signal_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    launch(rank(""), 1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_refuses_what_cannot_start() -> None:
    with pytest.raises(ValueError, match="at least 1 rank, got 0"):
        launch(rank(""), 0)
    with pytest.raises(FileNotFoundError):
        launch(["/nonexistent/program"], 2)


def test_needs_no_torch() -> None:
    program = "import sys; import dsbert.cluster.launcher; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run(rank(program), env=environment).returncode == 0
