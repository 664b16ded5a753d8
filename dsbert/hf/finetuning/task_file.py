"""What a task's file declares, and how its name or path becomes one.

kind: classification                # or regression, token-classification, question-answering
files: {train: train.csv, validation: validation.csv, test: test.csv}    # beside it; CSV, TSV, JSON lines, parquet
columns: {text: question, text_pair: passage, label: class}              # what the data calls them, where not as here
metric: accuracy                    # the one that `--best` goes by

In place of files a data set of the library `datasets`: `dataset: ag_news`, `config:` one of its configurations, and
`splits: {train: "train[:90%]", validation: "train[90%:]"}` in its words; by default each split is called as here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from dsbert.base.errors import UserError
from dsbert.base.fields import Section, Text
from dsbert.config.complaints import Key, explain, in_one_line
from dsbert.config.documents import read_mapping

Kind = Literal["classification", "regression", "token-classification", "question-answering"]
TRAIN, VALIDATION = "train", "validation"

# What each kind needs of a row, and what it takes beside that.
NEEDS = {
    "classification": ("text", "label"),
    "regression": ("text", "label"),
    "token-classification": ("tokens", "tags"),
    "question-answering": ("question", "context", "answers"),
}
MAY_HAVE = {
    "classification": ("text_pair", "id"),
    "regression": ("text_pair", "id"),
    "token-classification": ("id",),
    "question-answering": ("id",),
}
# What is to be predicted, without which a split still gets predictions.
TARGET = {
    "classification": "label",
    "regression": "label",
    "token-classification": "tags",
    "question-answering": "answers",
}
# The metrics of each kind (task_metrics.py), the first by default; the last three of tags need those of entities.
METRICS = {
    "classification": ("accuracy", "f1", "macro_f1", "matthews_correlation"),
    "regression": ("pearson", "spearmanr", "mse", "mae"),
    "token-classification": ("accuracy", "precision", "recall", "f1"),
    "question-answering": ("f1", "exact_match"),
}
SMALLER_IS_BETTER = ("mse", "mae")

_SplitName = Annotated[str, Field(pattern=r"^\w{1,40}$")]


class Task(Section):
    """A whole file. Splits other than train and validation get predictions, and metrics where they have what is to be
    predicted."""

    name: str = ""
    kind: Kind
    files: dict[_SplitName, Text | Annotated[list[Text], Field(min_length=1)]] = Field(default_factory=dict)
    dataset: Text | None = None
    config: Text | None = None
    splits: dict[_SplitName, Text] = Field(default_factory=dict)
    columns: dict[str, Text] = Field(default_factory=dict)
    metric: Text | None = None

    @model_validator(mode="after")
    def _check(self) -> Task:
        found = []
        if bool(self.files) == bool(self.dataset):
            found.append(f"expected either files or dataset, found {'both' if self.dataset else 'neither'}")
        if self.files:
            found += [f"expected files for the split {name}, found none" for name in self._missing(self.files)]
            found += [f"expected {key} beside dataset only, found it beside files" for key in self._beside_dataset()]
        known = (*NEEDS[self.kind], *MAY_HAVE[self.kind])
        found += [
            f"expected columns of {self.kind} ({', '.join(known)}), found {name!r}"
            for name in self.columns
            if name not in known
        ]
        if self.metric and self.metric not in METRICS[self.kind]:
            found.append(f"expected a metric of {', '.join(METRICS[self.kind])}, found {self.metric!r}")
        if found:
            raise ValueError(in_one_line(found))
        return self

    def _beside_dataset(self) -> list[str]:
        return [key for key, value in (("config", self.config), ("splits", self.splits)) if value]

    @staticmethod
    def _missing(splits: dict[str, Any]) -> list[str]:
        return [name for name in (TRAIN, VALIDATION) if name not in splits]

    def column(self, name: str) -> str:
        """What the data calls the column `name`."""
        return self.columns.get(name, name)

    @property
    def sources(self) -> dict[str, str | list[str]]:
        """By split what is read: files, or in the data set's words."""
        names: dict[str, str | list[str]] = {TRAIN: TRAIN, VALIDATION: VALIDATION}
        return dict(self.files) or {**names, **self.splits}

    @property
    def main_metric(self) -> str:
        """The one that `--best` goes by."""
        return self.metric or METRICS[self.kind][0]


def load_task(name: str, data: Path | None = None) -> Task:
    """A benchmark by its name, or a task's file, whose files are then named by their absolute paths.

    data: a directory with the benchmark's data in the layout of the hub, in place of the hub.
    Raises UserError, in one line, for all that does not fit.
    """
    from dsbert.hf.finetuning.benchmark_tasks import BENCHMARKS

    if name in BENCHMARKS:
        task = Task(name=name, **BENCHMARKS[name])
        if data is None:
            return task
        if not data.is_dir():
            raise UserError(f"expected a directory with the data of {name} as --data, found none at {data}")
        return task.model_copy(update={"dataset": str(data.absolute())})
    if data is not None:
        raise UserError(f"expected --data beside a benchmark ({', '.join(BENCHMARKS)}) only, found the task {name!r}")
    path = Path(name)
    try:
        values, lines = read_mapping(path, "a task")
    except FileNotFoundError:
        raise UserError(f"expected a task's YAML file or one of {', '.join(BENCHMARKS)}, found {name!r}") from None

    def place(key: Key) -> str:
        return f" (line {lines[key]})" if key in lines else ""

    try:
        task = Task.model_validate({"name": path.stem} | values)
    except ValidationError as error:
        raise UserError(f"{path}: {in_one_line(explain(error, Task, 'task', {}, place))}") from None
    folder = path.absolute().parent
    files = {split: _absolute(folder, found) for split, found in task.files.items()}
    return task.model_copy(update={"files": files})


def _absolute(folder: Path, files: str | list[str]) -> list[str]:
    return [str(folder / file) for file in ([files] if isinstance(files, str) else files)]
