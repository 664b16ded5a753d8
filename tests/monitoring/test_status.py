"""What `dsbert status`, `runs` and `watch` say, held against runs to which all of it has happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsbert.base.jsonl import to_json
from dsbert.monitoring.finding import find_runs
from dsbert.monitoring.run_files import read_files
from dsbert.monitoring.run_status import read_status, status_of, thinned
from dsbert.monitoring.standing import standing
from dsbert.monitoring.status_lines import sparkline, status_lines
from dsbert.training.attempts import slurm_array_task
from tests.commands import ENVIRONMENT, SMALL, complaint, dsbert, dsbert_process

NOW = 1_000_000.0


def state_of(run_dir: Path) -> tuple[str, str]:
    found = standing(read_files(run_dir))
    return found.state, found.why


def eventually(condition: Callable[[], bool], seconds: float = 150.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_run_that_is_done(run: Path) -> None:
    """And it is told without torch."""
    program = "import sys; from dsbert.cli import app; app.run(sys.argv[1:]); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", program, "status", str(run), "--json"],
        env=ENVIRONMENT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (found,) = json.loads(done.stdout)
    assert (found["state"], found["step"], found["total_steps"], found["restarts"]) == ("done", 12, 12, 0)
    assert 0 < found["goodput"] < 1
    assert found["spending"]["steps"] + found["spending"]["evaluation"] < found["spending"]["total"] < 120
    assert found["checkpoint"] == "step_00000012"
    assert found["eta_s"] is None
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert found["loss"] == records[-1]["loss"]
    assert found["curve"] == [record["loss"] for record in records]


def test_what_befalls_a_run_is_told(data: Path, tmp_path: Path) -> None:
    """Starting, running, suspended, killed without a word, begun again, done."""
    run_dir = tmp_path / "run"
    words = ["pretrain", "demo", "--nproc", "2", "--run-dir", str(run_dir), f"data.path={data}", *SMALL]
    words += ["optim.total_steps=100", "checkpoint.every_steps=10", "sparsity.num_updates=2", "model.hidden_size=64"]
    with (tmp_path / "log").open("wb") as log:
        job = subprocess.Popen([sys.executable, "-m", "dsbert", *words], env=ENVIRONMENT, stderr=log)
    eventually(lambda: (run_dir / "attempts.jsonl").exists() and bool(read_files(run_dir).beats))
    assert state_of(run_dir)[0] in ("starting", "running")
    eventually(lambda: state_of(run_dir)[0] == "running" and read_status(run_dir).checkpoint is not None)
    assert (read_status(run_dir).eta_s or 0) > 0

    ranks = {seen.beat.rank: seen.beat.pid for seen in read_files(run_dir).beats}
    for pid in ranks.values():
        os.kill(pid, signal.SIGSTOP)
    stopped = state_of(run_dir)
    for pid in (*ranks.values(), job.pid):
        os.kill(pid, signal.SIGKILL)
    job.wait()
    assert stopped[0] == "silent"
    assert "was stopped" in stopped[1]
    eventually(lambda: state_of(run_dir)[0] == "killed")
    assert "rank 0" in state_of(run_dir)[1]
    assert read_status(run_dir).eta_s is None
    killed = read_status(run_dir)

    assert dsbert_process(*words).returncode == 0
    found = read_status(run_dir)
    assert (found.standing.state, found.step, found.restarts) == ("done", 100, 1)
    first, second = found.attempts
    assert first.outcome is None
    assert first.cause == "ended without a word"
    assert first.last_step == killed.step
    assert first.lost_steps == killed.step - second.first_step
    assert first.lost_steps == found.lost_steps <= 12
    assert second.first_step >= 10
    assert first.ended is not None
    assert second.started is not None
    assert found.spending.down == pytest.approx(second.started - first.ended)
    text = "\n".join(status_lines(found))
    assert f"1, {found.lost_steps} steps taken again" in text
    assert "ended without a word" in " ".join(text.split())


def written(run_dir: Path, attempts: list[dict[str, Any]], metrics: list[dict[str, Any]] | None = None) -> Path:
    """A run directory of nothing but these records."""
    run_dir.mkdir(exist_ok=True)
    for name, records in (("attempts.jsonl", attempts), ("metrics.jsonl", metrics or [])):
        (run_dir / name).write_text("".join(to_json(record) + "\n" for record in records))
    return run_dir


def beat(run_dir: Path, nonce: str, age_s: float, **changes: Any) -> None:
    """A heartbeat of a rank on another machine, so many seconds old."""
    folder = run_dir / "heartbeats" / nonce
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "rank": 0, "host": "far", "pid": 1, "place": "elsewhere", "beat": 5, "step": 7, "progress": 7,
        "phase": "train", "ended": None,
    }  # fmt: skip
    path = folder / f"{changes.get('rank', 0):05d}.json"
    path.write_text(to_json({**values, **changes}))
    os.utime(path, (time.time() - age_s,) * 2)


def test_ranks_on_other_machines_are_judged_by_their_beats(tmp_path: Path) -> None:
    run_dir = written(tmp_path / "run", [{"number": 1, "nonce": "a", "started": time.time() - 500}])
    assert state_of(run_dir) == ("killed", "no rank was heard")
    beat(run_dir, "a", 3.0)
    beat(run_dir, "a", 4.0, rank=1, step=6)
    assert state_of(run_dir) == ("running", "")
    assert read_status(run_dir).slowest == "rank 1 on far at step 6 in phase train"
    beat(run_dir, "a", 90.0, rank=1)
    assert state_of(run_dir) == ("silent", "rank 1 on far was heard 1.5 min ago")
    beat(run_dir, "a", 90.0, rank=1, ended={"code": 3, "cause": "boom"})
    assert state_of(run_dir) == ("running", "rank 1 on far left with exit code 3 (boom)")
    beat(run_dir, "a", 300.0)
    assert state_of(run_dir) == ("silent", "rank 0 on far was heard 5.0 min ago")
    beat(run_dir, "a", 90.0, ended={"code": 3, "cause": "peer"})
    assert state_of(run_dir)[0] == "killed"
    assert read_status(run_dir).step == 7, "a step is taken before its record is written"
    spent = read_status(run_dir).spending
    assert spent.total == pytest.approx(410, abs=5), "the time of who is gone stands still"


def test_ranks_that_have_met_and_not_taken_the_run_over(tmp_path: Path) -> None:
    """They verify the checkpoint, for minutes where it is large."""
    run_dir = written(tmp_path / "run", [])
    beat(run_dir, "b", 1.0, phase="verify", step=0)
    assert state_of(run_dir) == ("starting", "verify")
    previous = {"number": 1, "nonce": "a", "started": time.time() - 500}
    written(run_dir, [previous])
    status = {"attempt": 1, "outcome": "failed", "step": 7, "cause": "boom", "culprit": None, "time": time.time() - 60}
    (run_dir / "status.json").write_text(to_json(status))
    assert state_of(run_dir) == ("starting", "verify")
    beat(run_dir, "b", 400.0, phase="verify", step=0)
    assert state_of(run_dir) == ("failed", "boom")


def test_a_lost_rank_of_a_job_has_it_requeued(tmp_path: Path) -> None:
    """As slurm/job.sh does; not after what is final."""
    run_dir = written(tmp_path / "run", [{"number": 1, "nonce": "a", "started": time.time() - 500, "job_id": "7"}])
    for code, state in ((3, "requeued"), (74, "requeued"), (2, "failed"), (4, "failed"), (1, "failed")):
        beat(run_dir, "a", 1.0, ended={"code": code, "cause": "boom"})
        status = {"attempt": 1, "outcome": "failed", "step": 7, "cause": "boom", "culprit": None}
        (run_dir / "status.json").write_text(to_json(status))
        assert state_of(run_dir)[0] == state
        (run_dir / "status.json").unlink()
        assert state_of(run_dir)[0] == {"failed": "killed"}.get(state, state)
    beat(run_dir, "a", 1.0, ended={"code": 0, "cause": None})
    assert state_of(run_dir) == ("done", "")


def test_steps_that_are_not_cut_back_yet_are_not_the_new_attempts(tmp_path: Path) -> None:
    now = time.time()
    previous = {"outcome": None, "step": 90, "cause": "ended without a word", "culprit": None, "time": now - 50}
    attempts = [
        {"number": 1, "nonce": "a", "started": now - 500},
        {"number": 2, "nonce": "b", "started": now - 5, "checkpoint": "step_00000010", "previous": previous},
    ]
    metrics = [{"step": step, "step_s": 1.0, "loss": 1.0, "time": now - 500 + step} for step in (10, 50, 90)]
    run_dir = written(tmp_path / "run", attempts, metrics)
    beat(run_dir, "b", 1.0, step=10, phase="load")
    found = read_status(run_dir)
    assert (found.standing.state, found.step, found.spending.steps) == ("starting", 10, 10)
    assert found.attempts[0].lost_steps == 80


def test_a_job_that_waits(tmp_path: Path) -> None:
    """Before its first start, between starts, and behind another."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    jobs = run_dir / "jobs.jsonl"
    jobs.write_text(to_json({"job_id": "41", "submitted": time.time() - 60}) + "\n")
    assert state_of(run_dir) == ("queued", "job 41, submitted 60 s ago".replace("60 s", "1.0 min"))
    assert find_runs(tmp_path) == [run_dir]
    written(run_dir, [{"number": 1, "nonce": "a", "started": time.time() - 30}])
    beat(run_dir, "a", 1.0)
    assert state_of(run_dir) == ("running", "")
    status = {"attempt": 1, "outcome": "requeue", "step": 7, "cause": "SIGUSR2", "culprit": None}
    (run_dir / "status.json").write_text(to_json(status))
    assert state_of(run_dir) == ("requeued", "SIGUSR2")
    jobs.write_text(to_json({"job_id": "42", "submitted": time.time()}) + "\n")
    assert state_of(run_dir) == ("queued", "job 42, submitted 0 s ago; before: requeued (SIGUSR2)")
    (run_dir / "status.json").write_text(to_json({**status, "outcome": "done"}))
    assert state_of(run_dir) == ("done", "")


