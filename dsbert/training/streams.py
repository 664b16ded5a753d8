"""The data of a run, opened on all ranks: verified, its sample indices built by one rank, staged where asked for."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

from dsbert.base.collectives import gather_json, on_main_rank, raise_on_all_ranks, run_with_keepalive
from dsbert.config.recipe import Recipe
from dsbert.data.manifest import load_manifest
from dsbert.data.staging import stage
from dsbert.data.stream import SampleStream
from dsbert.data.verification import verify_data
from dsbert.training.agreement import Agreement
from dsbert.training.evaluate import EVAL_SEED


class Streams(NamedTuple):
    """Samples of training text, and of held-out text if there is any."""

    train: SampleStream
    held_out: SampleStream | None


def open_data(agreed: Agreement) -> Streams:
    """Collective. Raises the same UserError, DataError or StorageError on every rank."""
    recipe, world, data = agreed.recipe, agreed.world, agreed.recipe.data
    damaged = raise_on_all_ranks(lambda: verify_data(data.path, data.seq_len, part=(world.rank, world.world_size)))
    suspect = {name for names in gather_json(damaged) for name in names}
    # One rank builds the sample indices, the others then find them, and so do copies.
    built_here = on_main_rank(lambda: _open_streams(recipe, data.path, suspect), keepalive=True)
    run_with_keepalive(lambda: stage(data.path, data.stage_to))
    neighbours = [rank for rank, host in enumerate(agreed.hosts) if host == world.host]
    part = (neighbours.index(world.rank), len(neighbours))
    path = run_with_keepalive(lambda: stage(data.path, data.stage_to, part))
    kept = built_here if path == data.path else None
    return raise_on_all_ranks(lambda: kept or _open_streams(recipe, path, suspect))


def _open_streams(recipe: Recipe, path: Path, suspect: Container[str]) -> Streams:
    """suspect: what is not to be believed without a look. Raises UserError, DataError."""
    data = recipe.data
    options = (data.nsp, data.mask_fraction)
    train = SampleStream.open(path, "train", data.seq_len, recipe.seed, *options, data.shuffle_window, suspect)
    held_out = None
    if load_manifest(path).splits["validation"].documents:
        held_out = SampleStream.open(path, "validation", data.seq_len, EVAL_SEED, *options, 0, suspect)
    return Streams(train, held_out)
