"""A task's splits as rows in memory, and its labels: what does not fit is said before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsbert.base.errors import UserError
from dsbert.hf.finetuning.task_file import MAY_HAVE, NEEDS, TARGET, TRAIN, VALIDATION, Task

if TYPE_CHECKING:
    from pyarrow import Table

# Of a class in the data sets of the hub: hidden, as in a benchmark's test split.
_HIDDEN = -1
_SHOWN = 8


@dataclass(frozen=True)
class Split:
    """Rows of one split by dsbert's names of columns, each column a list. labelled: whether what is to be predicted is
    there. classes: names of whole numbers in it, where the data set has them."""

    name: str
    columns: dict[str, list[Any]]
    labelled: bool
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def ids(self) -> list[Any]:
        """What the data calls each row, or its number."""
        return self.columns.get("id") or list(range(len(self)))


def read_splits(task: Task) -> dict[str, Split]:
    """All splits of a task. Raises UserError for a file, a column or a row that is not there or cannot be used."""
    found = {}
    for name, source in task.sources.items():
        table, classes = _from_files(name, source) if task.files else _from_dataset(task, name, str(source))
        found[name] = _split(task, name, table, classes)
    return found


def class_names(splits: dict[str, Split], target: str) -> list[str]:
    """The classes of a task, in order: those of the training split, numbers by size and words by alphabet, or as the
    data set names them. target: "label" or "tags".

    Raises UserError where training has one class alone, or another split one that training has not.
    """
    train = splits[TRAIN]
    found = _classes_of(train, target)
    if len(found) < 2:
        raise UserError(f"expected two classes or more in {target} of the split {TRAIN}, found {_listed(found)}")
    for split in splits.values():
        if split.labelled and (unseen := _classes_of(split, target) - found):
            raise UserError(
                f"expected in the split {split.name} the {target} that {TRAIN} has, found {_listed(unseen)} as well: "
                f"leave those rows out, or put some into {TRAIN}"
            )
    if train.classes:
        return [name for name in train.classes if name in found]
    return sorted(found, key=_by_number)


def _classes_of(split: Split, target: str) -> set[str]:
    values = split.columns[target]
    return set(values) if target == "label" else {tag for tags in values for tag in tags}


def _by_number(name: str) -> tuple[bool, float, str]:
    try:
        return (False, float(name), name)
    except ValueError:
        return (True, 0.0, name)


def _listed(names: set[str]) -> str:
    shown = [repr(name) for name in sorted(names)[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "") or "none"


def _from_files(name: str, files: str | Sequence[str]) -> tuple[Table, tuple[str, ...]]:
    import pyarrow as pa

    tables = [_read_file(Path(file)) for file in files]
    try:
        return pa.concat_tables(tables, promote_options="permissive"), ()
    except pa.ArrowException as error:
        raise UserError(f"expected the files of the split {name} to have the same columns, found: {error}") from None


def _read_file(path: Path) -> Table:
    import pyarrow as pa
    from pyarrow import csv, json, parquet

    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    try:
        if kind in (".csv", ".tsv"):
            delimiter = "\t" if kind == ".tsv" else ","
            options = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
            return csv.read_csv(path, parse_options=options)
        if kind in (".jsonl", ".json", ".ndjson"):
            return json.read_json(path, json.ReadOptions(block_size=1 << 24))
        if kind == ".parquet":
            return parquet.read_table(path)
    except FileNotFoundError:
        raise UserError(f"expected the task's file {path}, found none") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"expected rows in {path}, found: {' '.join(str(error).split())}") from None
    raise UserError(f"expected .csv, .tsv, .jsonl or .parquet, also with .gz, as a task's file, found {path.name}")


def _from_dataset(task: Task, name: str, split: str) -> tuple[Table, tuple[str, ...]]:
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(task.dataset, task.config, split=split)
    except Exception as error:  # of the hub, the network, files, and of many classes
        found = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"expected the split {split!r} of the data set {task.dataset}, found: {found[:300]}") from None
    feature = rows.features.get(task.column(TARGET[task.kind]))
    feature = getattr(feature, "feature", feature)  # of a list
    return rows.with_format("arrow")[:], tuple(getattr(feature, "names", None) or ())


def _split(task: Task, name: str, table: Table, classes: tuple[str, ...]) -> Split:
    """The columns that the task needs, of a table that has them. Raises UserError."""
    if not table.num_rows:
        raise UserError(f"expected rows in the split {name}, found none")
    target = TARGET[task.kind]
    wanted = [column for column in NEEDS[task.kind] if column != target]
    wanted += [column for column in MAY_HAVE[task.kind] if column in task.columns]
    if "id" not in wanted and "id" in table.column_names:
        wanted.append("id")
    labelled = task.column(target) in table.column_names
    if labelled or name in (TRAIN, VALIDATION):
        wanted.append(target)
    for column in wanted:
        if task.column(column) not in table.column_names:
            raise UserError(
                f"expected the column {task.column(column)!r} in the split {name}, found "
                f"{', '.join(table.column_names)}: name it in columns of the task"
            )
    values = {column: table.column(task.column(column)).to_pylist() for column in wanted}
    if labelled and task.kind != "question-answering" and all(_is_hidden(value, classes) for value in values[target]):
        labelled = False
        if name in (TRAIN, VALIDATION):
            raise UserError(f"expected values in {task.column(target)!r} of the split {name}, found none")
        del values[target]
    columns = {column: _checked(task, name, column, found, classes) for column, found in values.items()}
    for number, (tags, words) in enumerate(zip(columns.get("tags", []), columns.get("tokens", []), strict=False)):
        if len(tags) != len(words):
            raise UserError(
                f"expected as many tags as tokens in the split {name}, found {len(tags)} and {len(words)} in row "
                f"{number + 1}"
            )
    return Split(name, columns, labelled, classes)


def _is_hidden(value: Any, classes: tuple[str, ...]) -> bool:
    return value is None or (bool(classes) and value == _HIDDEN)


def _checked(task: Task, split: str, column: str, values: list[Any], classes: tuple[str, ...]) -> list[Any]:
    """The values of a column as its kind of task takes them. Raises UserError, naming the row."""
    convert = _CONVERSIONS[task.kind, column] if (task.kind, column) in _CONVERSIONS else _CONVERSIONS["", column]
    checked = []
    for number, value in enumerate(values):
        try:
            checked.append(convert(value, classes))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            found = f"{error}" if isinstance(error, _Unusable) else repr(value)[:80]
            raise UserError(
                f"expected {_WORDS[column]} in {task.column(column)!r} of the split {split}, found {found} in row "
                f"{number + 1}"
            ) from None
    return checked


class _Unusable(ValueError):
    """With a message of its own."""


def _text(value: Any, classes: tuple[str, ...]) -> str:
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, list | dict):
        raise ValueError
    return str(value)


def _class(value: Any, classes: tuple[str, ...]) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and classes:
        if not 0 <= value < len(classes):
            raise ValueError
        return classes[value]
    return _text(value, classes)


def _number(value: Any, classes: tuple[str, ...]) -> float:
    number = float(value)
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError
    return number


def _words(value: Any, classes: tuple[str, ...]) -> list[str]:
    # A CSV has no lists: there words stand in one text, with blanks between them.
    words = value.split() if isinstance(value, str) else value
    if not words:
        raise _Unusable("none")
    return [_class(word, classes) for word in words]


def _answers(value: Any, classes: tuple[str, ...]) -> list[tuple[str, int]]:
    """SQuAD's {"text": [...], "answer_start": [...]}, or a list of {"text", "answer_start"}; none: unanswerable."""
    if value is None:
        raise ValueError
    if isinstance(value, list):
        return [(str(one["text"]), int(one["answer_start"])) for one in value]
    return [(str(text), int(start)) for text, start in zip(value["text"], value["answer_start"], strict=True)]


_CONVERSIONS = {
    ("", "text"): _text,
    ("", "text_pair"): _text,
    ("", "id"): lambda value, classes: value,
    ("", "question"): _text,
    ("", "context"): _text,
    ("classification", "label"): _class,
    ("regression", "label"): _number,
    ("token-classification", "tokens"): lambda value, classes: _words(value, ()),
    ("token-classification", "tags"): _words,
    ("question-answering", "answers"): _answers,
}
_WORDS = {
    "text": "text",
    "text_pair": "text",
    "id": "an id",
    "question": "text",
    "context": "text",
    "label": "a label",
    "tokens": "words",
    "tags": "tags",
    "answers": "answers with text and answer_start",
}
