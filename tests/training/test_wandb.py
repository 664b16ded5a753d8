"""Runs that are stopped in every way, and what a W&B server has of them in the end: each step, once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import psutil
import pytest
import yaml

from dsbert.base.jsonl import JsonlFile
from dsbert.training.metrics import WandbLogger
from dsbert.training.record_stream import alone
from dsbert.training.wandb_file import steps_on_disk
from tests.commands import SMALL, Done, complaint, dsbert
from tests.faults import attempt, fault, unlucky_dsbert, wait_for
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
    kept = [line for _, line in sorted(lines.items())]
    assert [line["_step"] for line in kept] == [line["step"] for line in kept] == sorted(arrived)
    records = {line["step"]: line for line in server.posts}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert records[record["step"]]["loss"] == pytest.approx(record["loss"], abs=1e-6)
        assert records[record["step"]]["topology_digest"] == record["topology_digest"]


def wandb_sync(server: WandbServer, *words: str, **environment: str) -> Done:
    """`dsbert wandb-sync`."""
    with mock.patch.dict(os.environ, server.environment | environment):
        os.environ.pop("WANDB_MODE", None)
        return dsbert("wandb-sync", *words)


def damage(run_dir: Path) -> None:
    """What power cuts and curious people leave of offline files: none of them is whole, and one is empty."""
    first, *others = sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    first.write_bytes(b"")
    for path in others:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)


@pytest.mark.slow
def test_offline_every_step_arrives_once_after_five_attempts(data: Path, tmp_path: Path) -> None:
    """By wandb's own command, which reads the offline files, and by ours, which does not need them."""
    run_dir, other, environment = tmp_path / "run", tmp_path / "other", {"WANDB_MODE": "offline"}
    five_attempts(run_dir, data, environment)
    shutil.copytree(run_dir, other)
    damage(other)
    with wandb_server() as server, wandb_server() as ours:
        sync(server, run_dir)
        assert_each_step_once(server, run_dir)
        done = wandb_sync(ours, str(other))
        assert done.returncode == 0, done.stderr
        assert_each_step_once(ours, other)
        assert {line["step"] for line in ours.posts} == set(steps_of(other))
        to_the_end(run_dir, data, environment)
        sync(server, run_dir)
        assert_each_step_once(server, run_dir)
        assert sorted(line["step"] for line in server.posts) == list(range(1, 101))
        (config,) = server.configs.values()
        assert config["optim"]["value"]["total_steps"] == 100
        shutil.copytree(run_dir, other, dirs_exist_ok=True)
        for _ in range(2):
            assert wandb_sync(ours, str(other)).returncode == 0
            assert_each_step_once(ours, other)
            assert sorted(line["step"] for line in ours.posts) == list(range(1, 101))


def test_wandb_sync_sends_the_whole_history_once(run: Path, tmp_path: Path) -> None:
    """Of a run that never was online: steps, pictures, configuration, checkpoints; and the second time nothing."""
    run_dir = Path(shutil.copytree(run, tmp_path / "mine", ignore=shutil.ignore_patterns("wandb", "heartbeats")))
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["recipe"]["log"] |= {"wandb_group": "sweep", "wandb_artifacts": True}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    with wandb_server() as server:
        done = wandb_sync(server, str(run_dir), "--json")
        assert (done.returncode, done.stderr) == (0, "")
        (said,) = json.loads(done.stdout)
        assert (said["sent"], said["last"], said["notes"]) == (12, 12, [])
        assert_each_step_once(server, run_dir)
        ((name, group),) = server.named.values()
        assert (name, group) == ("mine", "sweep")
        assert list(server.exit_codes.values()) == [0]
        (sent,) = server.configs.values()
        assert sent["world_size"]["value"] == 2
        assert sent["data_digest"]["value"] == config["identity"]["data_digest"]
        assert sent["versions"]["value"] == config["versions"]
        assert sent["git_revision"]["value"] == config["git_revision"]
        assert sent["optim"]["value"]["total_steps"] == 12

        updates = [json.loads(line) for line in (run_dir / "masks.jsonl").read_text().splitlines()]
        pictured = [line for line in server.posts if "topology/blocks" in line]
        assert [line["step"] for line in pictured] == [update["step"] for update in updates]
        for line, update in zip(pictured, updates, strict=True):
            assert line["topology/blocks"]["_type"] == "image-file"
            assert server.files[line["topology/blocks"]["path"]].startswith(b"\x89PNG")
            assert sum(line["topology/age_at_death"]["values"]) == update["pruned"]

        named = [{alias["alias"] for alias in artifact["aliases"]} for artifact in server.artifacts]
        assert named == [{"latest", "step-6"}, {"latest", "step-12"}]
        manifests = [json.loads(data) for name, data in server.files.items() if name.startswith("manifest-")]
        references = {entry["ref"] for manifest in manifests for entry in manifest["contents"].values()}
        assert (run_dir / "checkpoints" / "step_00000012" / "state.json").as_uri() in references
        assert not any("safetensors" in name for name in server.files), "a reference sends no file"

        posts, artifacts = len(server.posts), len(server.artifacts)
        done = wandb_sync(server, str(run_dir))
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"{run_dir}: 0 steps sent, W&B has its steps up to 12: http")
        assert (len(server.posts), len(server.artifacts)) == (posts, artifacts)
        assert server.alerts == []


