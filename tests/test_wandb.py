"""Runs that are stopped in every way, and what a W&B server has of them in the end: each step, once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.commands import ENVIRONMENT, SMALL
from tests.wandb_server import WandbServer, wandb_server

pytest.importorskip("wandb", reason="wandb is not installed")


def processes(mark: str) -> Iterator[int]:
    """Every process with this mark in its environment: as SLURM signals a step, down to helpers of helpers."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (path / "environ").read_bytes():
                yield int(path.name)


def to_all(number: signal.Signals) -> Callable[[subprocess.Popen[str], str], None]:
    def send(_launcher: subprocess.Popen[str], mark: str) -> None:
        for process in processes(mark):
            with suppress(ProcessLookupError):
                os.kill(process, number)

    return send


def kill_rank_0(_launcher: subprocess.Popen[str], mark: str) -> None:
    for process in processes(mark):
        if b"\0RANK=0\0" in Path(f"/proc/{process}/environ").read_bytes():
            os.kill(process, signal.SIGKILL)
            return


def interrupt(launcher: subprocess.Popen[str], _mark: str) -> None:
    os.killpg(launcher.pid, signal.SIGINT)


# What happens after so many steps, and the exit codes that may follow.
ATTEMPTS: list[tuple[int, Callable[[subprocess.Popen[str], str], None], set[int]]] = [
    (10, to_all(signal.SIGTERM), {75}),
    (25, kill_rank_0, {3}),
    (40, interrupt, {75}),
    (55, to_all(signal.SIGTERM), {75}),
    (70, to_all(signal.SIGKILL), {-9}),
]


def steps_of(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def last_step(run_dir: Path) -> int:
    with suppress(OSError):
        *_, line, _ = (run_dir / "metrics.jsonl").read_bytes()[-3000:].split(b"\n")
        return int(json.loads(line)["step"])
    return 0


def start(run_dir: Path, data: Path, mark: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    words = ["pretrain", "demo", "--nproc", "2", "--run-dir", str(run_dir), f"data.path={data}", *SMALL]
    words += ["log.wandb=true", "optim.total_steps=100", "checkpoint.every_steps=10", "eval.every_steps=50"]
    return subprocess.Popen(
        [sys.executable, "-m", "dsbert", *words],
        env={**ENVIRONMENT, **environment, "DSBERT_TEST_MARK": mark},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def five_attempts(run_dir: Path, data: Path, environment: dict[str, str]) -> None:
    for number, (step, harm, codes) in enumerate(ATTEMPTS):
        mark = f"{run_dir}-{number}"
        launcher = start(run_dir, data, mark, environment)
        try:
            deadline = time.monotonic() + 120
            while last_step(run_dir) < step and launcher.poll() is None:
                assert time.monotonic() < deadline, "waited in vain"
                time.sleep(0.02)
            harm(launcher, mark)
            _, stderr = launcher.communicate(timeout=120)
        finally:
            to_all(signal.SIGKILL)(launcher, mark)
        assert launcher.returncode in codes, f"attempt {number}: {stderr}"
        assert "W&B" not in stderr, stderr


def sync(server: WandbServer, run_dir: Path) -> None:
    """The README's command."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("wandb")), "sync", *map(str, (run_dir / "wandb").glob("offline-run-*"))],
        env=os.environ | server.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "ERROR" not in done.stderr, done.stderr


def assert_each_step_once(server: WandbServer, run_dir: Path) -> None:
    (lines,) = server.lines.values()
    arrived = [line["step"] for line in server.posts]
    assert len(lines) == len(arrived), "no line took the place of another"
    assert len(set(arrived)) == len(arrived), "no step came twice"
    assert set(steps_of(run_dir)) <= set(arrived)
    assert [line["_step"] for _, line in sorted(lines.items())] == list(range(len(lines)))
    records = {line["step"]: line for line in server.posts}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert records[record["step"]]["loss"] == pytest.approx(record["loss"], abs=1e-6)
        assert records[record["step"]]["topology_digest"] == record["topology_digest"]


@pytest.mark.slow
def test_offline_every_step_arrives_once_after_five_attempts(data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    five_attempts(run_dir, data, {"WANDB_MODE": "offline"})
    with wandb_server() as server:
        sync(server, run_dir)
        assert_each_step_once(server, run_dir)
        with start(run_dir, data, str(run_dir), {"WANDB_MODE": "offline"}) as launcher:
            _, stderr = launcher.communicate(timeout=120)
        assert launcher.returncode == 0, stderr
        sync(server, run_dir)
        assert_each_step_once(server, run_dir)
        assert sorted(line["step"] for line in server.posts) == list(range(1, 101))
        (config,) = server.configs.values()
        assert config["optim"]["value"]["total_steps"] == 100


@pytest.mark.slow
def test_online_every_step_arrives_once_after_five_attempts(data: Path, tmp_path: Path) -> None:
    """TERM and KILL also reach wandb's own helper programs."""
    run_dir = tmp_path / "run"
    with wandb_server() as server:
        five_attempts(run_dir, data, server.environment)
        with start(run_dir, data, str(run_dir), server.environment) as launcher:
            _, stderr = launcher.communicate(timeout=120)
        assert launcher.returncode == 0, stderr
        assert "W&B" not in stderr, stderr
        assert_each_step_once(server, run_dir)
        assert sorted(line["step"] for line in server.posts) == list(range(1, 101))
    assert not list(processes(str(run_dir))), "nothing is left"
