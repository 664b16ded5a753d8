"""What all ranks of a run have alike before they build anything: recipe, data, DeepSpeed's configuration, directory."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path

import xxhash

from dsbert.base.collectives import gather_json, on_main_rank, raise_on_all_ranks
from dsbert.base.durable import SHOWN_WITHIN_S
from dsbert.base.errors import UserError
from dsbert.base.jsonl import first_difference
from dsbert.cluster.health import Heartbeat
from dsbert.cluster.process_group import World
from dsbert.config.recipe import Recipe
from dsbert.data.manifest import Manifest, load_manifest
from dsbert.engine.ds_config import load_ds_config
from dsbert.training.run_directory import RunDirectory


@dataclass(frozen=True, eq=False)
class Agreement:
    """manifest: of the data; nonce: drawn at this start, the same on all ranks; hosts: by rank; heartbeat: of this
    rank, which does not beat yet; timeout_s: how long a collective waits for a peer."""

    recipe: Recipe
    world: World
    timeout_s: float
    directory: RunDirectory
    manifest: Manifest
    nonce: str
    hosts: list[str]
    heartbeat: Heartbeat


def agree(recipe: Recipe, run_dir: Path, world: World, timeout_s: float) -> Agreement:
    """Collective. Raises UserError on every rank if they differ in recipe, data or configuration, or share no
    directory."""
    manifest = raise_on_all_ranks(lambda: load_manifest(recipe.data.path))
    _assert_same_everywhere(recipe, manifest.digest, run_dir)
    everybody = gather_json([secrets.token_hex(8), world.host])
    nonce: str = everybody[0][0]
    hosts: list[str] = [host for _, host in everybody]
    directory = RunDirectory(run_dir)
    _assert_shared(directory, nonce, hosts, patience_s=min(SHOWN_WITHIN_S, timeout_s / 2))
    heartbeat = Heartbeat(directory.heartbeats(nonce), world.rank, hosts, timeout_s)
    return Agreement(recipe, world, timeout_s, directory, manifest, nonce, hosts, heartbeat)


def _assert_same_everywhere(recipe: Recipe, data_digest: str, run_dir: Path) -> None:
    """Raise UserError on every rank, naming a key and a rank, unless all ranks have the same recipe, data and DeepSpeed
    configuration."""
    ds_config = raise_on_all_ranks(lambda: load_ds_config(recipe, 1, 1, run_dir))
    mine = recipe.model_dump(mode="json") | {"data_digest": data_digest, "DeepSpeed": ds_config}
    text = json.dumps(mine, sort_keys=True)
    if len(set(gather_json(xxhash.xxh3_128_hexdigest(text.encode())))) == 1:
        return
    everything = gather_json(mine)
    for rank, other in enumerate(everything):
        difference = first_difference(everything[0], other)
        if difference:
            key, first, found = difference
            raise UserError(
                f"expected one recipe on all ranks, found {key} = {found!r} on rank {rank} and {first!r} on "
                "rank 0: start all ranks with the same command"
            ).for_all()


def _assert_shared(directory: RunDirectory, nonce: str, hosts: list[str], patience_s: float) -> None:
    """Raise UserError on every rank unless all see the directory that rank 0 makes."""
    on_main_rank(lambda: directory.mark(nonce))
    seen = gather_json([directory.sees(nonce, patience_s), str(directory.path.resolve())])
    for rank, (sees, path) in enumerate(seen):
        if not sees:
            raise UserError(
                f"run directory is not shared: rank {rank} on {hosts[rank]} does not see in {path} what rank "
                f"0 on {hosts[0]} wrote to {seen[0][1]}: choose a --run-dir on a file system of all nodes, "
                "the same on all ranks"
            ).for_all()