def test_a_task_of_an_array_that_has_begun_waits_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch calls it ARRAY_TASK, in its own environment it has another id; and clocks of machines differ."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "41")
    assert slurm_array_task() is None
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    now = time.time()
    attempt = {"number": 1, "nonce": "a", "started": now - 90, "job_id": "43", "array_task": slurm_array_task()}
    run_dir = written(tmp_path / "run", [attempt])
    (run_dir / "jobs.jsonl").write_text(to_json({"job_id": "41_2", "submitted": now - 60}) + "\n")
    status = {"attempt": 1, "outcome": "requeue", "step": 7, "cause": "SIGUSR2", "culprit": None, "job_id": "43"}
    (run_dir / "status.json").write_text(to_json(status))
    assert state_of(run_dir) == ("requeued", "SIGUSR2")
    assert read_status(run_dir).attempts[0].job_id == "41_2"
    with (run_dir / "jobs.jsonl").open("a") as jobs:
        jobs.write(to_json({"job_id": "50_2", "submitted": now - 30}) + "\n")
    assert state_of(run_dir)[0] == "queued"
    (run_dir / "status.json").write_text(to_json({**status, "outcome": "failed", "cause": "boom"}))
    (run_dir / "jobs.jsonl").unlink()
    beat(run_dir, "a", 1.0, ended={"code": 3, "cause": "boom"})
    assert state_of(run_dir) == ("requeued", "boom; job 41_2 requeues itself, unless it has given up")


