"""What kind of file a name says, and what content says that it is another.

The name is the one that was given: that of a link, whatever it leads to, as in the hub's cache.
"""

from __future__ import annotations

import os
from pathlib import Path

from dsbert.data.preparing.unpacking import PACKED, packing

_KIND_OF_SUFFIX = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
SUFFIXES = " ".join(_KIND_OF_SUFFIX)
# How a file begins that is no text, whatever its name says. What else is none shows in bytes that are no UTF-8, or NUL.
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"PAR1": "parquet",
    b"ARROW1": "Arrow",
    b"PK\x03\x04": "zip",
    b"%PDF-": "PDF",
    b"{\\rtf": "RTF",
    b"SQLite format 3\0": "SQLite",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def kind_of(path: str | Path) -> str | None:
    """ "text", "json", "csv" or "parquet" by the file's name, in small letters or large ones; None for any other."""
    kind = _KIND_OF_SUFFIX.get(_suffix(path))
    return None if kind == "parquet" and packing(path) else kind


def separators_of(path: str | Path) -> str:
    """What may stand between the columns of a file of kind "csv": of .tsv a tab, of .csv one of these."""
    return "\t" if _suffix(path) == ".tsv" else ",;\t|"


def _suffix(path: str | Path) -> str:
    """In small letters; of a packed file, the one before."""
    name, suffix = os.path.splitext(path)
    return (os.path.splitext(name)[1] if packing(path) else suffix).lower()


def looks_like_a_path(name: str) -> bool:
    """Whether a name that nothing stands at is one of a file, and not of a data set."""
    suffix = os.path.splitext(name)[1].lower()
    return name.startswith((".", "/", "~")) or suffix in _KIND_OF_SUFFIX or suffix in PACKED


def disguised(head: bytes) -> str | None:
    """What a file is that begins so and calls itself text; None where nothing tells."""
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
