"""The ends of a preparation: what is there already, whether there is text at all, and the directory put together."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from dsbert.base.durable import checksum, copy_tree, replace_durably, sync_directory
from dsbert.base.errors import DataError, UserError
from dsbert.data.manifest import MANIFEST, TOKENIZER, UNIGRAM, Manifest, Request, ShardEntry, SplitEntry, load_manifest
from dsbert.data.preparing.done_markers import read_marker
from dsbert.data.preparing.folders import NO_TEXT, LeftOut
from dsbert.data.preparing.spool import save_array
from dsbert.data.preparing.tasks import Task
from dsbert.data.shards import shard_checksum


def find_existing(target: Path, request: Request) -> Manifest | None:
    """The manifest of a target that answers this request and is intact, or None if there is nothing there."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    if not target.is_dir() or not (target / MANIFEST).exists():
        raise UserError(f"{target} exists and holds no prepared data; choose another directory with --to")
    manifest = load_manifest(target)
    pairs = [
        (field.name, getattr(manifest.request, field.name), getattr(request, field.name)) for field in fields(Request)
    ]
    differing = [f"{name} {_brief(old)} instead of {_brief(new)}" for name, old, new in pairs if old != new]
    if differing:
        raise UserError(f"{target} was prepared with {'; '.join(differing)}; choose another directory with --to")
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        path = target / shard.file
        if not path.is_file() or shard_checksum(path) != shard.xxh3:
            raise DataError(f"{path} is missing or damaged; remove {target} and prepare again")
    return manifest


def _brief(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"{source.name} ({source.fingerprint}, {source.documents})" for source in value)
    return str(value)


def files_without_text(names: Sequence[str], read: list[Task], counts: list[dict[str, Any]]) -> list[LeftOut]:
    """Files of which no document is kept. names: of the sources.

    Raises UserError for a source that holds no other files: nobody lists it on purpose.
    """
    documents: list[dict[str, int]] = [{} for _ in names]
    tiny = [0] * len(names)
    for task, count in zip(read, counts, strict=True):
        tiny[task["source"]] += count["tiny"]
        found = documents[task["source"]]
        for piece, number in zip(task["pieces"], count["each"], strict=True):
            path = piece["file"]["path"]
            found[path] = found.get(path, 0) + number
    for name, found, few in zip(names, documents, tiny, strict=True):
        if not any(found.values()):
            raise UserError(
                f"{name} is empty: expected a document of enough words, found {few} with too few (--min-words): "
                "fetch it again, or leave it out"
            )
    return [LeftOut(path, NO_TEXT) for found in documents for path, number in found.items() if not number]


def split_entry(tasks: list[Task]) -> SplitEntry:
    """A split's part of the manifest, from what `merge_shard` wrote."""
    found = [read_marker(task) for task in tasks]
    entries = tuple(ShardEntry(**one["entry"]) for one in found)
    return SplitEntry(
        documents=sum(entry.documents for entry in entries),
        sentences=sum(one["sentences"] for one in found),
        tokens=sum(entry.tokens for entry in entries),
        shards=entries,
    )


def assemble(made: Path, tokenizer: Path, shards: dict[str, list[Task]], vocab_size: int) -> dict[str, str]:
    """Add the tokenizer and the unigram counts to the shards, and drop what an earlier plan, or who was killed, left.

    Returns the checksums of what was added, as `Manifest.files`.
    """
    wanted = {Path(task["file"]).name for tasks in shards.values() for task in tasks}
    for path in made.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in wanted:
            path.unlink()
    counts = np.zeros(vocab_size, dtype=np.int64)
    for task in shards["train"]:
        counts += np.load(f"{task['to']}.counts.npy")
    save_array(made / UNIGRAM, counts)
    copy_tree(tokenizer, made / TOKENIZER)
    added = [made / UNIGRAM, *sorted((made / TOKENIZER).iterdir())]
    for file in added:
        replace_durably(file, file.read_bytes())
    sync_directory(made / TOKENIZER)
    return {str(file.relative_to(made)): checksum(file) for file in added}


def summarize(manifest: Manifest) -> dict[str, Any]:
    """What there is of a prepared directory to say to its maker."""
    splits = manifest.splits.values()
    return {
        "documents": sum(split.documents for split in splits),
        "sentences": sum(split.sentences for split in splits),
        "tokens": sum(split.tokens for split in splits),
        "duplicates": manifest.dropped["duplicates"],
        "shards": sum(len(split.shards) for split in splits),
        "digest": manifest.digest,
        "dropped": manifest.dropped,
        "mended": manifest.mended,
        "mended_in": list(manifest.mended_in),
        "left_out": manifest.left_out,
        "sources": {source.name: source.documents for source in manifest.request.sources},
    }
