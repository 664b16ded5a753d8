"""What all ranks must have alike before they build anything: recipe, data, DeepSpeed's configuration, streams."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from dsbert.base.collectives import gather_json, raise_on_all_ranks
from dsbert.base.errors import UserError
from dsbert.base.jsonl import first_difference
from dsbert.config.recipe import Recipe
from dsbert.data.manifest import load_manifest
from dsbert.data.stream import SampleStream
from dsbert.engine.ds_config import load_ds_config
from dsbert.training.evaluate import EVAL_SEED


def open_streams(recipe: Recipe, path: Path, suspect: Container[str]) -> tuple[SampleStream, SampleStream | None]:
    """Of training and of held-out text, if there is any. suspect: what is not to be believed without a look. Raises
    UserError, DataError."""
    data = recipe.data
    options = (data.nsp, data.mask_fraction)
    train = SampleStream.open(path, "train", data.seq_len, recipe.seed, *options, data.shuffle_window, suspect)
    held_out = None
    if load_manifest(path).splits["validation"].documents:
        held_out = SampleStream.open(path, "validation", data.seq_len, EVAL_SEED, *options, 0, suspect)
    return train, held_out


def with_absolute_path(recipe: Recipe) -> Recipe:
    """For the checkpoint, which is evaluated from other working directories."""
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": recipe.data.path.resolve()})})


def assert_same_everywhere(recipe: Recipe, data_digest: str, run_dir: Path) -> None:
    """Raise UserError on every rank, naming a key and a rank, unless all ranks have the same recipe, data and DeepSpeed
    configuration."""
    ds_config = raise_on_all_ranks(lambda: load_ds_config(recipe, 1, 1, run_dir))
    mine = recipe.model_dump(mode="json") | {"data_digest": data_digest, "DeepSpeed": ds_config}
    everything = gather_json(mine)
    for rank, other in enumerate(everything):
        difference = first_difference(everything[0], other)
        if difference:
            key, first, found = difference
            raise UserError(
                f"expected one recipe on all ranks, found {key} = {found!r} on rank {rank} and {first!r} on "
                "rank 0: start all ranks with the same command"
            ).for_all()
