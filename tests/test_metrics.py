"""metrics.jsonl, and a W&B that may be broken in any way without costing the run a step."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsbert import metrics
from dsbert.jsonl import JsonlFile
from dsbert.metrics import WandbLogger

# A wandb that writes down what it is asked for.
FAKE = """
import json, os
class Settings(dict):
    def __init__(self, **kwargs): super().__init__(kwargs)
class Run:
    def note(self, *what):
        with open(os.environ["FAKE_WANDB_LOG"], "a") as file: file.write(json.dumps(what) + "\\n")
    def define_metric(self, *names, **axes): self.note("define", *names, axes)
    def log(self, record): self.note("log", record)
    def finish(self): self.note("finish")
def init(**options):
    Run().note("init", options)
    print("wandb: chatter")
    return Run()
"""
BROKEN = {
    "import fails": "raise RuntimeError('no\\nluck')",
    "import exits": "raise SystemExit(7)",
    "init fails": "def Settings(**_): pass\ndef init(**_):\n    print('chatter')\n    raise OSError('no server')",
    "process dies": "import os; os._exit(9)",
    "hangs": "import time; time.sleep(60)",
}


def use_wandb(monkeypatch: pytest.MonkeyPatch, folder: Path, source: str) -> None:
    """Have `import wandb` find this module, here and in processes started from here."""
    (folder / "fake").mkdir()
    (folder / "fake" / "wandb.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(folder / "fake"), prepend=os.pathsep)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def make_logger(run_dir: Path, enabled: bool = True) -> WandbLogger:
    return WandbLogger(run_dir, {"optim": {"lr": 0.1}}, project="dsbert", name="demo", enabled=enabled)


def test_metrics_round_trip_and_resume(tmp_path: Path) -> None:
    writer = JsonlFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        writer.append({"step": step, "loss": math.nan})
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[0] == '{"step": 1, "loss": null}'
    assert writer.cut_back(1, attempt=2) == 2
    writer.append({"step": 2, "loss": 0.5})
    writer.close()
    assert writer.read() == [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}]
    assert (tmp_path / "metrics.2.jsonl").read_text().count("\n") == 2


def test_only_the_enabled_logger_touches_the_disk(tmp_path: Path) -> None:
    logger = make_logger(tmp_path, enabled=False)
    logger.log({"step": 1})
    logger.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "key"}, "online"),
        ({"WANDB_API_KEY": "key", "WANDB_MODE": "offline"}, "offline"),
    ],
)
def test_what_wandb_is_asked_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    environment: dict[str, str],
    mode: str,
) -> None:
    use_wandb(monkeypatch, tmp_path, FAKE)
    monkeypatch.setenv("FAKE_WANDB_LOG", str(tmp_path / "calls.jsonl"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    logger = make_logger(tmp_path)
    logger.log({"step": 1, "loss": 0.5, "val_loss": math.nan})
    logger.close(30)
    calls = (tmp_path / "calls.jsonl").read_text().splitlines()
    assert f'"mode": "{mode}"' in calls[0]
    assert '"resume": "allow"' in calls[0]
    assert f'"id": "{(tmp_path / "wandb_id").read_text()}"' in calls[0]
    assert '"config": {"optim": {"lr": 0.1}}' in calls[0]
    assert calls[1:] == [
        '["define", "step", {}]',
        '["define", "*", {"step_metric": "step"}]',
        '["log", {"step": 1, "loss": 0.5}]',
        '["finish"]',
    ]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_wandb_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fault: str
) -> None:
    use_wandb(monkeypatch, tmp_path, BROKEN[fault])
    start = time.monotonic()
    logger = make_logger(tmp_path)
    for step in range(100):
        logger.log({"step": step, "loss": 0.5})
    assert time.monotonic() - start < 0.5
    logger.close(0.5 if fault == "hangs" else 30)
    logger.close()
    logger.log({"step": 101})
    assert logger._child is not None
    assert logger._child.wait(10) != 0
    assert time.monotonic() - start < 10
    captured = capfd.readouterr()
    expected = {
        "import fails": "RuntimeError: no luck",
        "import exits": "SystemExit: 7",
        "init fails": "OSError: no server",
        "process dies": "ended with 9",
        "hangs": "did not finish within 0.5 s",
    }[fault]
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    assert expected in captured.err


def test_a_full_queue_drops_the_oldest_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    use_wandb(monkeypatch, tmp_path, BROKEN["hangs"])
    monkeypatch.setattr(metrics, "QUEUE_RECORDS", 10)
    logger = make_logger(tmp_path)
    payload = "x" * 100_000  # more than a pipe takes
    start = time.monotonic()
    for step in range(50):
        logger.log({"step": step, "payload": payload})
    assert time.monotonic() - start < 1
    assert 35 <= logger.dropped <= 40
    logger.close(0.2)
    assert capfd.readouterr().err.count("\n") == 1


def test_what_cannot_be_sent_costs_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    use_wandb(monkeypatch, tmp_path, FAKE)
    monkeypatch.setenv("FAKE_WANDB_LOG", str(tmp_path / "calls.jsonl"))
    logger = make_logger(tmp_path)
    logger.log({"step": 1, "what": object()})
    logger.log({"step": 2})
    logger.close(30)
    assert '["log", {"step": 2}]' in (tmp_path / "calls.jsonl").read_text()
    assert "a record was left out" in capfd.readouterr().err


def test_the_process_ends_soon_after_the_run_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_wandb(monkeypatch, tmp_path, FAKE)
    calls = tmp_path / "calls.jsonl"
    program = """
import os, pathlib, signal, sys, time
from dsbert.metrics import WandbLogger
logger = WandbLogger(pathlib.Path(sys.argv[1]), {}, "dsbert", "demo", True)
logger.log({"step": 1})
while "log" not in (calls.read_text() if (calls := pathlib.Path(os.environ["FAKE_WANDB_LOG"])).exists() else ""):
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"FAKE_WANDB_LOG": str(calls)}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, timeout=30)
    deadline = time.monotonic() + 10
    while '["finish"]' not in calls.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert '["finish"]' in calls.read_text()


def test_real_wandb_offline_keeps_the_run_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for _ in range(2):
        logger = make_logger(tmp_path)
        logger.log({"step": 1, "loss": 0.5})
        logger.close(60)
    run_id = (tmp_path / "wandb_id").read_text()
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == [f"run-{run_id}.wandb"] * 2
    assert all(file.stat().st_size > 100 for file in files)
    assert capfd.readouterr() == ("", "")
