"""metrics.jsonl, and a W&B that may be broken in any way without costing the run a step."""

import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dsbert.base.jsonl import JsonlFile
from dsbert.training.metrics import WandbLogger
from dsbert.training.wandb_file import steps_on_disk

# A wandb that writes down what it is asked for. Its server knows the run up to the step that the environment says.
FAKE = """
import json, os
class Settings(dict):
    def __init__(self, **kwargs): super().__init__(kwargs)
class Run:
    class settings: base_url = "http://127.0.0.1:9"
    url, starting_step = "http://127.0.0.1:9/demo", 0
    summary = json.loads(os.environ.get("FAKE_WANDB_SUMMARY", "{}"))
    def note(self, *what):
        with open(os.environ["FAKE_WANDB_LOG"], "a") as file: file.write(json.dumps(what) + "\\n")
    def define_metric(self, *names, **axes): self.note("define", *names, axes)
    def log(self, record, step, commit): self.note("log", step, record)
    def finish(self, exit_code): self.note("finish", exit_code)
def init(**options):
    Run().note("init", options)
    print("wandb: chatter")
    return Run()
"""
BROKEN = {
    "not installed": "raise ModuleNotFoundError(\"No module named 'wandb'\", name='wandb')",
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
    if enabled:
        config = {"recipe": {"optim": {"lr": 0.1}, "log": {"wandb_project": "mine", "wandb_group": "sweep"}}}
        (run_dir / "config.yaml").write_text(json.dumps({**config, "git_revision": "abc", "versions": {"torch": "2"}}))
    return WandbLogger(run_dir, enabled=enabled)


def write_metrics(run_dir: Path, *records: dict[str, object]) -> None:
    file = JsonlFile(run_dir / "metrics.jsonl")
    for record in records:
        file.append(record)
    file.close()


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


@pytest.mark.parametrize("environment", [{"WANDB_API_KEY": "key"}, {"WANDB_MODE": "online"}])
def test_what_wandb_is_asked_for_online(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], environment: dict[str, str]
) -> None:
    use_wandb(monkeypatch, tmp_path, FAKE)
    monkeypatch.setenv("FAKE_WANDB_LOG", str(tmp_path / "calls.jsonl"))
    monkeypatch.setenv("FAKE_WANDB_SUMMARY", '{"step": 2}')
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    write_metrics(tmp_path, {"step": 1}, {"step": 2}, {"step": 3, "loss": 0.25})
    logger = make_logger(tmp_path)
    write_metrics(tmp_path, {"step": 4, "loss": 0.5, "val_loss": math.nan})
    logger.close(30)
    calls = (tmp_path / "calls.jsonl").read_text().splitlines()
    assert '"mode": "online"' in calls[0]
    assert '"resume": "allow"' in calls[0]
    assert f'"id": "{(tmp_path / "wandb_id").read_text()}"' in calls[0]
    asked = json.loads(calls[0])[1]
    assert (asked["name"], asked["project"], asked["group"]) == (tmp_path.name, "mine", "sweep")
    assert asked["config"]["optim"] == {"lr": 0.1}
    assert asked["config"]["git_revision"] == "abc"
    assert calls[1:] == [
        '["define", "step", {}]',
        '["define", "*", {"step_metric": "step"}]',
        '["log", 3, {"step": 3, "loss": 0.25}]',
        '["log", 4, {"step": 4, "loss": 0.5}]',
        '["finish", 0]',
    ], "what the server does not have, and nothing twice"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_wandb_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fault: str
) -> None:
    use_wandb(monkeypatch, tmp_path, BROKEN[fault])
    monkeypatch.setenv("WANDB_MODE", "online")
    start = time.monotonic()
    logger = make_logger(tmp_path)
    for step in range(100):
        logger.log({"step": step, "loss": 0.5})
    assert time.monotonic() - start < 0.5
    assert logger._sender is not None
    logger._sender._thread.join(0.1 if fault == "hangs" else 30)
    logger.close(0.5 if fault == "hangs" else 30)
    logger.close()
    logger.log({"step": 101})
    assert logger._sender._child is not None
    assert logger._sender._child.wait(10) != 0
    assert time.monotonic() - start < 10
    captured = capfd.readouterr()
    expected = {
        "not installed": "W&B: wandb is not installed: pip install 'dsbert[wandb]'. The run goes on; metrics",
        "import fails": "RuntimeError: no luck. The run goes on; metrics.jsonl has everything",
        "import exits": "SystemExit: 7. The run goes on",
        "init fails": "OSError: no server. The run goes on",
        "process dies": "ended with 9. The run goes on",
        "hangs": "did not finish within 0.5 s. metrics.jsonl has everything",
    }[fault]
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    assert expected in captured.err


