"""Hand a trained model on: as a dense transformers model, and as its blocks.

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
from dsbert.checkpoint.state import read_manifest
from dsbert.data.manifest import TOKENIZER
from dsbert.data.preparing.tokenizer_check import check_saved
from dsbert.data.tokenizer import Vocabulary, load_tokenizer, save_tokenizer
from dsbert.sparse.low_rank import PARTS

_TEMPORARY = ".dsbert-export-"
COMPACT = "sparse.safetensors"
RECORD = "export.json"
_FORMAT = "dsbert-export-1"
# The second has low-rank terms: who knows the first alone is to refuse it, and not to take blocks for the weight.
_COMPACT_FORMATS = ("dsbert-compact-1", "dsbert-compact-2")
_MOST_BYTES = 1 << 20  # of a record, and of the header of a compact file
_SHOWN_FILES = 3
# Exports of before there was a record have these.
_ALWAYS = ("config.json", "model.safetensors", COMPACT, "tokenizer.json", "tokenizer_config.json", "vocab.txt")


def export(path: Path, to: Path) -> dict[str, Any]:
    """Write a checkpoint, or the newest one of a run, into the directory `to`:

    config.json, model.safetensors and the tokenizer, for transformers' class of the model and AutoTokenizer;
    sparse.safetensors with "<layer>.blocks" [K, B, B], ".rows", ".cols" (int32 [K]) and every dense parameter by name;
    of a model with sparsity.low_rank also ".low_rank_u" [out, r] and ".low_rank_v" [r, in], where the weight is the
    blocks and U V, and the format in its metadata is dsbert-compact-2 in place of dsbert-compact-1;
    and export.json. Of an earlier export in `to`, its own files are replaced, one by one and each whole.
    Raises UserError if `to` holds something else or cannot be written, CheckpointError without a valid checkpoint.
    """
    from dsbert.checkpoint.restore import restore_model

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
                _write(restored, temporary)
                files = {file.name: checksum(file) for file in sorted(temporary.iterdir())}
                record = {"format": _FORMAT, "step": restored.state.step, "files": files}
                _put(temporary, to, record, before)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return {"step": record["step"], "to": str(to), "files": sorted([*files, RECORD])}


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
    return isinstance(metadata, dict) and metadata.get("format") in _COMPACT_FORMATS


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
    for name in [*new, RECORD]:
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


def _write(restored: Any, to: Path) -> None:
    """All files of an export but the record."""
    for name in read_manifest(restored.path).files:  # no more than was verified, whatever else lies there
        if name.startswith(f"{TOKENIZER}/"):
            shutil.copyfile(restored.path / name, to / Path(name).name)
    tokenizer = load_tokenizer(to)
    # As this version writes it: an older one had transformers rebuild normalisers that are not BERT's.
    save_tokenizer(tokenizer, to)
    check_saved(to)
    model = transformers_model(restored)
    _limit_tokenizer(to / "tokenizer_config.json", model.config.max_position_embeddings)
    model.save_pretrained(to)
    _save_compact(restored, to / COMPACT)


def transformers_model(restored: Any) -> Any:
    """A restored model (checkpoint/restore.py) as transformers has it: of its class, with dense weights, and with the
    ids of special tokens in its configuration."""
    from dsbert.models.spec import model_spec

    spec, config = model_spec(restored.recipe.model), restored.model.config
    vocabulary = Vocabulary.of(load_tokenizer(restored.path / TOKENIZER))
    for name, token in spec.special_tokens.items():
        setattr(config, name, getattr(vocabulary, token))
    model = spec.exported(config)
    weights = dense_state(restored)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if name not in model.all_tied_weights_keys]
    assert not missing, missing
    assert not unexpected, unexpected
    model.tie_weights()
    return model


def _limit_tokenizer(path: Path, max_positions: int) -> None:
    """Have the tokenizer know how long a text the model takes: `truncation=True` cuts there."""
    config = parse_object(path.read_bytes())
    if config is None:
        raise UserError(f"expected a JSON object in {TOKENIZER}/{path.name} of the checkpoint, found none")
    text = json.dumps(config | {"model_max_length": max_positions}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def dense_state(restored: Any) -> dict[str, Any]:
    """The parameters of the transformers model by name: sparse weights as dense [out, in] ones, with what stands beside
    their blocks."""
    state = {}
    for name, param in restored.model.named_parameters():
        layer = restored.layers.get(name.rpartition(".")[0])
        if layer is not None and name.endswith(".blocks"):
            state[name.removesuffix("blocks") + "weight"] = layer.to_dense()
        elif layer is None or not name.endswith(PARTS):
            state[name] = param.detach()
    return state


def _save_compact(restored: Any, path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name: param.detach().contiguous() for name, param in restored.model.named_parameters()}
    for name, layer in restored.layers.items():
        tensors[f"{name}.rows"], tensors[f"{name}.cols"] = layer.rows.contiguous(), layer.cols.contiguous()
    shapes = {name: [*layer.shape, layer.block_size] for name, layer in restored.layers.items()}
    form = _COMPACT_FORMATS[any(layer.low_rank for layer in restored.layers.values())]
    metadata = {"format": form, "layers": json.dumps(shapes), "step": str(restored.state.step)}
    save_file(tensors, path, metadata=metadata)
