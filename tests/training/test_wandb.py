"""Runs that are stopped in every way, and what a W&B server has of them in the end: each step, once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from dsbert.base.jsonl import JsonlFile
from dsbert.training.metrics import WandbLogger
from tests.commands import SMALL
from tests.faults import unlucky_dsbert, wait_for
from tests.helpers import Rank, started
from tests.wandb_server import WandbServer, wandb_server

pytest.importorskip("wandb", reason="wandb is not installed")


def processes(roots: list[int]) -> list[int]:
    """These and all that descends from them: what SLURM signals, down to helpers of helpers."""
    found = list(roots)
    for root in roots:
        with suppress(psutil.NoSuchProcess):
            found += [process.pid for process in psutil.Process(root).children(recursive=True)]
    return found


def pids(ranks: list[Rank]) -> list[int]:
    return [rank.process.pid or 0 for rank in ranks]


def to_all(ranks: list[Rank], number: signal.Signals) -> None:
    for process in processes(pids(ranks)):
        with suppress(ProcessLookupError):
            os.kill(process, number)


def to_rank_0(ranks: list[Rank], number: signal.Signals) -> None:
    os.kill(pids(ranks)[0], number)


def to_groups(ranks: list[Rank], number: signal.Signals) -> None:
    for pid in pids(ranks):
        os.killpg(pid, number)


# After how many steps which signal goes to whom, and the exit codes that follow.
ATTEMPTS = [
    (10, signal.SIGTERM, to_all, [75, 75]),
    (25, signal.SIGKILL, to_rank_0, [-9, 3]),
    (40, signal.SIGINT, to_groups, [75, 75]),
    (55, signal.SIGTERM, to_all, [75, 75]),
    (70, signal.SIGKILL, to_all, [-9, -9]),
]


def steps_of(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def last_step(run_dir: Path) -> int:
    with suppress(OSError):
        *_, line, _ = (run_dir / "metrics.jsonl").read_bytes()[-3000:].split(b"\n")
        return int(json.loads(line)["step"])
    return 0


@contextmanager
def running(run_dir: Path, data: Path, environment: dict[str, str]) -> Iterator[list[Rank]]:
    words = ["pretrain", "demo", "--run-dir", str(run_dir), f"data.path={data}", *SMALL, "log.wandb=true"]
    words += ["optim.total_steps=100", "checkpoint.every_steps=10", "eval.every_steps=50"]
    args = {"words": words, "faults": [], "record": None}
    with started(unlucky_dsbert, 2, args, env=environment) as ranks:
        yield ranks


def five_attempts(run_dir: Path, data: Path, environment: dict[str, str]) -> None:
    for number, (step, what, harm, codes) in enumerate(ATTEMPTS):
        with running(run_dir, data, environment) as ranks:
            deadline = time.monotonic() + 60
            while last_step(run_dir) < step and ranks[0].exitcode is None:
                assert time.monotonic() < deadline, "waited in vain"
                time.sleep(0.02)
            harm(ranks, what)
            ended = wait_for(ranks, set(), 60)
        label = f"attempt {number}: {ended}"
        assert [rank.code for rank in ended] == codes, label
        said = "".join(rank.stderr for rank in ended)
        # A machine that may be about to go is not kept: wandb has 5 s, which are not enough where all cores are taken.
        assert "W&B: " not in said.replace("W&B: it did not finish within 5 s. metrics.jsonl has", ""), label


def to_the_end(run_dir: Path, data: Path, environment: dict[str, str]) -> list[int]:
    """Undisturbed; returns the processes that there were."""
    with running(run_dir, data, environment) as ranks:
        deadline = time.monotonic() + 60
        while last_step(run_dir) < 90 and ranks[0].exitcode is None:
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.02)
        found = processes(pids(ranks))
        ended = wait_for(ranks, set(), 90)
    assert [rank.code for rank in ended] == [0, 0], ended
    assert "W&B: " not in "".join(rank.stderr for rank in ended), ended
    return found


def sync(server: WandbServer, run_dir: Path) -> None:
    """The README's command."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("wandb")), "sync", *map(str, (run_dir / "wandb").glob("offline-run-*"))],
        env=os.environ | server.environment,
        cwd=run_dir.parent,  # where wandb leaves logs of its own
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
    run_dir, environment = tmp_path / "run", {"WANDB_MODE": "offline"}
    five_attempts(run_dir, data, environment)
    with wandb_server() as server:
        sync(server, run_dir)
        assert_each_step_once(server, run_dir)
        to_the_end(run_dir, data, environment)
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
        found = to_the_end(run_dir, data, server.environment)
        assert_each_step_once(server, run_dir)
        assert sorted(line["step"] for line in server.posts) == list(range(1, 101))
    assert len(found) >= 4, "W&B's processes were among those"
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{process}").exists() for process in found):
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.02)


@pytest.mark.slow
def test_online_helpers_that_end_at_a_signal_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb's program ends at TERM and INT with what it has not sent; KILL ends what feeds it, too."""
    metrics = JsonlFile(tmp_path / "metrics.jsonl")
    with wandb_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        for number, what in enumerate((signal.SIGTERM, signal.SIGINT, signal.SIGKILL, None)):
            logger = WandbLogger(tmp_path, {}, "dsbert", "demo", enabled=True)
            metrics.append({"step": 2 * number + 1})
            sender = logger._sender
            assert sender is not None
            deadline = time.monotonic() + 60
            while sender._url is None:
                assert time.monotonic() < deadline, "waited in vain"
                time.sleep(0.02)
            assert sender._child is not None
            found = processes([sender._child.pid])
            assert len(found) >= 2
            for process in found if what else []:
                with suppress(ProcessLookupError):
                    os.kill(process, what or 0)
            metrics.append({"step": 2 * number + 2})
            logger.close()
        metrics.close()
        assert [line["step"] for line in server.posts] == list(range(1, 9))
        assert {run: sorted(lines) for run, lines in server.lines.items()} == {
            (tmp_path / "wandb_id").read_text(): list(range(8))
        }, "no line took the place of another"
