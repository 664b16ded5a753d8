"""slurm/*.sbatch on a real SLURM: four nodes on this machine (tools/slurm_sandbox.py), real jobs of `dsbert pretrain`.

Each job is disturbed several times in its life, for a start costs seconds, and must end in the very bytes of a run that
nobody disturbed. Signals and kills are sent when a step is reached, never after a time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsbert.cluster.launcher import module_command
from dsbert.config.recipe_files import RECIPES
from dsbert.monitoring.run_status import read_status
from tests.commands import ENVIRONMENT, SMALL, dsbert_on_a_rank
from tests.fault_rows import FaultTable
from tests.helpers import run_distributed
from tools.slurm_sandbox import Sandbox, SandboxError, install, missing, wait_for

pytestmark = pytest.mark.slow

STEPS = 480  # so many that a job which is disturbed five times is not done before the fifth
OVERRIDES = (
    *SMALL, "batch.global_batch=4", "batch.micro_batch=2", f"optim.total_steps={STEPS}", "checkpoint.every_steps=40",
    "eval.every_steps=160",
)  # fmt: skip
# sbatch hands the submitting shell's variables on: these must not make a run of its own of every task.
_LEFT_OVER = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
# From a rank's death to the next step: 11 s to see who is gone, and a start.
AGAIN_S = 90.0
START_S = 120.0  # a start takes 8 s on two idle cores


@pytest.fixture(scope="session")
def cluster() -> Iterator[Sandbox]:
    """Four nodes of one CPU, so that a rank fills one and a job of the partition `high` preempts what is there."""
    in_ci = os.environ.get("CI") == "true"
    if "on the PATH" in missing() and (in_ci or os.environ.get("DSBERT_APT") == "1"):
        install()
    if missing():
        # As root, continuous integration must run these tests; nobody else can.
        (pytest.fail if in_ci and os.geteuid() == 0 else pytest.skip)(
            f"no SLURM here: {missing()}, or set DSBERT_APT=1"
        )
    with Sandbox(nodes=4, cpus=1) as sandbox:
        yield sandbox


@pytest.fixture(scope="session")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of two ranks that nobody disturbs."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    words = ["pretrain", "demo", "--run-dir", str(run_dir), f"data.path={data}", *OVERRIDES]
    done = run_distributed(dsbert_on_a_rank, 2, {"words": words})
    assert [rank[0] for rank in done] == [0, 0], done
    return last_checkpoint(run_dir)


class Job:
    """A job of `dsbert submit` on the cluster; number: its id, or that of the whole array."""

    def __init__(self, cluster: Sandbox, folder: Path, *words: str, nodes: int = 2, recipe: str = "demo") -> None:
        self.cluster, self.folder = cluster, folder
        command = [sys.executable, "-m", "dsbert", "submit", recipe, "--nodes", str(nodes), "--time", "30", "--json"]
        done = cluster.run(*command, "--run-dir", str(folder / "run"), *words, cwd=folder, env=ENVIRONMENT | _LEFT_OVER)
        self.run_dir = folder / "run"
        self.number = json.loads(done.stdout)["job_id"]
        self.label = self.number
        self.struck = time.time()

    def task(self, number: int) -> Job:
        """One task of an array."""
        task = object.__new__(Job)
        task.__dict__ |= self.__dict__ | {"run_dir": self.folder / f"run-{number}", "label": f"{self.number}_{number}"}
        return task

    def record(self) -> dict[str, str]:
        words = self.cluster.run("scontrol", "--oneliner", "show", "job", self.label).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def log(self) -> str:
        return (self.folder / f"demo-{self.label}.log").read_text(errors="replace")

    def verdict(self) -> str:
        """What the script said last."""
        return [line for line in self.log().splitlines() if line.startswith(f"job {self.label}, restart ")][-1]

    def steps(self) -> int:
        return int(self.last_record().get("step", 0))

    def last_record(self) -> dict[str, Any]:
        try:
            lines = (self.run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return {}
        return dict(json.loads(lines[-1])) if lines and lines[-1].endswith("\n") else {}

    def wait(self, what: str, condition: Callable[[], bool], seconds: float = START_S) -> None:
        try:
            wait_for(condition, seconds, what, step_s=0.05)
        except TimeoutError as error:
            log = self.log() if (self.folder / f"demo-{self.label}.log").exists() else "no log"
            raise AssertionError(f"{error}\n{self.record()}\n{log}\n{self.cluster.logs('slurmctld')}") from None

    def reach(self, step: int, restart: int, start: int = 0) -> None:
        """Wait until this restart, and this start inside its allocation, has trained up to a step."""
        self.wait(
            f"step {step} in restart {restart}, start {start}",
            lambda: (
                (self.attempt().get("restart_count"), self.attempt().get("start")) == (restart, start)
                and self.steps() >= step
            ),
        )

    def trains_on(self, restart: int, start: int) -> float:
        """Wait until this start has taken a step of its own; seconds since the job was struck."""
        self.reach(0, restart, start)
        began = self.attempt()["started"]
        self.wait("a step of this start", lambda: self.last_record().get("time", 0.0) > began)
        return time.time() - self.struck

    def loses_a_rank(self, node: str) -> None:
        """To SIGKILL."""
        self.struck = time.time()
        os.kill(next(iter(self.ranks(node))), signal.SIGKILL)

    def attempt(self) -> dict[str, Any]:
        path = self.run_dir / "attempt.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def status(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "status.json").read_text())

    def requeued(self, restart: int, **changes: str) -> None:
        """Wait until the job waits to be started for the `restart`th time anew, and let it start at once, changed."""

        def waits_or_runs() -> bool:
            record = self.record()
            return record["Restarts"] == str(restart) and record["JobState"] in ("PENDING", "RUNNING")

        self.wait(f"restart {restart}", waits_or_runs)
        words = [f"{name}={value}" for name, value in changes.items()]
        # SLURM would wait for 6 s, here. A start within the second of the requeue would be refused: credential revoked.
        self.cluster.run("scontrol", "update", f"JobId={self.label}", "StartTime=now+2", *words, check=bool(words))

    def end(self) -> str:
        """Wait for the end: how SLURM calls it."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait("the end", lambda: self.record()["JobState"] in over)
        return self.record()["JobState"]

    def ranks(self, *nodes: str) -> dict[int, str]:
        """Processes that are ranks, by the node that they run on."""
        return {
            pid: node
            for node in nodes or self.cluster.nodes
            for pid, line in self.cluster.processes(node).items()
            if line.startswith(" ".join(module_command("dsbert.cli", "pretrain"))) and f"{self.run_dir} " in line + " "
        }

    def nodes(self) -> list[str]:
        return self.cluster.run("scontrol", "show", "hostnames", self.record()["NodeList"]).stdout.split()

    def is_preempted(self) -> None:
        """By a job that fills the cluster, and is over at once."""
        self.struck = time.time()
        nodes = f"--nodes={len(self.cluster.nodes)}"
        self.cluster.run("sbatch", "--partition=high", nodes, "--output=/dev/null", "--wrap=true")

    def loses_its_nodes(self, noticed: Callable[[list[str]], object]) -> None:
        """The daemons of its nodes die. What they started stands still until SLURM has noticed and the next attempt has
        begun elsewhere, and then goes on beside it."""
        lost, old = self.nodes(), self.attempt()
        restart = int(self.record()["Restarts"])
        zombies = self.ranks(*lost)
        assert sorted(zombies.values()) == lost
        ends = {pid: rf"task \d \({inner_pid(pid)}\) exited with (.*)\." for pid in zombies}

        def how(pid: int) -> str:
            log = (self.cluster.folder / "log" / f"slurmd-{zombies[pid]}.log").read_text()
            return (re.findall(ends[pid], log) or [""])[-1]

        try:
            for pid in zombies:
                os.kill(pid, signal.SIGSTOP)
            for node in lost:
                self.cluster.kill_daemon(node)
            noticed(lost)
            self.requeued(restart + 1)
            self.wait("the next attempt", lambda: self.attempt()["nonce"] != old["nonce"])
            for pid in zombies:
                os.kill(pid, signal.SIGCONT)
            self.wait("the end of the zombies", lambda: all(how(pid) for pid in zombies))
            # Nobody killed them: they found that another attempt owns the run.
            assert {how(pid) for pid in zombies} == {"exit code 3"}
            left = rf"restart {restart}: .* and SLURM has requeued the job already: left to SLURM"
            self.wait("the end of their script", lambda: bool(re.search(left, self.log())))
        finally:
            for node in lost:
                self.cluster.start_node(node)
        assert not set(self.nodes()) & set(lost)

    def assert_saved(self, cause: str, restart: int) -> None:
        status = self.status()
        found = (status["outcome"], status["cause"], status["job_id"], status["restart_count"])
        assert found == ("requeue", cause, self.number, restart)
        assert f"restart {restart}: saved: requeued, to go on from step_{status['step']:08d}" in self.verdict()

    def assert_done(self, restart: int, attempts: int) -> None:
        """The last attempt owns the run and has ended it."""
        assert self.end() == "COMPLETED"
        assert f"restart {restart}: done" in self.log()
        status, attempt = self.status(), self.attempt()
        found = (status["outcome"], status["step"], status["attempt"], status["restart_count"])
        assert found == ("done", STEPS, attempts, restart)
        assert (attempt["number"], attempt["job_id"], attempt["restart_count"]) == (attempts, self.number, restart)
        assert self.record()["Restarts"] == str(restart)


