"""What a prepared data directory contains.

manifest.json         this file's subject: sources, tokenizer, splits, shards with checksums, identity
tokenizer/            as transformers' AutoTokenizer reads it
train-00000.arrow     token shards (shards.py), as many as needed, for train and validation
unigram.npy           int64 [V]: how often each token occurs in the train split
spans-train-128/      the sample index for one sequence length, made on first use (spans.py)
pairs-train-128/      how samples are cut and meet for next-sentence prediction, made on first use (pairs.py)
"""

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

import numpy as np
from numpy.typing import NDArray

from dsbert.base.durable import replace_durably, sealed, sync_directory, unsealed
from dsbert.base.errors import UserError

KIND = "dsbert-data"
VERSION = 2
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
UNIGRAM = "unigram.npy"
SPLITS = ("train", "validation")
_SCALARS = (int, float, str, bool)
_MAX_BYTES = 1 << 28
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class LeftOutFiles(TypedDict):
    """Of one reason: how many files, and the first of their names, which can be printed."""

    files: int
    names: list[str]


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of text by its name, the fingerprint of its content, and the grouping of its rows (grouping.py)."""

    name: str
    fingerprint: str
    documents: str


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked for: equal requests give equal data.

    tokenizer: "train", or the digest of the one given; vocab_size then 0. near_duplicates: the algorithm, or "". cased,
    keep_accents: of a tokenizer that is trained, whether it keeps case and accents, or only accents.
    """

    sources: tuple[Source, ...]
    tokenizer: str
    vocab_size: int
    validation: float
    shard_tokens: int
    text_column: str
    min_words: int
    near_duplicates: str
    cased: bool = False
    keep_accents: bool = False


@dataclasses.dataclass(frozen=True)
class TokenizerEntry:
    """`vocab_size` is the number of tokens there are, which a small corpus keeps below the number asked for."""

    digest: str
    vocab_size: int
    lowercase: bool


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """One Arrow file; `xxh3` is the hex xxh3_64 of its bytes."""

    file: str
    documents: int
    tokens: int
    bytes: int
    xxh3: str


