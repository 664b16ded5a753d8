"""A run that somebody is at work on: who finds that out, from what, and how fast."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsbert.base.errors import UserError
from dsbert.cluster.health import Heartbeat
from dsbert.training.ownership import assert_free
from tests.commands import ENVIRONMENT, SMALL, complaint, dsbert_process
from tests.faults import status

NONCE = "ab"


@pytest.fixture
def beating(tmp_path: Path) -> Iterator[Heartbeat]:
    """The heartbeat of a rank in this process, every quarter of a second, in a run of job 7."""
    (tmp_path / "heartbeats" / NONCE).mkdir(parents=True)
    attempt = {"number": 3, "nonce": NONCE, "job_id": "7", "restart_count": 1, "start": 3}
    (tmp_path / "attempt.json").write_text(json.dumps(attempt))
    heart = Heartbeat(tmp_path / "heartbeats" / NONCE, 0, ["here"], timeout_s=1)
    heart.start()
    yield heart
    heart.end(0)


def change(run_dir: Path, **values: object) -> None:
    """Of the heartbeat's file, once nobody writes it."""
    path = run_dir / "heartbeats" / NONCE / "00000.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_beat_that_moves_is_an_owner(beating: Heartbeat, tmp_path: Path) -> None:
    beating.advance(40)
    place = f"attempt 3 of job 7, rank 0 on here \\(process {os.getpid()}\\) at step 40"
    with pytest.raises(UserError, match=f"expected nobody at work on the run in {tmp_path}, found {place}: .*do this"):
        assert_free(tmp_path, "do this")


@pytest.mark.parametrize(
    ("job", "restart", "start", "free"),
    [
        ("7", "2", None, True), ("7", "1", None, False), ("7", "1", "4", True), ("7", "1", "3", False),
        ("7", "2", "0", True), ("8", "2", "4", False), (None, None, None, False),
    ],
)  # fmt: skip
def test_an_earlier_start_of_the_same_job_is_superseded(
    job: str | None,
    restart: str | None,
    start: str | None,
    free: bool,
    beating: Heartbeat,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after the death of a slurmd, whose tasks live on; start: inside one allocation."""
    for name, value in (("SLURM_JOB_ID", job), ("SLURM_RESTART_COUNT", restart), ("DSBERT_START", start)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    if free:
        assert_free(tmp_path, "")
    else:
        with pytest.raises(UserError, match="found attempt 3"):
            assert_free(tmp_path, "")


def test_who_has_ended_or_died_is_no_owner_at_once(beating: Heartbeat, tmp_path: Path) -> None:
    beating.end(75)
    start = time.monotonic()
    assert_free(tmp_path, "")  # it has said so
    gone = subprocess.Popen(["true"])
    gone.wait()
    change(tmp_path, ended=None, pid=gone.pid)
    assert_free(tmp_path, "")  # its process is no more
    change(tmp_path, pid=os.getpid(), started_s=0.0)
    assert_free(tmp_path, "")  # its number is another's now
    change(tmp_path, ended=None, place="another machine")
    os.utime(tmp_path / "heartbeats" / NONCE / "00000.json", (0, time.time() - 2 * 86400))
    assert_free(tmp_path, "")  # not heard of for two days: no clock is as wrong
    assert time.monotonic() - start < 0.25, "less than a beat"


def test_a_beat_that_stands_still_elsewhere_is_waited_for(beating: Heartbeat, tmp_path: Path) -> None:
    beating.end(0)
    change(tmp_path, ended=None, place="another machine")
    start = time.monotonic()
    assert_free(tmp_path, "")
    assert 2 * beating.interval_s < time.monotonic() - start < 5


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"nonce": 5}', '{"number": null, "nonce": "cd"}'])
def test_a_damaged_record_names_no_owner(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "attempt.json").write_text(text)
    assert_free(tmp_path, "")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_second_start_is_refused_and_may_be_forced(data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = ["pretrain", "demo", "--nproc", "2", "--run-dir", str(run_dir), f"data.path={data}", *SMALL]
    command = [sys.executable, "-m", "dsbert", *words, "optim.total_steps=100000"]

    def start(*more: str) -> subprocess.Popen[str]:
        metrics = run_dir / "metrics.jsonl"
        before = metrics.read_bytes() if metrics.exists() else b""
        number = json.loads((run_dir / "attempt.json").read_text())["number"] if before else 0
        log = tmp_path / f"log-{number}"  # a pipe that nobody reads would fill, and the ranks would wait
        with log.open("w") as stderr:
            launcher = subprocess.Popen([*command, *more], env=ENVIRONMENT, stderr=stderr, text=True)
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and launcher.poll() is None:
            owner = run_dir / "attempt.json"
            is_claimed = owner.exists() and json.loads(owner.read_text())["number"] > number
            if is_claimed and metrics.exists() and len(metrics.read_bytes()) != len(before):
                return launcher
            time.sleep(0.02)
        launcher.kill()
        launcher.wait()
        raise AssertionError(log.read_text())

    first = start()
    refused = dsbert_process(*words, "optim.total_steps=100000")
    assert "found attempt 1, rank 0 on " in complaint(refused)
    assert refused.stderr.count("--take-over") == 1, "said once, not by each rank"
    second = start("--take-over")
    assert first.wait(60) == 3
    assert "this one leaves" in (tmp_path / "log-0").read_text()
    second.send_signal(signal.SIGKILL)
    second.wait()
    third = start()  # nobody has to wait for the dead
    third.send_signal(signal.SIGTERM)
    assert third.wait(90) == 75
    assert status(run_dir)["attempt"] == 3