@pytest.mark.parametrize(
    ("device", "precision", "mfu"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 0.25),
        ("NVIDIA H100 PCIe", "fp16", 0.25 * 989 / 756),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("cpu", "bf16", None),
        (["NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"], "bf16", None),
    ],
)
def test_mfu_is_a_share_of_what_the_cards_can_do(
    device: Any, precision: str, mfu: float | None, tmp_path: Path
) -> None:
    """Of 4 ranks; where the card is known, and computes in half precision."""
    flops = 0.25 * 989e12 * 4
    metrics = [{"step": 10, "step_s": 2.0, "loss": 5.0, "flops_total": 10 * 2.0 * flops, "tokens_per_s": 123456.7}]
    run_dir = written(tmp_path / "run", [{"number": 1, "nonce": "a", "world_size": 4}], metrics)
    config = {"recipe": {}, "deepspeed": {precision: {"enabled": True}}, "numerics": {"device": device}}
    (run_dir / "config.yaml").write_text(to_json(config))
    found = read_status(run_dir)
    assert found.mfu == pytest.approx(mfu)
    lines = list(status_lines(found))
    assert any("MFU" in one for one in lines) == (mfu is not None)
    assert all(len(one) <= 80 for one in lines)


def test_where_the_time_went(tmp_path: Path) -> None:
    """Steps of 2 s: 10, of which 4 were taken again; then 14 more; an evaluation and two saves."""
    previous = {"outcome": "failed", "step": 10, "cause": "boom", "culprit": None, "time": NOW + 40}
    attempts = [
        {"number": 1, "nonce": "a", "started": NOW},
        {"number": 2, "nonce": "b", "started": NOW + 100, "checkpoint": "step_00000006", "previous": previous},
    ]
    metrics = [
        {"step": 6, "step_s": 2.0, "save_s": 1.0, "validation_s": 0.0, "loss": 5.0},
        {"step": 20, "step_s": 2.0, "save_s": 1.0, "validation_s": 4.0, "loss": 4.0, "val_mlm_loss": 4.5, "skipped": 2},
    ]
    run_dir = written(tmp_path / "run", attempts, metrics)
    status = {"attempt": 2, "outcome": "done", "step": 20, "cause": None, "culprit": None, "time": NOW + 150}
    (run_dir / "status.json").write_text(to_json(status))
    found = status_of(read_files(run_dir))
    spent = found.spending
    assert (spent.total, spent.steps, spent.saves, spent.evaluation) == (150, 40, 2, 4)
    assert (spent.lost, spent.down, spent.other) == (8, 60, 36)
    assert spent.goodput == pytest.approx(40 / 150)
    assert (found.lost_steps, found.skipped, found.val_loss) == (4, 2, 4.5)
    assert [(one.first_step, one.last_step, one.outcome) for one in found.attempts] == [
        (0, 10, "failed"),
        (6, 20, "done"),
    ]