def inner_pid(pid: int) -> str:
    """A process's id as its own node sees it."""
    return re.findall(r"^NSpid:.*\s(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[0]


def last_checkpoint(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / f"step_{STEPS:08d}"


def assert_equal_to(undisturbed: Path, found: Path) -> None:
    names = sorted(path.name for path in undisturbed.glob("*.safetensors"))
    assert len(names) >= 2
    for name in names:
        assert (found / name).read_bytes() == (undisturbed / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.timeout(900)  # six starts: 80 s on two idle cores
def test_what_befalls_a_job_leaves_no_trace(
    cluster: Sandbox, data: Path, undisturbed: Path, tmp_path: Path, fault_table: FaultTable
) -> None:
    job = Job(cluster, tmp_path, f"data.path={data}", *OVERRIDES)
    rows: list[dict[str, Any]] = []

    def survived(number: str, what: str, codes: list[int], culprit: dict[str, Any] | None = None) -> None:
        """Once the next attempt trains."""
        rows.append(fault_table.row(number, f"SLURM, 2 nodes: {what}", time.time() - job.struck, codes, culprit))

    job.reach(20, restart=0)
    job.struck = time.time()
    cluster.run("scancel", "--batch", "--signal=USR2", job.label)
    job.requeued(1, Partition="patient")
    job.assert_saved(cause="SIGUSR2", restart=0)

    job.reach(60, restart=1)
    survived("5", "the job's signal, USR2: saved, requeued, resumed", [75, 75])
    job.is_preempted()  # 30 s of grace
    job.requeued(2, Partition="low")
    job.assert_saved(cause="SIGTERM", restart=1)

    job.reach(100, restart=2)
    survived("5", "preempted by a higher partition, GraceTime 30: saved, requeued, resumed", [75, 75])
    job.is_preempted()  # no grace: at worst, the newest checkpoint is what is left
    job.requeued(3)

    job.reach(140, restart=3)
    survived("1", "preempted, GraceTime 0", [])
    job.loses_a_rank(job.nodes()[1])
    assert job.trains_on(restart=3, start=1) < AGAIN_S
    culprit = job.attempt()["previous"]["culprit"]
    survived("1", "kill -9 of a rank: trains on in the same allocation, without the queue", [3, -9], culprit)
    assert (job.attempt()["previous"]["outcome"], culprit["rank"], culprit["host"]) == ("failed", 1, job.nodes()[1])
    again = r"restart 3: a rank or a node failed, exit code (3|137): starts again inside the allocation, time 1, on"
    assert re.search(again, job.verdict())

    job.reach(180, restart=3, start=1)
    job.struck = time.time()
    job.loses_its_nodes(noticed=lambda lost: cluster.run(
        "scontrol", "update", f"NodeName={','.join(lost)}", "State=DOWN", "Reason=lost"
    ))  # fmt: skip
    job.assert_done(restart=4, attempts=6)
    survived("21", "kill -9 of both slurmds, their tasks live on beside the next attempt and leave", [3, 3])
    assert_equal_to(undisturbed, last_checkpoint(job.run_dir))
    fault_table.identical(rows)


@pytest.mark.timeout(600)  # four starts
def test_spare_nodes_take_the_place_of_those_that_fail(
    cluster: Sandbox, data: Path, undisturbed: Path, tmp_path: Path, fault_table: FaultTable
) -> None:
    """A node fails twice and is left out, SLURM loses another: the job keeps its allocation, and ends as it would."""
    job = Job(cluster, tmp_path, f"data.path={data}", *OVERRIDES, "--spare-nodes", "2")
    job.reach(50, restart=0)
    first, second, third, fourth = job.nodes()
    rows = []
    for start in (1, 2):
        assert set(job.ranks().values()) == {first, second}
        job.loses_a_rank(second)
        seconds = job.trains_on(restart=0, start=start)
        job.reach(50 + 40 * start, restart=0, start=start)  # beyond another checkpoint, or the queue would be next
    what = "a node whose rank dies a second time is left out: trains on with a spare one"
    culprit = job.attempt()["previous"]["culprit"]
    rows.append(fault_table.row("1", f"SLURM, 2 nodes: {what}", seconds, [3, -9], culprit))
    assert set(job.ranks().values()) == {first, third}
    job.struck = time.time()
    try:
        cluster.kill_daemon(third)
        cluster.run("scontrol", "update", f"NodeName={third}", "State=DOWN", "Reason=lost")
        seconds = job.trains_on(restart=0, start=3)
        what = "a node is lost: trains on with a spare one in the same allocation"
        rows.append(fault_table.row("1", f"SLURM, 2 nodes: {what}", seconds, [], None))
        assert {first, fourth} <= set(job.ranks().values())
        job.assert_done(restart=0, attempts=4)
    finally:
        cluster.start_node(third)
    assert [(one.number, one.job_id) for one in read_status(job.run_dir).attempts] == [
        (number, job.number) for number in (1, 2, 3, 4)
    ]
    assert_equal_to(undisturbed, last_checkpoint(job.run_dir))
    fault_table.identical(rows)


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_slurm_notices_lost_nodes_itself(cluster: Sandbox, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, f"data.path={data}", *OVERRIDES)
    job.reach(50, restart=0)
    job.loses_its_nodes(noticed=lambda lost: None)
    job.assert_done(restart=1, attempts=2)
    assert_equal_to(undisturbed, last_checkpoint(job.run_dir))


@pytest.mark.exhaustive
def test_one_task_of_an_array_is_requeued_alone(
    cluster: Sandbox, data: Path, tmp_path: Path, fault_table: FaultTable
) -> None:
    (tmp_path / "lines").write_text("seed=5\nseed=5\n")
    job = Job(cluster, tmp_path, f"data.path={data}", *OVERRIDES, "--sweep", str(tmp_path / "lines"), nodes=1)
    tasks = [job.task(1), job.task(2)]
    for task in tasks:
        task.reach(20, restart=0)
    # The one whose own id is the whole array's: what goes to a bare id would reach both.
    (one,) = [task for task in tasks if task.record()["JobId"] == job.number]
    (other,) = [task for task in tasks if task is not one]
    struck = time.time()
    cluster.run("scancel", "--batch", "--signal=USR2", one.label)
    one.requeued(1)
    assert (one.end(), other.end()) == ("COMPLETED", "COMPLETED")
    assert (one.record()["Restarts"], other.record()["Restarts"]) == ("1", "0")
    assert "restart 0: saved: requeued" in one.log()
    assert "restart 0: done" in other.verdict()
    assert_equal_to(last_checkpoint(other.run_dir), last_checkpoint(one.run_dir))
    what = "SLURM: the signal to one task of an array: it alone is requeued, and ends as its undisturbed sibling"
    fault_table.identical([fault_table.row("5", what, time.time() - struck, [75], None)])


def test_an_experiment_is_an_array_of_its_cells(cluster: Sandbox, data: Path, tmp_path: Path) -> None:
    """Four cells on four nodes; while they are queued nobody submits them again, and what is done is never again."""
    small = dict(word.split("=", 1) for word in SMALL) | {"data.path": str(data)}
    arms = {name: {"overrides": {"sparsity.pattern": name}} for name in ("static", "dynamic")}
    file = tmp_path / "cells.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "base": "demo", "seeds": [1, 2], "arms": arms, "compare": [["dynamic", "static"]],
                "overrides": {key: yaml.safe_load(value) for key, value in small.items()},
            }
        )
    )  # fmt: skip
    command = [sys.executable, "-m", "dsbert", "experiment"]
    place = ["--dir", str(tmp_path / "cells")]

    def submit(*words: str) -> subprocess.CompletedProcess[str]:
        slurm = ["--slurm", "--nodes", "1", "--time", "30", "--json"]
        return cluster.run(
            *command, str(file), *place, *slurm, *words, cwd=tmp_path, env=ENVIRONMENT | _LEFT_OVER, check=False
        )

    held = submit("--sbatch=--hold")
    assert held.returncode == 0, held.stderr
    number = json.loads(held.stdout)["job_id"]
    again = submit()
    assert (again.returncode, again.stdout) == (2, "")
    assert "4 cells are queued or at work already" in again.stderr
    cluster.run("scontrol", "release", number)

    def done() -> int:
        states = tmp_path.glob("cells/cells/*/status.json")
        return sum(json.loads(path.read_text())["outcome"] == "done" for path in states)

    wait_for(lambda: done() == 4, START_S, "four cells", step_s=0.2)
    named = {read_status(path.parent).attempts[0].job_id for path in tmp_path.glob("cells/cells/*/jobs.jsonl")}
    assert named == {f"{number}_{task}" for task in (1, 2, 3, 4)}, "as squeue calls them"
    shown = subprocess.run(
        [*command, "table", str(file), *place, "--format", "json"], capture_output=True, text=True, env=ENVIRONMENT,
        check=True,
    )  # fmt: skip
    found = json.loads(shown.stdout)
    assert found["notes"] == []
    assert [row["n"] for row in found["arms"]] == ["2", "2"]
    over = submit()
    assert over.returncode == 2
    assert "found none of 4" in over.stderr


