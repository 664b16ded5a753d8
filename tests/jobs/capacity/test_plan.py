"""`dsbert plan` as a user meets it: figures, checks, mistakes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dsbert.jobs.capacity.cards import CARDS
from tests.commands import SMALL, complaint, dsbert, dsbert_process

WHERE = ("--nodes", "1", "--gpus-per-node", "2")
PARTS = ("memory of a rank", "a step", "wire", "time", "saves", "the run")


def planned(*words: str, code: int = 0) -> dict[str, Any]:
    done = dsbert("plan", *words, "--json")
    assert done.returncode == code, done.stderr or done.stdout
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_figure_says_how_it_is_known(data: Path, tmp_path: Path) -> None:
    words = ("demo", f"data.path={data}", *SMALL, *WHERE, "--run-dir", str(tmp_path / "r"))
    found = planned(*words)
    assert found["can_work"] is True
    figures = {(part, name): figure for part in PARTS for name, figure in found[part].items()}
    for place, figure in figures.items():
        assert figure["kind"] in ("measured", "computed", "estimated"), place
        assert figure["how"], place
        assert math.isfinite(figure["value"]), place
    # Of a card nobody has measured: its seconds are estimates, and so is all that follows from them.
    assert {figure["kind"] for name, figure in found["time"].items()} == {"estimated"}
    assert found["the run"]["hours"]["kind"] == "estimated"
    assert found["memory of a rank"]["weights"]["kind"] == "computed"
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    text = dsbert("plan", *words).stdout
    for part in PARTS:
        assert f"\n{part}" in text
    assert "sqrt(2 delta M)" in text


def test_a_checkpoint_is_as_large_as_was_planned(data: Path, run: Path, tmp_path: Path) -> None:
    found = planned("demo", f"data.path={data}", *SMALL, *WHERE, "--run-dir", str(tmp_path / "r"))
    files = [path for path in (run / "checkpoints" / "step_00000012").iterdir() if path.suffix == ".safetensors"]
    size = sum(path.stat().st_size for path in files)
    assert found["saves"]["checkpoint"]["value"] == pytest.approx(size, rel=0.05)


def test_tokens_of_a_step_are_those_of_the_run(data: Path, run: Path, tmp_path: Path) -> None:
    found = planned("demo", f"data.path={data}", *SMALL, *WHERE, "--run-dir", str(tmp_path / "r"))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tokens, flops = (records[-1][name] / 12 for name in ("tokens_total", "flops_total"))
    assert found["a step"]["tokens"]["value"] == pytest.approx(tokens, rel=0.05)
    assert found["a step"]["model FLOPs"]["value"] == pytest.approx(flops, rel=0.05)
    assert found["the run"]["epochs"]["value"] == pytest.approx(144 / found_samples(data), rel=1e-6)


def found_samples(data: Path) -> int:
    report = dsbert("data", str(data), "--seq-len", "24", "--json")
    return int(json.loads(report.stdout)["splits"]["train"]["spans"])


@pytest.mark.parametrize("case", ["data", "identity", "file in the way", "blocks"])
def test_what_submit_refuses_a_plan_shows(case: str, data: Path, run: Path, tmp_path: Path) -> None:
    """By the same words, from the same functions."""
    words, run_dir = ["demo", f"data.path={data}", *SMALL], tmp_path / "r"
    if case == "data":
        words[1] = f"data.path={tmp_path / 'none'}"
    if case == "identity":
        words, run_dir = [*words, "seed=2"], run
    if case == "file in the way":
        run_dir.write_text("")
    if case == "blocks":
        words = [*words, "model.intermediate_size=100", "sparsity.allow_density_error=true"]
    submitted = dsbert("submit", *words, "--nodes", "1", "--time", "60", "--run-dir", str(run_dir))
    said = complaint(submitted).removeprefix("dsbert: ")
    if case == "blocks":  # of which no model can be made, and so no plan
        assert "expected a block size that divides" in said
        assert "block_size" in complaint(dsbert("plan", *words, *WHERE, "--run-dir", str(run_dir)))
        return
    found = planned(*words, *WHERE, "--run-dir", str(run_dir), code=2)
    failed = [check["text"] for check in found["checks"] if check["verdict"] == "fail"]
    assert failed == [said]
    assert found["can_work"] is False


def test_memory_that_does_not_suffice(data: Path, tmp_path: Path) -> None:
    card = tmp_path / "small.yaml"
    values = CARDS["a100"].model_dump() | {"memory_bytes": 2.2e9}
    card.write_text("\n".join(f"{key}: {value}" for key, value in values.items() if key not in ("name", "source")))
    words = ("bert-base", f"data.path={data}", *WHERE, "--card", str(card), "--run-dir", str(tmp_path / "r"))
    found = planned(*words, code=2)
    (failed,) = [check for check in found["checks"] if check["verdict"] == "fail"]
    largest = round(found["memory of a rank"]["micro-batch that fits"]["value"])
    assert failed["text"].endswith(f"lower it to {largest}")
    fits = planned(*words, f"batch.micro_batch={largest}")
    assert fits["memory of a rank"]["needed"]["value"] <= 2.2e9
    assert planned(*words, f"batch.micro_batch={largest + 1}", code=2)["can_work"] is False


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("demo", "--nodes", "33", "--gpus-per-node", "1"), "at least one sample for each of 33 ranks"),
        (("demo", *WHERE, "--card", "h999"), "expected h100, a100, cpu or a YAML file as --card, found 'h999'"),
        (("demo", *WHERE, "modle.hidden_size=3"), "modle"),
        (("no-such-recipe", *WHERE), "no-such-recipe"),
        (("demo", *WHERE, "sparsity.low_rank=4000"), "sparsity.low_rank"),
        (("demo", *WHERE, "deepspeed.config=zero9"), "deepspeed.config"),
    ],
)
def test_a_mistake_is_one_line(words: tuple[str, ...], said: str) -> None:
    assert said in complaint(dsbert("plan", *words))


def test_a_card_with_a_key_that_nobody_knows(tmp_path: Path) -> None:
    card = tmp_path / "card.yaml"
    card.write_text("memory_byte: 80e9\n")
    said = complaint(dsbert("plan", "demo", *WHERE, "--card", str(card)))
    assert "memory_bytes" in said


def test_more_failures_leave_less_goodput(data: Path, tmp_path: Path) -> None:
    where = ("--nodes", "64", "--gpus-per-node", "8", "--run-dir", str(tmp_path / "r"))
    words = ("bert-base", f"data.path={data}", *where)
    runs = [planned(*words, "--mtbf", hours)["the run"] for hours in ("100000", "1000", "20")]
    goodput = [run["goodput"]["value"] for run in runs]
    best = [run["best save interval"]["value"] for run in runs]
    assert goodput == sorted(goodput, reverse=True)
    assert best == sorted(best, reverse=True)
    assert runs[2]["goodput at it"]["value"] >= goodput[2]
    assert runs[1]["interruptions"]["value"] == pytest.approx(runs[1]["hours"]["value"] * 64 / 1000, rel=1e-6)


@pytest.mark.slow
def test_this_machine_is_timed(data: Path, tmp_path: Path) -> None:
    done = dsbert_process(
        "plan", "demo", f"data.path={data}", *SMALL, *WHERE, "--card", "cpu", "--run-dir", str(tmp_path / "r"), "--json"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    time = found["time"]
    for name in (
        "forward and backward",
        "optimizer and copies",
        "gradients on the wire",
        "step",
        "mask update",
        "peak",
    ):
        assert time[name]["kind"] == "measured", name
        assert 0 < time[name]["value"] < math.inf, name
    assert found["saves"]["published after"]["kind"] == "measured"
    assert found["the run"]["hours without failures"]["value"] > 12 * time["step"]["value"] / 3600
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
