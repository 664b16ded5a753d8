"""A run becomes a classifier: every kind of task learns, patterns do as they are told, and what is written is what was
found. The command runs in this process, but where it is killed or starts ranks (test_ranks.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from dsbert.checkpoint.restore import restore_model
from tests.commands import complaint, dsbert
from tests.hf.finetuning.made_tasks import make_task

QUICK = ("learning_rate=1e-2", "num_train_epochs=4", "--batch-size", "16")
LONGER = ("learning_rate=3e-3", "num_train_epochs=6")


def fine_tuned(model: Path, task: Path | str, to: Path, *words: str) -> dict[str, Any]:
    done = dsbert("finetune", str(model), "--task", str(task), "--to", str(to), *QUICK, *words, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def coordinates(path: Path) -> dict[str, torch.Tensor]:
    found = load_file(path / "model.safetensors")
    return {name.removeprefix("bert."): x for name, x in found.items() if name.endswith((".rows", ".cols"))}


@pytest.fixture(scope="module")
def classified(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("classified")
    return folder / "out", fine_tuned(run, make_task(folder, "classes"), folder / "out", *LONGER)


def test_a_run_becomes_a_classifier(run: Path, classified: tuple[Path, dict[str, Any]]) -> None:
    to, metrics = classified
    assert (metrics["task"], metrics["pattern"], metrics["kind"]) == ("classes", "keep", "classification")
    assert metrics["test"]["accuracy"] > 0.9
    assert metrics["steps"] == 6 * 12
    # Its blocks stand where the run had them, and nothing else is there.
    layers = restore_model(run).layers
    found = coordinates(to)
    assert len(found) == 2 * len(layers) > 0
    for name, layer in layers.items():
        assert torch.equal(found[f"{name.removeprefix('bert.')}.rows"], layer.rows)
        assert torch.equal(found[f"{name.removeprefix('bert.')}.cols"], layer.cols)
    assert metrics["density"] == pytest.approx(0.25, abs=0.05)
    assert not (to / "checkpoints").exists()
    assert (to / "confusion_test.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_written_is_what_was_found(classified: tuple[Path, dict[str, Any]]) -> None:
    to, metrics = classified
    rows = lines(to / "predictions_test.jsonl")
    assert [row["id"] for row in rows] == list(range(40))
    hits = [row["prediction"] == row["label"] for row in rows]
    assert metrics["test"]["accuracy"] == pytest.approx(sum(hits) / len(hits))
    written = json.loads((to / "metrics.json").read_text())
    classes, counts = written["test"]["confusion"]["classes"], written["test"]["confusion"]["counts"]
    for number, label in enumerate(classes):
        taken = [row["prediction"] for row in rows if row["label"] == label]
        assert counts[number] == [taken.count(other) for other in classes]
    # And what transformers makes of the result, without us.
    classify = transformers.pipeline("text-classification", model=str(to))
    texts = [line.rpartition(",")[0] for line in (to.parent / "test.csv").read_text().splitlines()[1:]]
    again = [found["label"] for found in classify(texts)]
    assert again == [row["prediction"] for row in rows]


def test_what_is_done_is_not_done_again(run: Path, classified: tuple[Path, dict[str, Any]]) -> None:
    to, metrics = classified
    before = (to / "model.safetensors").stat().st_mtime_ns
    assert fine_tuned(run, to.parent / "classes.yaml", to, *LONGER) == metrics
    assert (to / "model.safetensors").stat().st_mtime_ns == before
    done = dsbert("finetune", str(run), "--task", str(to.parent / "classes.yaml"), "--to", str(to))
    assert "settings.batch_size 32 where it has 16: give another --to" in complaint(done)


def test_numbers_of_pairs(run: Path, tmp_path: Path) -> None:
    metrics = fine_tuned(run, make_task(tmp_path, "pairs"), tmp_path / "out", "--best")
    assert metrics["test"]["pearson"] > 0.8
    rows = lines(tmp_path / "out" / "predictions_test.jsonl")
    errors = [(row["prediction"] - row["label"]) ** 2 for row in rows]
    assert metrics["test"]["mse"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    best = max(lines(tmp_path / "out" / "metrics.jsonl"), key=lambda row: row.get("eval_pearson", -2))
    assert metrics["best_step"] == best["step"]
    assert metrics["validation"]["pearson"] == pytest.approx(best["eval_pearson"], abs=1e-5)


def test_tags_of_words_in_a_dense_model(run: Path, tmp_path: Path) -> None:
    metrics = fine_tuned(run, make_task(tmp_path, "tags"), tmp_path / "out", "--pattern", "dense")
    assert (metrics["pattern"], metrics["density"]) == ("dense", 1.0)
    assert metrics["test"]["f1"] > 0.9
    rows = lines(tmp_path / "out" / "predictions_test.jsonl")
    assert all(len(row["prediction"]) == len(row["tokens"]) for row in rows)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.model_type, set(config.id2label.values())) == ("bert", {"B-N", "O"})


@pytest.mark.slow
def test_answers_in_texts_longer_than_the_model_takes(run: Path, tmp_path: Path) -> None:
    metrics = fine_tuned(run, make_task(tmp_path, "answers"), tmp_path / "out", "num_train_epochs=8")
    rows = lines(tmp_path / "out" / "predictions_test.jsonl")
    texts = lines(tmp_path / "test.jsonl")
    assert all(row["prediction"] in text["context"] for row, text in zip(rows, texts, strict=True))
    assert metrics["test"]["exact_match"] > 70


def test_a_pattern_that_moves(run: Path, tmp_path: Path) -> None:
    words = ("--pattern", "dynamic", "sparsity.num_updates=4", "sparsity.max_prune_ratio=0.3", "num_train_epochs=1")
    metrics = fine_tuned(run, make_task(tmp_path, "classes"), tmp_path / "out", *words)
    layers = restore_model(run).layers
    found = coordinates(tmp_path / "out")
    moved = 0
    for name, layer in layers.items():
        rows, cols = (found[f"{name.removeprefix('bert.')}.{kind}"] for kind in ("rows", "cols"))
        assert len(rows) == layer.num_active
        assert len({*zip(rows.tolist(), cols.tolist(), strict=True)}) == layer.num_active
        moved += int(((rows != layer.rows) | (cols != layer.cols)).sum())
    assert moved > 0
    assert metrics["density"] == pytest.approx(0.25, abs=0.05)
    # The result is a sparse model as any other, with which the next one begins; and it can become dense.
    again = fine_tuned(tmp_path / "out", tmp_path / "classes.yaml", tmp_path / "again", "num_train_epochs=0.1")
    assert again["pattern"] == "keep"
    for name, value in coordinates(tmp_path / "again").items():
        assert torch.equal(value, found[name])
    dense = fine_tuned(
        tmp_path / "out", tmp_path / "classes.yaml", tmp_path / "dense", "--pattern", "dense", "num_train_epochs=0.1",
        "learning_rate=0.0",
    )  # fmt: skip
    before = [(row["prediction"], row["probability"]) for row in lines(tmp_path / "out" / "predictions_test.jsonl")]
    after = [(row["prediction"], row["probability"]) for row in lines(tmp_path / "dense" / "predictions_test.jsonl")]
    assert [name for name, _ in after] == [name for name, _ in before]
    assert [value for _, value in after] == pytest.approx([value for _, value in before], abs=1e-4)
    assert dense["pattern"] == "dense"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["per_device_train_batch_size=4"], "give --batch-size"),
        (["learning_rat=1"], "the nearest is 'learning_rate'"),
        (["learning_rate=much"], "expected a number as learning_rate, found 'much'"),
        (["num_train_epochs"], "expected name=value, found 'num_train_epochs'"),
        (["--batch-size", "15", "gradient_accumulation_steps=2"], "expected --batch-size divisible by"),
        (["--data", "."], "expected --data beside a benchmark"),
        (["--pattern", "dynamic", "sparsity.block_size=4"], "the model has its own"),
        (["--pattern", "dynamic", "sparsity.regrow=best"], "sparsity key 'regrow': expected 'random'"),
    ],
)
def test_mistakes(run: Path, tmp_path: Path, words: list[str], said: str) -> None:
    task = make_task(tmp_path, "classes", rows=16)
    assert said in complaint(dsbert("finetune", str(run), "--task", str(task), "--to", str(tmp_path / "out"), *words))


def test_models_that_are_none(run: Path, tmp_path: Path) -> None:
    task, to = make_task(tmp_path, "classes", rows=16), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    done = dsbert("finetune", str(tmp_path / "empty"), "--task", str(task), "--to", str(to))
    assert "expected a run directory or a checkpoint at" in complaint(done)
    done = dsbert("finetune", str(tmp_path / "nowhere"), "--task", str(task), "--to", str(to))
    assert "expected a run, a checkpoint, an export or a model of transformers at" in complaint(done)
    dense = tmp_path / "exported"
    assert dsbert("export", str(run), "--to", str(dense)).returncode == 0
    done = dsbert("finetune", str(dense), "--task", str(task), "--to", str(to), "--pattern", "keep")
    assert "expected a sparse model for --pattern keep, found a dense one at" in complaint(done)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    done = dsbert("finetune", str(run), "--task", str(task), "--to", str(tmp_path / "other"))
    assert "expected a new directory as --to, or one of a fine-tuning, found mine.txt" in complaint(done)