def test_a_users_mistake_is_not_requeued(cluster: Sandbox, data: Path, tmp_path: Path) -> None:
    """Found on the nodes: what submit can see, it refuses."""
    shutil.copytree(data, tmp_path / "none")
    job = Job(cluster, tmp_path, f"data.path={tmp_path}/none", *OVERRIDES, "--sbatch", "--hold")
    shutil.rmtree(tmp_path / "none")
    cluster.run("scontrol", "release", job.label)
    assert job.end() == "FAILED"
    assert (job.record()["ExitCode"], job.record()["Restarts"]) == ("2:0", "0")
    assert "not requeued: the run was refused, exit code 2" in job.verdict()
    assert f"{tmp_path}/none" in job.log()


@pytest.mark.slow
def test_it_gives_up_after_three_restarts_without_progress(cluster: Sandbox, data: Path, tmp_path: Path) -> None:
    """Each of them through the queue: test_submit.py has those inside an allocation."""
    job = Job(cluster, tmp_path, f"data.path={data}", *OVERRIDES, "--setup", "MAX_INSIDE=0")
    for restart in range(4):
        job.wait("both ranks", lambda: len(job.ranks()) == 2)
        for pid in job.ranks():
            os.kill(pid, signal.SIGKILL)
        if restart < 3:
            job.requeued(restart + 1)
    assert job.end() == "FAILED"
    assert job.record()["Restarts"] == "3"
    assert "given up: exit code 137, and 3 restarts brought no checkpoint newer than none" in job.verdict()


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_the_time_limit_and_scancel(cluster: Sandbox, data: Path, tmp_path: Path) -> None:
    words = ("--time", "1", "--signal-lead", "30")
    job = Job(cluster, tmp_path, f"data.path={data}", *OVERRIDES, "optim.total_steps=100000", *words)
    job.requeued(1, TimeLimit="30")
    assert (job.status()["outcome"], job.status()["cause"]) == ("requeue", "SIGUSR2")
    job.reach(job.status()["step"] + 1, restart=1)
    cluster.run("scancel", job.label)
    assert job.end() == "CANCELLED"
    left = r"restart 1: saved, and for SLURM the job is (COMPLETING|CANCELLED): left to SLURM"
    job.wait("the script's end", lambda: bool(re.search(left, job.log())))
    assert (job.status()["outcome"], job.record()["Restarts"]) == ("requeue", "1"), "saved, and not started again"


