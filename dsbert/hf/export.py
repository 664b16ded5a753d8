"""Hand a trained model on: as a dense transformers model with its blocks beside it, or as a sparse one.

export.json names what an export wrote, with checksums. It is what tells our files from those of others, which an export
leaves alone, and it is written last: where it says `complete: false`, an export was cut short on its way.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from dsbert.base.durable import checksum, differences, publish
from dsbert.base.errors import UserError
from dsbert.base.jsonl import parse_object
from dsbert.checkpoint.weight_source import COMPACT
from dsbert.hf.export_forms import COMPACT_FORMATS, FORMS, write_form
from dsbert.hf.hub_upload import check_hub_name, upload
from dsbert.hf.model_card import CARD, is_as_written

_TEMPORARY = ".dsbert-export-"
RECORD = "export.json"
_FORMAT = "dsbert-export-1"
_MOST_BYTES = 1 << 20  # of a record, and of the header of a compact file
_SHOWN_FILES = 3
# Exports of before there was a record have these.
_ALWAYS = ("config.json", "model.safetensors", COMPACT, "tokenizer.json", "tokenizer_config.json", "vocab.txt")


def export(
    path: Path, to: Path, form: str = "dense", push_to_hub: str | None = None, private: bool | None = None
) -> dict[str, Any]:
    """Write a checkpoint, or the newest one of a run, into the directory `to`: what a form has (export_forms.py), and
    export.json.

    form "dense": config.json, model.safetensors and the tokenizer, for transformers' class of the model and
    AutoTokenizer; README.md; sparse.safetensors with "<layer>.blocks" [K, B, B], ".rows", ".cols" (int32 [K]) and every
    dense parameter by name; of a model with sparsity.low_rank also ".low_rank_u" [out, r] and ".low_rank_v" [r, in],
    where the weight is the blocks and U V, and the format in its metadata is dsbert-compact-2 in place of
    dsbert-compact-1. form "sparse": config.json, model.safetensors and the tokenizer, for dsbert.hf; README.md.
    Of an earlier export in `to`, its own files are replaced, one by one and each whole; a README.md that somebody has
    written stays. push_to_hub: the name of a repository on the hub that then gets these files (hub_upload.py).
    Returns the step, the directory, its files and, if they were uploaded, the commit. Raises UserError if `to` holds
    something else or cannot be written, or the hub refuses; CheckpointError without a valid checkpoint.
    """
    from dsbert.checkpoint.restore import restore_model

    if form not in FORMS:
        raise UserError(f"expected a form of {', '.join(FORMS)}, found {form!r}: give one of these")
    if push_to_hub is not None:
        check_hub_name(push_to_hub)
    with _plainly(to):
        to = Path(os.path.realpath(to))
        before = _earlier_files(to)
    restored = restore_model(path)
    with _plainly(to):
        # Inside of what is there already, which may be all that we may write to.
        place = to.parent if before is None else to
        place.mkdir(parents=True, exist_ok=True)
        with _alone(to) if before is not None else nullcontext():
            temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=place))
            try:
                write_form(restored, form, path, temporary)
                if os.path.lexists(to / CARD) and not is_as_written(to / CARD):
                    (temporary / CARD).unlink()  # somebody's own words stay
                files = {file.name: checksum(file) for file in sorted(temporary.iterdir())}
                record = {"format": _FORMAT, "step": restored.state.step, "files": files}
                _put(temporary, to, record, before)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    found = {"step": record["step"], "to": str(to), "files": sorted([*files, RECORD])}
    if push_to_hub is not None:
        message = f"{restored.recipe.name} at step {restored.state.step}"
        uploaded = [name for name in {*files, CARD} if (to / name).is_file()]
        found["commit"] = upload(to, push_to_hub, uploaded, message, private)
    return found


@contextmanager
def _alone(to: Path) -> Iterator[None]:
    """No other export to the same place meanwhile; what killed ones have left is removed. Raises UserError."""
    descriptor = os.open(to, os.O_RDONLY)  # of the directory itself: a lock file would go with what is handed on
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"expected no other export to {to} at work, found one: wait for it") from None
        for left in to.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _plainly(to: Path) -> Iterator[None]:
    """What the file system refuses becomes one line."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        found = f"{error.strerror or error} ({error.filename or to})"
        raise UserError(f"expected to write an export to {to}, found: {found}") from None
    except SafetensorError as error:
        raise UserError(f"expected to write an export to {to}, found: {error}") from None


def _earlier_files(to: Path) -> dict[str, str | None] | None:
    """The files of an earlier export in `to`, with checksums where they are known; None if `to` is not there.

    Raises UserError if it is something else, OSError.
    """
    there = next(place for place in (to, *to.parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"expected a directory to export to, found the file {there}: give another --to")
    if there != to:
        return None
    names = sorted(name for name in os.listdir(to) if not name.startswith(_TEMPORARY))
    if not names:
        return {}
    record = parse_object(_head(to / RECORD))
    if record and record.get("format") == _FORMAT and isinstance(record.get("files"), dict):
        files = {name: value if isinstance(value, str) else None for name, value in record["files"].items()}
        return {RECORD: None} | {name: value for name, value in files.items() if name == Path(name).name}
    if RECORD not in names and _is_compact(to / COMPACT):
        return {name: None for name in _ALWAYS if name in names}
    more = f" and {len(names) - _SHOWN_FILES} more" if len(names) > _SHOWN_FILES else ""
    raise UserError(
        f"expected a new directory, or an earlier export, at {to}, found {', '.join(names[:_SHOWN_FILES])}{more}: give "
        "another --to"
    )


def _head(path: Path) -> bytes:
    """The beginning of a file that is one; of what else may stand there, a FIFO, nothing waits."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(_MOST_BYTES)


def _is_compact(path: Path) -> bool:
    """Whether it is a sparse.safetensors of ours, and not only called so."""
    head = _head(path)
    header = parse_object(head[8 : 8 + int.from_bytes(head[:8], "little")]) or {}
    metadata = header.get("__metadata__")
    return isinstance(metadata, dict) and metadata.get("format") in COMPACT_FORMATS


def _put(temporary: Path, to: Path, record: dict[str, Any], before: dict[str, str | None] | None) -> None:
    """Have `to` hold the new files in the place of those before. Raises UserError, OSError."""
    new: dict[str, str] = record["files"]
    _write_record(temporary / RECORD, record, complete=True)
    for file in temporary.iterdir():
        file.chmod(0o666 & ~_umask())
    if before is None:
        for file in temporary.iterdir():
            publish(file, file)
        temporary.chmod(0o777 & ~_umask())
        temporary.rename(to)
        return
    for name in {*new, RECORD} - {CARD}:  # a card that is among the new ones replaces none but ours
        if os.path.lexists(to / name) and (name not in before or (to / name).is_dir()):
            raise UserError(f"expected no {name} of somebody else in {to}, found one: move it, or give another --to")
    unfinished = temporary / f"{RECORD}.unfinished"
    _write_record(unfinished, record | {"files": before | new}, complete=False)
    publish(unfinished, to / RECORD)
    for name in new:
        publish(temporary / name, to / name)
    gone = {name: value for name, value in before.items() if value and name not in new}
    changed = differences(to, {name: value for name, value in gone.items() if value})
    for name in gone.keys() - changed.keys():  # what was changed since belongs to whoever changed it
        (to / name).unlink()
    publish(temporary / RECORD, to / RECORD)


def _write_record(path: Path, record: dict[str, Any], *, complete: bool) -> None:
    path.write_text(json.dumps(record | {"complete": complete}, indent=1) + "\n", encoding="utf-8")
    path.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
