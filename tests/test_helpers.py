"""The harness itself: a distributed test must not be able to pass, or to hang, by accident."""

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import run_distributed


def describe_rank(greeting: str) -> dict[str, Any]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "OMP_NUM_THREADS")
    return {"greeting": greeting, "port": os.environ["MASTER_PORT"], **{name: os.environ[name] for name in names}}


def fail_on_rank_1() -> None:
    print(f"rank {os.environ['RANK']} was here")
    assert os.environ["RANK"] != "1", "rank 1 does not agree"


def fail_while_the_other_waits() -> None:
    assert os.environ["RANK"] != "1", "rank 1 does not agree"
    print("rank 0 waits for rank 1", flush=True)
    time.sleep(60)


def hang_with_a_child(pid_file: str) -> None:
    child = subprocess.Popen(["sleep", "60"])
    Path(pid_file).write_text(str(child.pid))
    child.wait()


def return_what_has_no_json_form() -> object:
    return object()


def test_returns_the_value_of_each_rank() -> None:
    values = run_distributed(describe_rank, world_size=2, args={"greeting": "hello"})
    assert [value["RANK"] for value in values] == ["0", "1"]
    assert [value["LOCAL_RANK"] for value in values] == ["0", "1"]
    assert len({value["port"] for value in values}) == 1
    for value in values:
        assert value["greeting"] == "hello"
        assert value["WORLD_SIZE"] == "2"
        assert value["MASTER_ADDR"] == "127.0.0.1"
        assert value["OMP_NUM_THREADS"] == "1"


def test_a_failing_rank_fails_the_test_and_is_shown() -> None:
    with pytest.raises(AssertionError) as caught:
        run_distributed(fail_on_rank_1, world_size=2)
    message = str(caught.value)
    assert "failed on 1 of 2 ranks" in message
    assert "rank 1 does not agree" in message
    assert "rank 1 was here" in message
    assert "rank 0 was here" not in message


def test_a_rank_that_waits_for_a_failed_one_is_ended() -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError) as caught:
        run_distributed("tests.test_helpers:fail_while_the_other_waits", world_size=2, grace=1.0)
    assert time.monotonic() - start < 20
    message = str(caught.value)
    assert "rank 1 does not agree" in message
    assert "after rank 1 had failed: killed" in message
    assert "rank 0 waits for rank 1" in message


def test_a_hang_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with pytest.raises(AssertionError, match=r"still running after 1\.5 s: killed"):
        run_distributed(hang_with_a_child, world_size=1, args={"pid_file": str(pid_file)}, timeout=1.5)
    status = Path("/proc") / pid_file.read_text() / "status"
    deadline = time.monotonic() + 5
    while status.exists() and "\tZ" not in status.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not status.exists() or "\tZ" in status.read_text()


def test_a_value_without_json_form_fails() -> None:
    with pytest.raises(AssertionError, match="not JSON serializable"):
        run_distributed(return_what_has_no_json_form, world_size=1)