@pytest.mark.exhaustive
def test_a_site_that_requeues_by_exit_code(cluster: Sandbox, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    with Sandbox(nodes=2, cpus=1, extra="RequeueExit=75") as site:
        job = Job(site, tmp_path, f"data.path={data}", *OVERRIDES)
        job.reach(20, restart=0)
        site.run("scancel", "--batch", "--signal=USR2", job.label)
        job.requeued(1)
        job.assert_done(restart=1, attempts=2)
    assert_equal_to(undisturbed, last_checkpoint(job.run_dir))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_jobs_on_one_run(cluster: Sandbox, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """What is edited while they wait changes nothing; the second one is refused, or waits for the first, as asked; one
    that starts all the same finds it at work, says so and ends."""
    recipe, tuning = tmp_path / "demo.yaml", tmp_path / "zero.json"
    shutil.copy(Path(RECIPES) / "demo.yaml", recipe)
    tuning.write_text('{"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}')
    words = (f"data.path={data}", *OVERRIDES, f"deepspeed.config={tuning}")
    job = Job(cluster, tmp_path, *words, "--sbatch", "--hold", recipe=str(recipe))
    script = tmp_path / "run.sbatch"
    written = script.read_text()
    for path in (recipe, tuning):
        path.write_text("not what was submitted")
    with pytest.raises(SandboxError, match=f"found job {job.number} queued or at work.*--after"):
        Job(cluster, tmp_path, f"data.path={data}", *OVERRIDES)
    with pytest.raises(SandboxError, match="expected seed = 1 as in the run in"):
        Job(cluster, tmp_path, f"data.path={data}", *OVERRIDES, "seed=2", "--after")
    second = Job(cluster, tmp_path, f"data.path={data}", *OVERRIDES, "--after")
    assert second.record()["Dependency"].startswith(f"afterany:{job.number}")
    assert script.read_text() == written, "another job's script"
    assert (tmp_path / "run.2.sbatch").is_file()

    cluster.run("scontrol", "release", job.label)
    job.reach(20, restart=0)
    third = cluster.run("sbatch", "--parsable", str(script), cwd=tmp_path).stdout.strip()
    cluster.run("scontrol", "release", third)  # the script says --hold
    log = tmp_path / f"demo-{third}.log"
    said = "expected nobody at work on the run in"
    job.wait("the third job's end", lambda: log.exists() and "not requeued" in log.read_text())
    assert f"found attempt 1 of job {job.number}, rank 0 on n" in log.read_text()
    assert said in log.read_text()
    assert "not requeued: the run was refused, exit code 2" in log.read_text()
    job.assert_done(restart=0, attempts=1)
    assert_equal_to(undisturbed, last_checkpoint(job.run_dir))
    assert second.end() == "COMPLETED"


def test_odd_characters_reach_slurm_as_they_are(cluster: Sandbox, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a 'b' \\c $HOME #d"
    folder.mkdir()
    name = 'it\'s "a" \\ $HOME # x'
    job = Job(cluster, folder, f"data.path={data}", *OVERRIDES, "--job-name", name, "--sbatch", "--hold")
    shown = cluster.run("scontrol", "show", "job", job.number).stdout
    assert f"JobName={name}\n" in shown
    assert f"WorkDir={folder}\n" in shown
    cluster.run("scancel", job.number)


def test_a_program_that_is_missing_is_named_once(cluster: Sandbox, tmp_path: Path) -> None:
    """The script as it stands, submitted where dsbert is on no PATH; and a setup line that fails."""
    shutil.copytree(Path(__file__).parents[2] / "slurm", tmp_path / "slurm")
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    command = ("sbatch", "--parsable", "--time=5", "--nodes=2", "slurm/pretrain.sbatch")
    number = cluster.run(*command, cwd=tmp_path, env=environment).stdout.strip()
    log = tmp_path / f"demo-{number}.log"
    wait_for(lambda: log.exists() and bool(log.read_text()), START_S, "a line in the log")
    record = cluster.run("scontrol", "--oneliner", "show", "job", number).stdout
    assert log.read_text().startswith(f"job {number}, restart 0: not started: expected dsbert on the PATH of n")
    assert log.read_text().count("\n") == 1
    assert "Restarts=0" in record


def test_the_sandbox_leaves_nothing_behind(cluster: Sandbox) -> None:
    program = [sys.executable, str(Path(__file__).parents[2] / "tools" / "slurm_sandbox.py")]
    scripts = program[1].replace("tools/slurm_sandbox.py", "slurm/*.sbatch")
    tried = f"for script in {scripts}; do sbatch --test-only $script || exit 6; done"
    shown = f"{tried}; srun -N2 hostname; cat /etc/hosts; echo $SLURM_CONF; exit 5"
    done = subprocess.run([*program, "--", "sh", "-c", shown], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 5, done.stderr
    assert {"n1", "n2"} <= set(done.stdout.split())
    assert Path("/etc/hosts").read_text() in done.stdout
    (shown_conf,) = [line for line in done.stdout.splitlines() if line.endswith("/slurm.conf")]
    assert not Path(shown_conf).parent.exists()

    tool = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    assert tool.stdout is not None
    conf = Path(tool.stdout.readline().strip().removeprefix("export SLURM_CONF="))
    assert conf.is_file()
    assert processes_with(str(conf.parent))
    tool.kill()
    tool.wait()
    wait_for(lambda: not processes_with(str(conf.parent)), 10, "the end of all daemons")
    shutil.rmtree(conf.parent)


def processes_with(text: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found += [line for line in [path.read_text(errors="replace")] if text in line]
    return found
