"""What can be seen to be wrong before any rank starts: once, and by `dsbert submit` hours before the nodes see it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from dsbert.base.errors import DsbertError, UserError
from dsbert.base.jsonl import first_difference, parse_object
from dsbert.cluster.ranks import RankInfo
from dsbert.cluster.secret import SECRET_ENV
from dsbert.config.architectures import ARCHITECTURES
from dsbert.config.complaints import in_one_line
from dsbert.config.recipe import Recipe
from dsbert.data.manifest import Manifest, load_manifest
from dsbert.engine.ds_config import load_ds_config, merged_config

_COMPLAINT_S = 10.0  # how long ranks wait for others that have the same to say


@contextmanager
def said_once(ranks: RankInfo | None) -> Iterator[None]:
    """Ranks that have not met, and have nothing to meet for: those with one complaint meet about that, by a secret that
    follows from it. If all come, the first says it for them; if not, each says its own."""
    try:
        yield
    except DsbertError as error:
        if ranks and ranks.world_size > 1:
            from dsbert.cluster.rendezvous import meet

            words = f"{os.environ.get(SECRET_ENV)}\0{error}"
            os.environ.update({SECRET_ENV: hashlib.sha256(words.encode()).hexdigest(), "RANK": str(ranks.rank)})
            with suppress(DsbertError):
                meet(ranks, _COMPLAINT_S)
                error.shared = True
        raise


def frozen(recipe: Recipe) -> Recipe:
    """The recipe without anything that is still to be looked up: DeepSpeed's configuration inside, paths absolute.

    Raises UserError.
    """
    load_ds_config(recipe, 1, 1)
    data = recipe.data
    stage_to = data.stage_to.absolute() if data.stage_to else None
    return recipe.model_copy(
        update={
            "init_from": recipe.init_from.absolute() if recipe.init_from else None,
            "data": data.model_copy(update={"path": data.path.absolute(), "stage_to": stage_to}),
            "deepspeed": recipe.deepspeed.model_copy(update={"config": merged_config(recipe), "overrides": {}}),
        }
    )


def assert_init_from(recipe: Recipe, run_dir: Path) -> None:
    """Raises UserError unless what the recipe names is there, or the run has checkpoints of its own."""
    path = recipe.init_from
    if path is not None and not path.exists() and not (run_dir / "checkpoints").is_dir():
        raise UserError(
            f"expected init_from={path} to be a run, a checkpoint, an export or a transformers directory, found nothing"
        )


def assert_startable(recipe: Recipe, run_dir: Path) -> None:
    """What ranks would find one after the other, and each of them: said at once, and once. Raises UserError."""
    complaints = []
    for check in (
        lambda: load_ds_config(recipe, 1, 1, run_dir),
        lambda: assert_data(recipe),
        lambda: assert_init_from(recipe, run_dir),
        lambda: assert_writable(run_dir),
    ):
        try:
            check()
        except UserError as error:
            complaints.append(str(error))
    if complaints:
        raise UserError(in_one_line(complaints))


def assert_data(recipe: Recipe) -> Manifest:
    """Raise UserError if there is no prepared data that can be read."""
    manifest = load_manifest(recipe.data.path)
    if not os.access(recipe.data.path, os.R_OK | os.X_OK):
        raise UserError(f"expected to read the data in {recipe.data.path}, found it closed to us: see to its mode")
    return manifest


def assert_whole(recipe: Recipe, manifest: Manifest) -> None:
    """Raise UserError if a shard is missing or cut short, or blocks do not fit: ranks look again, and more closely."""
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        path = recipe.data.path / shard.file
        found = path.stat().st_size if path.is_file() else "none"
        if found != shard.bytes:
            raise UserError(f"expected {shard.bytes} bytes in {path}, found {found}: prepare the data again")
    _assert_blocks_fit(recipe)


def _assert_blocks_fit(recipe: Recipe) -> None:
    """Without building the model, which takes torch: of the layers that are sparse unless others are named."""
    sparsity, model = recipe.sparsity, recipe.model
    if sparsity.pattern == "dense" or sparsity.modules != (ARCHITECTURES[model.architecture].encoder,):
        return
    for width in (model.hidden_size, model.intermediate_size):
        if width % sparsity.block_size:
            raise UserError(
                f"expected a block size that divides {model.hidden_size} x {width}, found {sparsity.block_size}"
            )


def assert_writable(run_dir: Path) -> None:
    """Raise UserError if the run directory cannot be made, or not be written."""
    existing = run_dir
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"expected a run directory at {run_dir}, found the file {existing}: choose another --run-dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"expected to write in {existing}, found it read-only for us: choose another --run-dir")


def assert_identity(recipe: Recipe, data_digest: str | None, run_dir: Path, queued: dict[str, Any] | None) -> None:
    """Raise UserError if the directory holds a run of another identity.

    queued: the identity of a job that is to write there before, and may not have begun. data_digest: None where the
    data is still to be made.
    """
    identity = recipe.identity() | ({"data_digest": data_digest} if data_digest else {})
    before = _recorded(run_dir) or queued
    if before is None:
        return
    if "data_digest" in before:  # that of a run, of which a job knows no more than its recipe
        from dsbert.data.stream import assert_samples

        assert_samples(before, run_dir)
    common = {key: value for key, value in identity.items() if key in before}
    difference = first_difference({key: before[key] for key in common}, common)
    if difference:
        key, old, new = difference
        raise UserError(f"expected {key} = {old!r} as in the run in {run_dir}, found {new!r}: choose another --run-dir")


def _recorded(run_dir: Path) -> dict[str, Any] | None:
    """Of the newest checkpoint, or of the start that took steps; None if nothing tells."""
    for path in sorted((run_dir / "checkpoints").glob("step_[0-9]*[0-9]"), reverse=True):
        with suppress(OSError, KeyError, TypeError):
            return dict((parse_object((path / "state.json").read_bytes()) or {})["identity"])
    with suppress(OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        if (run_dir / "metrics.jsonl").stat().st_size:
            return dict(yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))["identity"])
    return None
