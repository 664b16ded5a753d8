"""Tasks as people write and get them: files, benchmarks in the layout of the hub, and what is wrong with either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsbert.base.errors import UserError
from dsbert.hf.finetuning.benchmark_tasks import BENCHMARKS
from dsbert.hf.finetuning.task_file import TARGET, load_task
from dsbert.hf.finetuning.task_tables import Split, class_names, read_splits
from tests.hf.finetuning.made_tasks import make_task, write_rows


def test_a_file(tmp_path: Path) -> None:
    task = load_task(str(make_task(tmp_path, "pairs")))
    assert (task.name, task.kind, task.main_metric) == ("pairs", "regression", "pearson")
    splits = read_splits(task)
    assert {name: len(split) for name, split in splits.items()} == {"train": 192, "validation": 48, "test": 40}
    assert set(splits["train"].columns) == {"text", "text_pair", "label"}
    assert set(splits["train"].columns["label"]) == {1.0, -1.0}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "kind: sorting\nfiles: {train: a.csv, validation: a.csv}",
            "task key 'kind' (line 1): expected 'classification'",
        ),
        ("kind: classification", "expected either files or dataset, found neither"),
        ("kind: classification\nfiles: {train: a.csv}", "expected files for the split validation, found none"),
        (
            "kind: classification\nfiles: {train: a.csv, validation: a.csv}\ncolumns: {txt: a}",
            "expected columns of classification (text, label, text_pair, id), found 'txt'",
        ),
        (
            "kind: regression\nfiles: {train: a.csv, validation: a.csv}\nmetric: accuracy",
            "expected a metric of pearson, spearmanr, mse, mae, found 'accuracy'",
        ),
        ("kind: classification\nfiles: {train: no.csv, validation: no.csv}", "found none"),
        ("kind: classification\nfiles: {train: a.xls, validation: a.xls}", "expected .csv, .tsv, .jsonl or .parquet"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "task.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        read_splits(load_task(str(tmp_path / "task.yaml")))
    assert said in str(error.value)


def test_a_name_that_nobody_knows() -> None:
    with pytest.raises(UserError, match=r"expected a task's YAML file or one of cola, .*, squad_v2, found 'ssst2'"):
        load_task("ssst2")


GOOD = [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]


@pytest.mark.parametrize(
    ("train", "validation", "said"),
    [
        ([{"text": "x", "class": "a"}], GOOD, "expected the column 'label' in the split train, found text, class"),
        ([{"text": "x", "label": "a"}], GOOD, "expected two classes or more in label of the split train, found 'a'"),
        (GOOD, [{"text": "x", "label": "c"}], "expected in the split validation the label that train has, found 'c'"),
        (GOOD, [], "expected rows in the split validation, found none"),
        (GOOD, [{"text": None, "label": "a"}], "expected text in 'text' of the split validation, found None in row 1"),
        (GOOD, [{"text": "x", "label": None}], "expected values in 'label' of the split validation, found none"),
    ],
)
def test_mistakes_in_rows(tmp_path: Path, train: list[Any], validation: list[Any], said: str) -> None:
    for name, rows in (("train", train), ("validation", validation)):
        write_parquet(tmp_path / f"{name}.parquet", rows or GOOD, keep=len(rows))
    (tmp_path / "t.yaml").write_text(
        "kind: classification\nfiles: {train: train.parquet, validation: validation.parquet}"
    )
    with pytest.raises(UserError) as error:
        class_names(read_splits(load_task(str(tmp_path / "t.yaml"))), "label")
    assert said in str(error.value)


def test_tags_and_words_go_together(tmp_path: Path) -> None:
    rows = [{"tokens": ["a", "b"], "tags": ["X"]}]
    for name in ("train", "validation"):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    (tmp_path / "t.yaml").write_text(
        "kind: token-classification\nfiles: {train: train.jsonl, validation: validation.jsonl}"
    )
    with pytest.raises(UserError, match="as many tags as tokens in the split train, found 1 and 2 in row 1"):
        read_splits(load_task(str(tmp_path / "t.yaml")))


def test_classes_that_are_numbers_stand_in_their_order() -> None:
    rows = {"text": ["x"] * 3, "label": ["10", "9", "-1"]}
    assert class_names({"train": Split("train", rows, labelled=True)}, "label") == ["-1", "9", "10"]


def write_parquet(path: Path, rows: list[Any], keep: int, features: Any = None) -> None:
    """As `datasets` writes it, of an empty split too."""
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, features=features).select(range(keep)).to_parquet(path)


CLASS_COUNTS = {"mnli": 3, "stsb": 0}


def hub_copy(folder: Path, name: str) -> None:
    """The repository of a benchmark as the hub has it: README.md, which names configurations, and parquet files."""
    from datasets import ClassLabel, Features, List, Value

    entry = BENCHMARKS[name]
    config = entry.get("config", "plain_text")
    row: dict[str, Any]
    kinds = [
        *dict.fromkeys((*{"train": "train", "validation": "validation"}.values(), *entry.get("splits", {}).values()))
    ]
    if name == "mnli":
        kinds.remove("validation")
    lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    if name.startswith("squad"):
        answer = {"text": ["dog"], "answer_start": [4]}
        row = {"id": "q1", "title": "t", "context": "the dog", "question": "who ?", "answers": answer}
        text = {key: Value("string") for key in ("id", "title", "context", "question")}
        spans = {"text": List(Value("string")), "answer_start": List(Value("int32"))}
        features = Features(text | {"answers": spans})
    else:
        columns = {own: "some text" for key, own in entry["columns"].items() if key != "id"}
        count = CLASS_COUNTS.get(name, 2)
        label = ClassLabel(names=[f"class_{number}" for number in range(count)]) if count else Value("float32")
        row = columns | {"label": 0, "idx": 0}
        features = Features({key: Value("string") for key in columns} | {"label": label, "idx": Value("int32")})
    for split in kinds:
        hidden = split.startswith("test") and name != "stsb"
        labels = [-1, -1] if hidden else [0, 1]
        rows = [row | {"label": label} for label in labels] if "label" in row else [row]
        write_parquet(folder / config / f"{split}-00000-of-00001.parquet", rows, len(rows), features)
        lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_in_the_layout_of_the_hub(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    hub_copy(tmp_path / "copy", name)
    task = load_task(name, tmp_path / "copy")
    splits = read_splits(task)
    assert {"train", "validation"} <= set(splits)
    assert splits["train"].labelled
    if task.kind == "question-answering":
        assert splits["train"].columns["answers"] == [[("dog", 4)]]
        assert splits["train"].ids() == ["q1"]
        return
    assert splits["test"].labelled is (name == "stsb")
    if task.kind == "classification":
        assert class_names(splits, TARGET[task.kind]) == ["class_0", "class_1"]
        assert "label" not in splits["test"].columns
    if name == "mnli":
        assert set(splits) == {"train", "validation", "validation_mismatched", "test", "test_mismatched"}