@dataclasses.dataclass(frozen=True)
class SplitEntry:
    """A split's totals and its shards, in the order that numbers its documents and tokens."""

    documents: int
    sentences: int
    tokens: int
    shards: tuple[ShardEntry, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The typed content of manifest.json. `digest` is the identity of the data: of its tokens and their meaning.

    dropped: how many documents were duplicates, near_duplicates, empty, tiny, tokenless. files: of the other files, by
    their paths in the directory, the hex xxh3_128 of their bytes. mended: how many documents' sentences were found
    another way (sentences.py); mended_in: where the first few are. left_out: files of the sources that are not read, as
    `folders.summarized` gives them.
    """

    request: Request
    tokenizer: TokenizerEntry
    splits: dict[str, SplitEntry]
    dropped: dict[str, int]
    digest: str
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    mended: int = 0
    mended_in: tuple[str, ...] = ()
    left_out: dict[str, LeftOutFiles] = dataclasses.field(default_factory=dict)

    def save(self, directory: Path) -> None:
        """Write manifest.json into the directory, with a checksum of itself, to survive a power cut."""
        document = sealed({"kind": KIND, "version": VERSION, **dataclasses.asdict(self)})
        replace_durably(directory / MANIFEST, (json.dumps(document, indent=2) + "\n").encode())
        sync_directory(directory)


def data_digest(tokenizer_digest: str, splits: dict[str, SplitEntry]) -> str:
    """Hex xxh3_128 over the tokenizer's digest and the shards' checksums, split by split."""
    import xxhash

    shards = [[name, [shard.xxh3 for shard in splits[name].shards]] for name in SPLITS]
    return xxhash.xxh3_128_hexdigest(json.dumps([tokenizer_digest, shards]).encode())


# How the data of the shipped recipes is made; what else a directory is to hold, only the user knows.
_SOURCES = {"sotu": ("sotu", 2048), "wikibooks": ("wikibooks", 30522)}


def load_manifest(directory: str | Path) -> Manifest:
    """Read manifest.json.

    Raises:
        UserError: there is no prepared data, the manifest is damaged, or another version of dsbert wrote it.
    """
    path = Path(directory) / MANIFEST
    if Path(directory).exists() and not Path(directory).is_dir():
        raise UserError(
            f"expected a directory of prepared data, found the file {directory}: give what `dsbert prepare` made"
        )
    source, vocab_size = _SOURCES.get(Path(directory).name, ("FILE|FOLDER", 30522))
    again = f"run: dsbert prepare --source {source} --to {directory} --vocab-size {vocab_size}"
    try:
        if path.exists() and not (path.is_file() and path.stat().st_size <= _MAX_BYTES):
            raise ValueError(f"expected a file of at most {_MAX_BYTES} bytes")
        document = json.loads(path.read_text())
    except FileNotFoundError:
        near = ", ".join(str(other.parent) for other in sorted(Path(directory).parent.glob(f"*/{MANIFEST}"))[:5])
        here = f"; prepared data near it: {near}" if near else ""
        raise UserError(f"no prepared data in {directory}; {again}{here}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is unreadable ({error}); remove {directory} and {again}") from error
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise UserError(f"{path} does not describe prepared data; {again} into another directory")
    if document.get("version") != VERSION:
        raise UserError(
            f"{path} has version {document.get('version')}, expected {VERSION}: another dsbert made it; remove "
            f"{directory} and {again}"
        )
    try:
        content = {key: value for key, value in unsealed(document).items() if key not in ("kind", "version")}
        manifest: Manifest = _typed(Manifest, content, "")
        _check_names(manifest)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove {directory} and {again}") from error
    return manifest


def load_unigram_counts(directory: str | Path) -> NDArray[np.int64]:
    """int64 [V]: how often each token id occurs in the train split. A checkpoint holds the same file.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = Path(directory) / UNIGRAM
    try:
        if path.exists() and not (path.is_file() and path.stat().st_size <= _MAX_BYTES):
            raise ValueError(f"expected a file of at most {_MAX_BYTES} bytes")
        counts: NDArray[np.int64] = np.load(path)
    except Exception as error:  # of many kinds, where the file's head is damaged
        text = " ".join(str(error).split())
        raise UserError(f"{path} is unreadable ({text}); prepare the data again") from error
    return counts


def _typed(hint: Any, value: Any, name: str) -> Any:
    """A JSON value as what the annotation says. Raises ValueError for another one, a negative or a huge number."""
    if hint in _SCALARS:
        return _scalar(hint, value, name)
    origin, inner = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        build: Any = hint
        hints, optional = _fields(build)
        if not set(hints) - optional <= set(value) <= set(hints):
            raise ValueError(f"expected {', '.join(hints)} in {name or 'it'}, found {', '.join(map(str, value))}")
        return build(**{key: _typed(hints[key], each, f"{name}.{key}".lstrip(".")) for key, each in value.items()})
    if is_typeddict(hint) and isinstance(value, dict) and set(value) == set(get_type_hints(hint)):
        return {key: _typed(kind, value[key], f"{name}.{key}") for key, kind in get_type_hints(hint).items()}
    if origin is list and isinstance(value, list):
        return [_typed(inner[0], each, f"{name}[{number}]") for number, each in enumerate(value)]
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(inner[0], each, f"{name}[{number}]") for number, each in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _typed(inner[1], each, f"{name}.{key}") for key, each in value.items()}
    raise ValueError(f"expected {name} to be of type {getattr(hint, '__name__', hint)}, found {str(value)[:40]!r}")


def _scalar(hint: Any, value: Any, name: str) -> Any:
    kinds = (int, float) if hint is float else (hint,)
    if type(value) not in kinds or (not isinstance(value, str | bool) and not 0 <= value < 1 << 62):
        raise ValueError(f"expected {name} to be of type {hint.__name__}, found {str(value)[:40]!r}")
    return value


@functools.cache  # asked for each shard, of which there may be thousands
def _fields(kind: Any) -> tuple[dict[str, Any], set[str]]:
    """What the annotations of a dataclass say, and which fields may be missing."""
    missing = dataclasses.MISSING
    optional = {f.name for f in dataclasses.fields(kind) if (f.default, f.default_factory) != (missing, missing)}
    return get_type_hints(kind), optional


def _check_names(manifest: Manifest) -> None:
    """Raise ValueError unless all names are such as stay inside the directory, and each thing has one of its own."""
    if set(manifest.splits) != set(SPLITS):
        raise ValueError(f"expected the splits {', '.join(SPLITS)}, found {', '.join(manifest.splits)}")
    shards = [shard.file for split in SPLITS for shard in manifest.splits[split].shards]
    for name in shards:
        if (
            not _PLAIN.fullmatch(name)
            or name in (MANIFEST, UNIGRAM, TOKENIZER)
            or name.startswith(("spans-", "pairs-"))
        ):
            raise ValueError(f"expected the plain name of a shard, found {name[:80]!r}")
    for name in manifest.files:
        folder, _, file = name.rpartition("/")
        if folder not in ("", TOKENIZER) or not _PLAIN.fullmatch(file) or name in shards:
            raise ValueError(f"expected the plain name of a file, found {name[:80]!r}")
    if not _PLAIN.fullmatch(manifest.digest):
        raise ValueError(f"expected a digest, found {manifest.digest[:80]!r}")