@pytest.mark.slow
def test_what_an_offline_start_has_left_is_not_sent_twice(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = Path(shutil.copytree(run, tmp_path / "mine", ignore=shutil.ignore_patterns("wandb", "heartbeats")))
    monkeypatch.setenv("WANDB_MODE", "offline")
    WandbLogger(run_dir, enabled=True).close()
    (file,) = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    assert steps_on_disk(run_dir / "wandb") == set(range(1, 13))
    with wandb_server() as server:
        assert wandb_sync(server, str(run_dir)).returncode == 0
        assert file.with_suffix(".wandb.synced").exists()
        monkeypatch.delenv("WANDB_MODE")
        sync(server, run_dir)
        assert [line["step"] for line in server.posts] == list(range(1, 13))


def test_wandb_sync_says_in_one_line_what_is_missing(run: Path, tmp_path: Path) -> None:
    """A key, a server, a run, and that nobody else is at it."""
    nobody = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    with mock.patch.dict(os.environ, {"NETRC": str(tmp_path / "none")}):
        for name in ("WANDB_API_KEY", "WANDB_MODE"):
            os.environ.pop(name, None)
        assert complaint(dsbert("wandb-sync", str(run))).startswith("dsbert: expected a key of W&B's, found none: call")
    with mock.patch.dict(os.environ, nobody):
        os.environ.pop("WANDB_MODE", None)
        assert "expected an answer of W&B's server, http://127.0.0.1:9, within 5 s, found none: call this where" in (
            complaint(dsbert("wandb-sync", str(run)))
        )
    with wandb_server() as server:
        said = complaint(wandb_sync(server, str(tmp_path)))
        assert f"expected a run in {tmp_path} that has begun, found no config.yaml: No such file" in said
        (tmp_path / "config.yaml").write_text("recipe: {}")
        (tmp_path / "wandb_id").write_text("0123abcd")
        with alone(tmp_path / "wandb_id"):
            assert "expected nobody else to send" in complaint(wandb_sync(server, str(tmp_path)))
        for source, words, expected in (
            (
                "raise ModuleNotFoundError(name='wandb')",
                (),
                "found: wandb is not installed: pip install 'dsbert[wandb]'",
            ),
            ("import time; time.sleep(60)", ("--timeout", "1"), "within 1 s, found it still at work: the same command"),
        ):
            (tmp_path / "wandb.py").write_text(source)
            said = complaint(wandb_sync(server, str(tmp_path), *words, PYTHONPATH=str(tmp_path)))
            assert f"expected W&B to take {tmp_path}" in said
            assert expected in said


@pytest.mark.slow
def test_a_run_that_fails_alerts_once(data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with wandb_server() as server:
        words = ["pretrain", "demo", "--run-dir", str(run_dir), f"data.path={data}", *SMALL, "log.wandb=true"]
        words += ["--timeout", "10"]
        ended = attempt(words, fault("step", "SIGKILL", rank=1, step=8), env=server.environment)
        assert [rank.code for rank in ended] == [3, -9], ended[0].stderr
        deadline = time.monotonic() + 90
        while not server.exit_codes:
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.1)
        (alert,) = server.alerts
        assert list(server.exit_codes.values()) == [1]
    assert alert["title"] == "run failed"
    assert alert["severity"] == "ERROR"
    assert alert["text"].startswith("rank 1 on ")
    assert "at fault: rank 1 on " in alert["text"]


@pytest.mark.slow
def test_online_every_step_arrives_once_after_five_attempts(data: Path, tmp_path: Path) -> None:
    """TERM and KILL also reach wandb's own helper programs."""
    run_dir = tmp_path / "run"
    with wandb_server() as server:
        five_attempts(run_dir, data, server.environment)
        found = to_the_end(run_dir, data, server.environment)
        assert_each_step_once(server, run_dir)
        assert sorted(line["step"] for line in server.posts) == list(range(1, 101))
        assert "rank 0 on " in server.alerts[0]["text"], "what KILL has done to rank 0 is said"
    assert len(found) >= 4, "W&B's processes were among those"
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{process}").exists() for process in found):
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.02)


@pytest.mark.slow
def test_online_helpers_that_end_at_a_signal_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb's program ends at TERM and INT with what it has not sent; KILL ends what feeds it, too."""
    metrics = JsonlFile(tmp_path / "metrics.jsonl")
    (tmp_path / "config.yaml").write_text("recipe: {log: {wandb_project: dsbert}}")
    with wandb_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        for number, what in enumerate((signal.SIGTERM, signal.SIGINT, signal.SIGKILL, None)):
            logger = WandbLogger(tmp_path, enabled=True)
            metrics.append({"step": 2 * number + 1})
            sender = logger._sender
            assert sender is not None
            deadline = time.monotonic() + 60
            while sender.url is None:
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
