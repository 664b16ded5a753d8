"""What `tools/fetch_tasks.py` makes of rows is a task, the same one every time. Packages are not fetched here."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsbert.hf.finetuning.task_file import load_task
from dsbert.hf.finetuning.task_tables import class_names, read_splits
from tools import fetch_tasks


def test_rows_become_a_task(tmp_path: Path) -> None:
    rows = [{"text": f'say "{number}", then\n{number % 7}', "label": "ab"[number % 2]} for number in range(600)]
    few = [{"text": f"few {number}", "label": "c"} for number in range(fetch_tasks._FEWEST - 1)]
    counts = fetch_tasks.write_task("mine", [*rows, *rows[:50], *few], "classification", tmp_path / "one")
    assert sum(counts.values()) == 600
    assert counts["train"] > 6 * counts["test"] > 0
    splits = read_splits(load_task(str(tmp_path / "one" / "task.yaml")))
    assert {name: len(split) for name, split in splits.items()} == counts
    assert class_names(splits, "label") == ["a", "b"]
    texts = [text for split in splits.values() for text in split.columns["text"]]
    assert sorted(texts) == sorted(row["text"] for row in rows)
    fetch_tasks.write_task("mine", reversed(rows), "classification", tmp_path / "other")
    for name in splits:  # a row's split does not depend on the others
        again = read_splits(load_task(str(tmp_path / "other" / "task.yaml")))[name]
        assert set(again.columns["text"]) == set(splits[name].columns["text"])


def test_sentences_with_tags_that_training_lacks_are_left_out(tmp_path: Path) -> None:
    rows = [{"tokens": ["word", str(number)], "tags": ["nn", "cd"]} for number in range(100)]
    rare = [{"tokens": ["rare", str(number)], "tags": ["nn", f"x{number}"]} for number in range(40)]
    fetch_tasks.write_task("tags", [*rows, *rare], "token-classification", tmp_path)
    assert class_names(read_splits(load_task(str(tmp_path / "task.yaml"))), "tags")


@pytest.mark.parametrize(
    ("tag", "plain"),
    [("nn-tl", "nn"), ("fw-in", "in"), ("np$-hl", "np"), ("ppss+ber", "ppss"), ("bez*", "bez"), ("*", "*")],
)
def test_plain_tags(tag: str, plain: str) -> None:
    assert fetch_tasks._plain_tag(tag) == plain


def test_the_text_of_a_mail() -> None:
    head = b"From somebody Thu Aug 22\nSubject: Hello\nX-List: no\n"
    assert fetch_tasks._mail_text(head + b"\nSome  body\n") == "Hello Some body"
    page = b"Content-Type: text/html\n\n<html><style>p {}</style><p>Buy &now</p></html>"
    assert fetch_tasks._mail_text(head + page) == "Hello Buy &now"
    assert fetch_tasks._mail_text(head + b"Content-Type: text/plain; charset=none-such\n\nodd") == "Hello odd"