def test_a_server_that_cannot_be_reached_delays_the_end_by_five_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    with socket.create_server(("127.0.0.1", 0)) as server:  # it takes connections, and never answers
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        logger = make_logger(tmp_path)
        write_metrics(tmp_path, {"step": 1})
        server.accept()[0].close()
        start = time.monotonic()
        logger.close()
        assert time.monotonic() - start < 6
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(
        "dsbert: W&B: it did not finish within 5 s. metrics.jsonl has everything, and the next start"
    )


@pytest.mark.slow
def test_a_run_that_is_done_before_wandb_has_started_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The server answers, and so it is worth waiting for longer than for one that is away."""
    slow = FAKE.replace("def init(**options):\n", "def init(**options):\n    import time; time.sleep(6)\n")
    use_wandb(monkeypatch, tmp_path, slow)
    monkeypatch.setenv("FAKE_WANDB_LOG", str(tmp_path / "calls.jsonl"))
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("WANDB_MODE", "online")
        logger = make_logger(tmp_path)
        write_metrics(tmp_path, {"step": 1})
        logger.close()
        server.shutdown()
    assert (tmp_path / "calls.jsonl").read_text().splitlines()[-2:] == ['["log", 1, {"step": 1}]', '["finish", 0]']
    assert capfd.readouterr().err.count("W&B") == 0


def test_the_process_ends_soon_after_the_run_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_wandb(monkeypatch, tmp_path, FAKE)
    (tmp_path / "config.yaml").write_text("recipe: {}")
    calls = tmp_path / "calls.jsonl"
    program = """
import os, pathlib, signal, sys, time
from dsbert.training.metrics import WandbLogger
logger = WandbLogger(pathlib.Path(sys.argv[1]), True)
while "init" not in (calls.read_text() if (calls := pathlib.Path(os.environ["FAKE_WANDB_LOG"])).exists() else ""):
    time.sleep(0.01)
(pathlib.Path(sys.argv[1]) / "metrics.jsonl").write_text('{"step": 1}\\n')
os.kill(os.getpid(), signal.SIGKILL)
"""
    paths = os.pathsep.join([str(tmp_path / "fake"), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": paths, "FAKE_WANDB_LOG": str(calls)}
    environment["WANDB_MODE"] = "online"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, timeout=30)
    deadline = time.monotonic() + 10
    while '["finish", 0]' not in calls.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert calls.read_text().splitlines()[-2:] == ['["log", 1, {"step": 1}]', '["finish", 0]']


def test_offline_files_hold_each_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever the starts before have left: records that never came, steps that are taken again, a torn end."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    make_logger(tmp_path).close()
    assert not (tmp_path / "wandb").exists(), "a start without a step leaves no file"
    first = make_logger(tmp_path)
    for step in (1, 2, 3):
        first.log({"step": step, "loss": 1 / step, "text": "x" * 20_000, "dof": math.nan})
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    with file.open("ab") as torn:
        torn.write(file.read_bytes()[-100:])
    (tmp_path / "wandb" / "offline-run-20200101_000000-old").mkdir()
    header = tmp_path / "wandb" / "offline-run-20200101_000000-old" / "run-old.wandb"
    header.write_bytes(file.read_bytes()[:7])
    write_metrics(tmp_path, {"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "loss": 4.0}, {"step": None})
    second = make_logger(tmp_path)
    assert not header.exists(), "it would keep `wandb sync` from sending the others"
    second.log({"step": 3})
    second.log({"step": 5})
    second.close()
    assert steps_on_disk(tmp_path / "wandb") == {1, 2, 3, 4, 5}
    data = [path.read_bytes() for path in sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))]
    assert [one.count(b"\x12\x04step\x82\x01") for one in data] == [6, 4], "in history and summary, each step once"
    counted = [re.findall(rb"\x12\x05_step\x82\x01.([0-9])", one, re.DOTALL) for one in data]
    assert [[int(step) for step in steps] for steps in counted] == [[1, 1, 2, 2, 3, 3], [4, 4, 5, 5]]
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_under_an_offline_file_is_one_warning(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("recipe: {}")
    program = """
import pathlib, resource, sys
from dsbert.training.metrics import WandbLogger
from dsbert.training.wandb_file import steps_on_disk
run_dir = pathlib.Path(sys.argv[1])
logger = WandbLogger(run_dir, True)
logger.log({"step": 1})
(file,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
resource.setrlimit(resource.RLIMIT_FSIZE, (size := file.stat().st_size + 100, size))
for step in range(2, 5):
    logger.log({"step": step})
logger.close()
assert steps_on_disk(run_dir / "wandb") == {1}
assert file.stat().st_size == size - 100, "what does not fit is taken back"
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "WANDB_MODE": "offline"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, env=environment, timeout=30, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    assert "File too large. The run goes on; metrics.jsonl has everything" in done.stderr
