"""Small tasks that a small model learns: rows as files, and their YAML."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

Row = dict[str, Any]
GOOD, BAD = ("big", "red"), ("old", "cold")
NOUNS = ("cat", "dog", "house", "tree")


def sentence(rng: random.Random) -> str:
    return f"the {rng.choice(NOUNS)} sees a {rng.choice(NOUNS)} ."


def classes(rng: random.Random) -> Row:
    good = rng.random() < 0.5
    return {"text": f"{sentence(rng)} {rng.choice(GOOD if good else BAD)}", "label": "good" if good else "bad"}


def pairs(rng: random.Random) -> Row:
    good, other = rng.random() < 0.5, sentence(rng)
    return {"a": sentence(rng), "b": f"{other} {rng.choice(GOOD if good else BAD)}", "score": 1.0 if good else -1.0}


def tags(rng: random.Random) -> Row:
    # Of two lengths: a mean over each rank's words is not the mean over all words of a step.
    words = " ".join(sentence(rng) for _ in range(rng.choice((1, 2)))).split()
    return {"tokens": words, "tags": ["B-N" if word in NOUNS else "O" for word in words]}


def answers(rng: random.Random) -> Row:
    """The answer is what follows "big"; every other question's text is longer than the model takes."""
    noun = rng.choice(NOUNS)
    head = " ".join(sentence(rng) for _ in range(rng.choice((0, 5))))
    context = f"{head} the big {noun} ."
    place = context.rindex(noun)
    return {"question": "the big ?", "context": context, "answers": {"text": [noun], "answer_start": [place]}}


def write_rows(path: Path, rows: list[Row]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


MAKERS: dict[str, tuple[Any, str, str]] = {
    "classes": (classes, "csv", "kind: classification"),
    "pairs": (pairs, "csv", "kind: regression\ncolumns: {text: a, text_pair: b, label: score}"),
    "tags": (tags, "jsonl", "kind: token-classification\nmetric: f1"),
    "answers": (answers, "jsonl", "kind: question-answering"),
}


def make_task(folder: Path, name: str, rows: int = 192) -> Path:
    """Write the splits of a task and its file, whose path is returned."""
    maker, suffix, head = MAKERS[name]
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(name)
    counts = {"train": rows, "validation": 48, "test": 40}
    for split, count in counts.items():
        write_rows(folder / f"{split}.{suffix}", [maker(rng) for _ in range(count)])
    files = ", ".join(f"{split}: {split}.{suffix}" for split in counts)
    path = folder / f"{name}.yaml"
    path.write_text(f"{head}\nfiles: {{{files}}}\n", encoding="utf-8")
    return path