def test_the_slowest_rank_is_shown(tmp_path: Path) -> None:
    slowest = {
        "slowest_rank": 3, "own_s": 0.4, "slowest_own_s": 0.6, "slowest_ratio": 1.5, "slowest_cause": "data",
        "stragglers": "1,3",
    }  # fmt: skip
    run_dir = written(tmp_path / "run", [{"number": 1, "nonce": "a"}], [{"step": 5, "loss": 4.0, **slowest}])
    beat(run_dir, "a", 1.0, rank=3, host="n7")
    text = " ".join("\n".join(status_lines(read_status(run_dir))).split())
    assert "slowest rank 3 on n7: 0.6 s of its own a step, the median rank 0.4 s (data, a straggler)" in text
    written(run_dir, [{"number": 1, "nonce": "a"}], [{"step": 5, "loss": 4.0, **slowest, "stragglers": None}])
    assert "a straggler" not in " ".join("\n".join(status_lines(read_status(run_dir))).split())
    written(run_dir, [{"number": 1, "nonce": "a"}], [{"step": 5, "loss": 4.0, "slowest_rank": 1}])
    assert read_status(run_dir).slowest_rank is None


def test_damage_is_left_out(tmp_path: Path) -> None:
    run_dir = written(tmp_path / "run", [{"number": 1, "nonce": "a"}])
    with (run_dir / "attempts.jsonl").open("a") as file:
        file.write('{"number": "two"}\nno json\n')
    (run_dir / "metrics.jsonl").write_text('{"step": null}\n{"step": 3, "loss": null, "step_s": "fast"}\n{"st')
    (run_dir / "status.json").write_text("{")
    found = read_status(run_dir)
    assert (found.step, found.loss, found.step_s, len(found.attempts)) == (3, None, None, 1)
    assert list(status_lines(found))


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 3, "loss": NaN, "val_mlm_loss": "x", "skipped": "x"}',
        '{"step": 3, "loss": Infinity, "val_mlm_loss": {}, "tokens_per_s": null}',
        '{"step": 3, "loss": HUGE, "step_s": HUGE, "flops_total": HUGE, "time": HUGE}',
        '{"step": HUGE, "loss": 1.0}',
    ],
)
def test_numbers_that_are_none(line: str, tmp_path: Path) -> None:
    run_dir = written(tmp_path / "run", [{"number": 1, "nonce": "a"}])
    (run_dir / "attempts.jsonl").write_text('{"number": 1, "nonce": "a", "started": 1e300}\n')
    (run_dir / "metrics.jsonl").write_text(
        line.replace("HUGE", "1" + "0" * 400) + "\n" + '{"step": 4, "loss": 2.0, "step_s": 1.0}\n'
    )
    (run_dir / "config.yaml").write_text("recipe: {name: 2020-01-01, optim: null}\n")
    (run_dir / "jobs.jsonl").write_text(f'{{"job_id": "1", "submitted": 1{"0" * 400}}}\n')
    found = read_status(run_dir)
    assert (found.loss, found.step, found.name) == (2.0, 4, None)
    assert all(len(text) <= 80 for text in status_lines(found))
    assert json.loads(dsbert("status", str(run_dir), "--json").stdout)[0]["loss"] == 2.0


