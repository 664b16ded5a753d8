"""The command for a machine with a card, without one: all of its way but the clock, and what comes of a cut-off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from dsbert.sparse.kernels.index import PRODUCTS
from tests.text import write_corpus
from tools import carry_wheels
from tools.card_records import add, read
from tools.card_suite import SHARES, Suite
from tools.card_tables import render

ROOT = Path(__file__).parent.parent


def card_suite(*words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tools/card_suite.py", *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1150, check=False)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a minute, unless the machine is busy
def test_a_dry_run(tmp_path: Path) -> None:
    """Every stage ends well, and says what it is there to say."""
    write_corpus(tmp_path / "corpus.txt", num_documents=60)
    words = ["--dry-run", "--minutes", "19", "--text", str(tmp_path / "corpus.txt")]
    done = card_suite("--out", str(tmp_path / "out"), *words)
    rows = read(tmp_path / "out" / "suite.jsonl")
    outcomes = {row["of"]: (row["outcome"], row["why"]) for row in rows if row["kind"] == "outcome"}
    log = (tmp_path / "out" / "log.txt").read_text()
    assert done.returncode == 0, (outcomes, log[-4000:])
    assert outcomes.pop("tests") == ("skipped", "no CUDA device: all tests were skipped")
    assert outcomes == {name: ("done", "") for name in SHARES if name != "tests"}
    assert (tmp_path / "out" / "tables.md").read_text() == done.stdout.removesuffix("\n")

    def of(kind: str) -> list[dict[str, Any]]:
        return [row for row in rows if row["kind"] == kind]

    assert {(row["product"], row["dtype"]) for row in of("check") if row["passed"]} == {
        (product, dtype) for product in (*PRODUCTS, "gelu") for dtype in ("float32", "float16", "bfloat16")
    }
    assert [row["outcome"] for row in of("test")] == ["skipped"] * 4
    # The interpreter runs the peer's kernels as well: what they return is what ours is compared with.
    products = of("product")
    assert {(row["product"], row["backend"]) for row in products} >= {
        (product, backend) for product in PRODUCTS for backend in ("dense", "triton", "triton_tuned")
    }
    assert {row["product"] for row in products if row["backend"] in ("torch_bsr", "torchao")} == set(PRODUCTS)
    assert all(row["rel_error"] < 1e-3 for row in products), products
    assert {row["product"] for row in of("launch") if row["rank"] == 0} == set(PRODUCTS)
    (step,) = of("step")
    assert step["sparse_tflop"] < step["dense_tflop"]
    assert step["transformers_step_s"] > 0
    (run,) = of("run")
    assert run["exit_code"] == 75
    assert run["difference"] == 0.0  # the steps that were taken again are the same to the last bit
    assert run["resumed_after"] < run["killed_at"] < run["last_step"]
    # It may have taken more steps between the look at it and its end.
    assert run["taken_again"] >= run["killed_at"] - run["resumed_after"] > 0
    again = [row["step"] for row in of("progress") if row["attempt"] == 2]
    assert again == list(range(run["resumed_after"] + 1, run["last_step"] + 1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_card_is_said_so(tmp_path: Path) -> None:
    done = card_suite("--out", str(tmp_path / "none"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "card_suite: expected a CUDA device, found none; --dry-run needs none\n"
    assert not (tmp_path / "none").exists()


def test_what_is_cut_off_loses_only_what_is_to_come(tmp_path: Path) -> None:
    """A stage that hangs is ended with all that it has started; its lines stay, and the next stage runs."""
    suite = Suite(tmp_path, dict(os.environ), time.monotonic() + 60)
    line = {"stage": "tests", "kind": "test", "test": "one", "outcome": "passed"}
    hang = (
        "import subprocess, sys, time; child = subprocess.Popen(['sleep', '600']); "
        f"open({str(suite.records)!r}, 'a').write({json.dumps(line)!r}.replace('one', str(child.pid)) + chr(10)); "
        "sys.stdout.flush(); time.sleep(600)"
    )
    assert suite.run("tests", [sys.executable, "-c", hang], 3.0) == "cut off"
    test, outcome = read(suite.records)
    assert outcome["outcome"] == "cut off"
    assert outcome["seconds"] >= 3.0
    assert not psutil.pid_exists(int(test["test"])) or psutil.Process(int(test["test"])).status() == "zombie"
    assert f"| {test['test']} | passed |" in (tmp_path / "tables.md").read_text()
    assert suite.run("steps", [sys.executable, "-c", "print('the last word'); raise SystemExit(1)"], 30.0) == "failed"
    assert suite.run("parity", [sys.executable, "-c", "pass"], 30.0) == "done"
    assert [row.get("why") for row in read(suite.records)[2:]] == ["the last word", ""]
    assert not suite.sound


def test_time_that_is_not_needed_goes_to_those_behind(tmp_path: Path) -> None:
    suite = Suite(tmp_path, {}, time.monotonic() + 600)
    names = list(SHARES)
    first = suite.limit_s(names[0], names)
    assert first == pytest.approx(600 * SHARES[names[0]] / sum(SHARES.values()), rel=0.01)
    assert suite.limit_s(names[-1], names[-1:]) == pytest.approx(600, rel=0.01)
    assert suite.limit_s(names[1], names[1:]) > 600 * SHARES[names[1]] / sum(SHARES.values())


def test_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "suite.jsonl"
    add(path, {"kind": "check", "rel_error": float("nan")})
    with path.open("a") as file:
        file.write('{"kind": "che')
    assert read(path) == [{"kind": "check", "rel_error": None}]


def test_the_page_of_what_went_wrong() -> None:
    """Errors that are no number, products without figures, a run that never came back."""
    check = {"stage": "parity", "kind": "check", "dtype": "bfloat16", "product": "dgrad"}
    product = {"stage": "products", "kind": "product", "layer": "QKV", "hidden": 768, "block": 64, "product": "wgrad"}
    page = render(
        [
            {"stage": "suite", "kind": "suite", "device": "a card", "versions": {"torch": "2"}},
            {"stage": "parity", "kind": "rates", "bf16_tflop_s": 500.0},
            {**check, "rel_error": None, "passed": False},
            {**check, "rel_error": 0.004, "passed": True},
            {**product, "backend": "triton", "error": "out of resource"},
            {"stage": "training", "kind": "run", "killed_at": 7, "last_step": 7, "exit_code": 1},
        ]
    )
    assert page.startswith("# a card\n")
    assert "| bfloat16 | dgrad | 2 | 1 | 0.004 |" in page
    assert "| QKV |  |  | 64 | wgrad | triton | out of resource |" in page
    assert "Killed at step 7, resumed after step None" in page
    assert "with exit code 1" in page


def test_mfu_is_the_share_of_what_the_card_does() -> None:
    step = {
        "stage": "steps", "kind": "step", "recipe": "bert-base", "block": 64, "dtype": "bf16", "batch": 128, "seq": 128,
        "dense_step_s": 0.1, "sparse_step_s": 0.05, "speedup": 2.0, "dense_tflop": 20.0, "sparse_tflop": 2.5,
        "kernels": ["kernels: all"], "breakdown": {},
    }  # fmt: skip
    page = render([{"stage": "parity", "kind": "rates", "bf16_tflop_s": 500.0}, step])
    assert "| 40.0% | 10.0% | kernels: all |" in page


def test_what_is_carried() -> None:
    """All that training imports, but for what is there; the other Python's markers decide, not this one's."""
    wanted = carry_wheels.needed("3.12", {})
    assert {"deepspeed", "hjson", "pydantic", "pydantic-core", "xxhash", "sentencex", "backports-zstd"} <= wanted.keys()
    assert not wanted.keys() & (carry_wheels.KEPT | carry_wheels.NOT_NEEDED | {"sympy", "pandas", "httpx"})
    assert "backports-zstd" not in carry_wheels.needed("3.14", {})
    there = {"pydantic": "2.14.0", "filelock": "3.20.0", "msgpack": "1.0"}
    less = carry_wheels.needed("3.12", there)
    gone = wanted.keys() - less.keys()
    assert {"pydantic", "pydantic-core", "annotated-types", "msgpack"} <= gone
    assert "filelock" not in gone  # 3.20 will not do
    assert "deepspeed" not in gone


def test_lines_of_pip_freeze(tmp_path: Path) -> None:
    (tmp_path / "freeze").write_text("PyYAML==6.0.2\n-e git+https://example.org/x\ntorch @ file:///x\nzstd_x==1\n")
    assert carry_wheels.installed_there(tmp_path / "freeze") == {"pyyaml": "6.0.2", "zstd-x": "1"}
