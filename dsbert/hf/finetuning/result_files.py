"""The directory of a fine-tuning.

finetune.json                model, task and settings, which must be the same where it goes on
checkpoints/                 Trainer's, while it goes on
config.json, model.safetensors, tokenizer...    the model, as transformers loads it
predictions_SPLIT.jsonl      an object per row
confusion_SPLIT.png          of classes: how often each was taken for each
metrics.jsonl                what Trainer has logged, a line each
metrics.json                 the metrics of every split; written last: it is done
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dsbert.base.durable import read_regular, replace_durably
from dsbert.base.errors import UserError
from dsbert.base.jsonl import first_difference, parse_object, to_json
from dsbert.cluster.secret import SECRET_FILE

RECORD, METRICS, LOG, CHECKPOINTS = "finetune.json", "metrics.json", "metrics.jsonl", "checkpoints"
_MOST_CLASSES = 50  # of a picture that can still be read


def begin(to: Path, record: dict[str, Any]) -> None:
    """Make the directory, or make sure that it is of the same fine-tuning. Raises UserError, OSError."""
    if to.exists() and not to.is_dir():
        raise UserError(f"expected a directory as --to, found the file {to}")
    # As JSON has it: what a record is compared with went through it.
    record = parse_object(to_json(record).encode()) or {}
    if (to / RECORD).is_file():
        before = parse_object(read_regular(to / RECORD)) or {}
        if difference := first_difference(before, record):
            raise UserError(
                f"expected the model, task and settings of the fine-tuning in {to}, found {difference.key} "
                f"{difference.after!r} where it has {difference.before!r}: give another --to"
            )
        return
    if to.is_dir() and (there := sorted(path.name for path in to.iterdir() if path.name != SECRET_FILE)):
        raise UserError(f"expected a new directory as --to, or one of a fine-tuning, found {there[0]} in {to}")
    to.mkdir(parents=True, exist_ok=True)
    replace_durably(to / RECORD, to_json(record).encode() + b"\n")


def finished(to: Path) -> dict[str, Any] | None:
    """The metrics of a fine-tuning that is done; None of one that is not."""
    return parse_object(read_regular(to / METRICS)) if (to / METRICS).is_file() else None


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """An object a line. Raises OSError."""
    replace_durably(path, "".join(to_json(record) + "\n" for record in records).encode())


def finish(to: Path, metrics: dict[str, Any]) -> None:
    """Say that it is done, and remove what only going on needs. Raises OSError."""
    replace_durably(to / METRICS, to_json(metrics).encode() + b"\n")
    shutil.rmtree(to / CHECKPOINTS, ignore_errors=True)


def draw_confusion(counts: Sequence[Sequence[int]], classes: Sequence[str], title: str, path: Path) -> bool:
    """Draw a confusion matrix [C, C], shares of each row in colour. False where matplotlib is not there, or where there
    are too many classes to be read. Raises OSError."""
    try:
        import matplotlib
    except ImportError:
        return False
    if len(classes) > _MOST_CLASSES:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = 2.5 + 0.35 * len(classes)
    figure, axes = pyplot.subplots(figsize=(size, size), constrained_layout=True)
    shares = [[count / max(sum(row), 1) for count in row] for row in counts]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for number, row in enumerate(counts):
        for place, count in enumerate(row):
            if count:
                shade = "white" if shares[number][place] > 0.5 else "black"
                axes.text(place, number, str(count), ha="center", va="center", color=shade, fontsize=7)
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted", ylabel="label", title=title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