def test_one_bad_run_hides_no_other(run: Path, tmp_path: Path) -> None:
    """Links are followed, also round in circles; what has no records is named."""
    (tmp_path / "far").symlink_to(run)
    (tmp_path / "round").symlink_to(tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "attempts.jsonl").touch()
    (tmp_path / "far.sbatch").touch()
    done = dsbert("runs", str(tmp_path))
    assert done.returncode == 0
    assert done.stdout.count("done") == 1
    assert "left out: expected a run in" in done.stderr
    assert dsbert("watch", str(tmp_path / "far"), str(tmp_path / "far.sbatch")).returncode == 0


def test_what_files_say_is_printed_in_lines(tmp_path: Path) -> None:
    """Neither escapes nor lines of their own, and at 80 columns."""
    run_dir = written(tmp_path / "run", [{"number": 1, "nonce": "a", "started": time.time() - 500}])
    beat(run_dir, "a", 1.0, host="\x1b[2Jevil\nhost", ended={"code": 3, "cause": "a cause " * 40})
    lines = list(status_lines(read_status(run_dir)))
    assert "\x1b" not in "".join(lines)
    assert all("\n" not in line and len(line) <= 80 for line in lines)


def test_no_run_is_one_line(tmp_path: Path) -> None:
    assert "expected a run in" in complaint(dsbert("status", str(tmp_path)))
    assert "expected runs below" in complaint(dsbert("runs", str(tmp_path)))


def test_a_table_fits_a_terminal(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    rows = dsbert("runs", ".").stdout.splitlines()
    assert rows[0].split() == ["run", "state", "step", "%", "left", "loss", "tokens/s", "good", "again"]
    assert rows[1].split()[:4] == ["small", "done", "12", "100"]
    assert all(len(row) <= 80 for row in rows)
    assert all(len(line) <= 80 for line in status_lines(read_status(Path("small"))))
    assert "small: done" in dsbert("watch", "small").stdout


def test_curves() -> None:
    assert sparkline([1.0, 2.0, 8.0]) == "▁▂█"
    assert sparkline([3.0, 3.0]) == "▁▁"
    values = [float(number) for number in range(100)]
    assert thinned(values, 30)[0] == 0
    assert thinned(values, 30)[-1] == 99
    assert len(thinned(values, 30)) == 30


def test_the_first_lines_say_what_is_trained_where(run: Path, data: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = ["pretrain", "demo", "--nproc", "2", "--run-dir", str(tmp_path / "run"), f"data.path={data}", *SMALL]
    with log.open("wb") as file:
        subprocess.run([sys.executable, "-m", "dsbert", *words], env=ENVIRONMENT, stderr=file, check=True)
    lines = log.read_text().splitlines()
    (ranks,) = (line for line in lines if line.startswith("dsbert: ranks: 2 on "))
    assert "(cpu, 1 thread each)" in ranks
    assert "parameters, 3,072 of them in blocks" in ranks
    assert f"dsbert: records: {tmp_path / 'run' / 'metrics.jsonl'}, W&B off, log {log}; " in "\n".join(lines)
    assert sum("step 1 of 12  loss" in line for line in lines) == 1
    assert sum("step 12 of 12  loss" in line for line in lines) == 1
