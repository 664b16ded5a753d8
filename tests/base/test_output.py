"""Output that cannot be written ends no run; and a command whose answer cannot be written says so."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.commands import ENVIRONMENT, SMALL
from tests.faults import status

DSBERT = f"{sys.executable} -m dsbert"
SUBMIT = f"{DSBERT} submit demo data.path=DATA --run-dir DATA.run"
DRY_RUN = f"{SUBMIT} --nodes 1 --gpus-per-node 1 --time 1:00:00 --dry-run --json"
NOISY = """
import logging, os, sys, threading, warnings
from dsbert.base.output import flush, lose_output_too, protect
protect()
lose_output_too()
logging.getLogger("x").warning("a handler of last resort")
warnings.warn("a warning")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
print("x" * 1_000_000)
print("y" * 1_000_000, file=sys.stderr)
os.write(3, b"written") if len(sys.argv) > 1 else None
with open(os.devnull) as file:
    assert file.fileno() > 2, "a file has the number of a standard stream"
flush()
raise SystemExit(75)
"""


def shell(line: str, program: str = "") -> subprocess.CompletedProcess[str]:
    """A line of bash; $PROGRAM runs `program`."""
    environment = {**ENVIRONMENT, "CODE": program, "PROGRAM": f'{sys.executable} -c "$CODE"'}
    line = line.replace("$PROGRAM", f'{sys.executable} -c "$CODE"')
    return subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "line",
    [
        "$PROGRAM > /dev/full 2>&1",
        "$PROGRAM >&- 2>&-",
        "$PROGRAM <&- >&- 2>&-",
        "$PROGRAM 2>&1 | true; exit ${PIPESTATUS[0]}",
        "$PROGRAM 2>&1 | head -c 100; exit ${PIPESTATUS[0]}",
        "(sleep 4 & $PROGRAM; echo $? >&3) 3>&1 2>&1 > >(sleep 4) | tail -n 1 | grep -q 75 && exit 75",
    ],
    ids=["full", "closed", "all closed", "gone", "gone in the middle", "not read"],
)
def test_no_write_fails(line: str) -> None:
    assert shell(line, NOISY).returncode == 75


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        (
            f"{DRY_RUN} > /dev/full",
            1,
            "expected to write the answer to standard output, found: No space left on device",
        ),
        (f"{DRY_RUN} >&-", 1, "expected to write the answer to standard output, found: Bad file descriptor"),
        (f"{DRY_RUN} | true; exit ${{PIPESTATUS[0]}}", None, ""),
        (f"{DSBERT} --help > /dev/full", 1, "No space left on device"),
        (f"{DSBERT} submit nothing --nodes 1 --time 1 --dry-run 2> /dev/full", 2, ""),
        (f"{DSBERT} submit nothing --nodes 1 --time 1 --dry-run 2>&-", 2, ""),
    ],
)
def test_an_answer_that_cannot_be_written(line: str, code: int | None, says: str, data: Path) -> None:
    done = shell(line.replace("DATA", str(data)))
    assert code is None or done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert says in done.stderr
    assert done.stderr.count("\n") == bool(says)


def words(run_dir: Path, data: Path, *more: str) -> list[str]:
    command = [sys.executable, "-m", "dsbert", "pretrain", "demo", "--run-dir", str(run_dir), f"data.path={data}"]
    return [*command, *SMALL, *more]


@pytest.mark.slow
def test_a_run_whose_output_is_lost_is_done(data: Path, tmp_path: Path) -> None:
    for name, redirection, nproc in (
        ("full", "> /dev/full 2>&1", "2"),
        ("closed", "<&- >&- 2>&-", "1"),
        ("gone", "2>&1 | head -n 1; exit ${PIPESTATUS[0]}", "2"),
    ):
        line = " ".join([*words(tmp_path / name, data, "--nproc", nproc), redirection])
        done = subprocess.run(["bash", "-c", line], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{name}: {done.stderr}"
        assert status(tmp_path / name)["outcome"] == "done"
        for path in (tmp_path / name).rglob("*.json*"):
            assert b"dsbert: " not in path.read_bytes(), "a line for people stands in a file of the run"


def wait_for_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        with suppress(OSError):
            if (run_dir / "metrics.jsonl").read_bytes().count(b"\n") >= step:
                return
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_goes(nohup: bool, data: Path, tmp_path: Path) -> None:
    """The kernel sends HUP, and every write fails from then on. One rank, without a launcher."""
    run_dir = tmp_path / "run"
    master, slave = pty.openpty()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)  # the tests may be under nohup
    try:
        run = subprocess.Popen(
            words(run_dir, data, "optim.total_steps=200", "eval.every_steps=1000"),
            env=ENVIRONMENT, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGHUP, before)
    os.close(slave)
    try:
        wait_for_step(run_dir, 3)
        os.close(master)
        if not nohup:  # it is no controlling terminal, so that the kernel's part is played here
            run.send_signal(signal.SIGHUP)
        assert run.wait(120) == (0 if nohup else 75)
    finally:
        run.kill()
    found = status(run_dir)
    assert (found["outcome"], found["step"] == 200) == (("done", True) if nohup else ("requeue", False))
    if not nohup:
        assert found["cause"] == "SIGHUP"
        assert json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"] == found["step"]


def test_a_progress_line_shows_its_own_steps_loss(capsys: pytest.CaptureFixture[str]) -> None:
    """A line a minute, whatever steps are logged; the first with the first step, the last with the last."""
    from dsbert.base.progress import TrainingBar

    now = [0.0]
    bar = TrainingBar(total=26, step=4, clock=lambda: now[0])
    for step in range(5, 27):
        now[0] += 20.0
        if step % 10 == 0:
            bar.show({"step": step, "tokens_per_s": 1000.0, "val_mlm_loss": None}, "mlm")
        bar.advance(step, {"mlm": 10.0 / step, "nsp": 1.0}, lr=2e-4, grad_norm=0.5)
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert [int(line.split("step ")[1].split()[0]) for line in lines] == [5, 8, 11, 14, 17, 20, 23, 26]
    assert "step 5 of 26  loss 3.000  mlm 2.000  lr 2.00e-04  grad 0.5  20 s a step  " in lines[0]
    assert "1,000 tokens/s" not in lines[1]
    assert "1,000 tokens/s" in lines[2]
    assert lines[2].endswith("5.0 min left")
    assert lines[-1].endswith("0 s left")
