"""Checkpoints: what they hold, whether they are whole, and how they are loaded. writer.py makes them.

    step_00001000/
        fragments-00000-of-00002.safetensors    weights and moments, one file per rank (fragments.py)
        topology.safetensors                    rows, cols, births and explored positions of every sparse weight
        state.json                              counters, identity, recipe, shapes
        tokenizer/, unigram.npy                 what evaluation and export need of the data
        manifest.json                           name, size and checksum of every file above
    latest                                      name of the newest one and its manifest's checksum, for people and tools
    step_00001000.damaged-<attempt>             moved aside by the attempt that came to this step again

Names with a dot in front belong to a writer at work, or to one that was killed.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import torch

from dsbert.base.collectives import gather_json
from dsbert.base.durable import checksum
from dsbert.base.errors import CheckpointError, UserError, printable
from dsbert.checkpoint.fragments import FragmentReader, fragments_name
from dsbert.checkpoint.state import MANIFEST, STATE, CheckpointState, manifest_object, read_manifest, read_state
from dsbert.engine.zero_shards import forward_copies, set_adam_step
from dsbert.sparse import BlockTopology, MaskManager
from dsbert.sparse.mask_manager import state_parts
from dsbert.sparse.topology import combined_digest

if TYPE_CHECKING:
    from dsbert.engine.train_engine import TrainEngine

TOPOLOGY, LATEST = "topology.safetensors", "latest"


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file of a checkpoint."""

    file: str
    problem: str


def step_name(step: int) -> str:
    """The directory of the checkpoint of a step; names sort as steps do."""
    return f"step_{step:08d}"


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or of a run directory the newest that verifies.

    Raises UserError if `path` is neither, CheckpointError if no checkpoint verifies.
    """
    if (path / MANIFEST).is_file() or (path / STATE).is_file():
        _raise_if_damaged(path)
        return path
    if not (path / "checkpoints").is_dir():
        raise UserError(f"expected a run directory or a checkpoint at {path}, found neither")
    newest, skipped = newest_checkpoint(path / "checkpoints")
    for line in skipped:
        print(f"dsbert: skipped a damaged checkpoint: {printable(line)}", file=sys.stderr)
    if newest is None:
        raise CheckpointError(f"expected a valid checkpoint in {path / 'checkpoints'}, found none")
    return newest


def published(root: Path) -> list[Path]:
    """The checkpoints under their final names, oldest first. Raises OSError where they cannot be listed."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    return sorted(root / name for name in names if re.fullmatch("step_[0-9]{8}", name))


def newest_checkpoint(root: Path, rank: int = 0, world_size: int = 1) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies on every rank, and a line for each newer one that does not.

    Collective if world_size > 1: rank 0 lists, the ranks share the reading, and all return the same.
    """
    names = [path.name for path in published(root)] if rank == 0 else []
    skipped: list[str] = []
    for name in reversed(gather_json(names)[0]):
        path = root / name
        found = gather_json(
            [
                _manifest_checksum(path),
                [vars(problem) for problem in verify_checkpoint(path, part=(rank, world_size))],
            ]
        )
        problems = [problem for _, own in found for problem in own]
        for other, (manifest, _) in enumerate(found):
            if manifest != found[0][0]:
                problems.append({"file": MANIFEST, "problem": f"rank {other} reads another one than rank 0"})
        if not problems:  # whole files may still be of several checkpoints
            problems = gather_json([vars(problem) for problem in _contradictions(path)] if rank == 0 else [])[0]
        if not problems:
            return path, skipped
        skipped.append(f"{path / problems[0]['file']}: {problems[0]['problem']}")
    return None, skipped


def verify_checkpoint(
    path: Path, part: tuple[int, int] = (0, 1), count: Callable[[int], object] = lambda nbytes: None
) -> list[Problem]:
    """Read everything; what is wrong, or nothing. part = (k, n): of the files, read every n-th from the k-th on.

    count: told the bytes of every piece that was read.
    """
    try:
        manifest = manifest_object(path)
        entries = [(str(name), int(entry["bytes"]), str(entry["xxh3"])) for name, entry in manifest["files"].items()]
        world_size = manifest["world_size"]
        if not 0 < world_size <= len(entries):
            raise ValueError(f"a world of {world_size} ranks with {len(entries)} files")
        needed = {STATE, TOPOLOGY, *(fragments_name(rank, world_size) for rank in range(world_size))}
        if outside := [name for name, *_ in entries if not lies_inside(name)]:
            raise ValueError(f"expected names of files in the checkpoint, found {outside[0]!r}")
    except CheckpointError as error:
        return [Problem(MANIFEST, str(error))]
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        return [Problem(MANIFEST, f"unreadable: {' '.join(str(error).split())}")]
    problems = [Problem(name, "not in the manifest") for name in sorted(needed - {name for name, *_ in entries})]
    for name, size, expected in entries[part[0] :: part[1]]:
        file = path / name
        try:
            if not file.is_file():
                there = os.path.lexists(file)
                problems.append(Problem(name, "expected a file, found something else" if there else "missing"))
            elif file.stat().st_size != size:
                problems.append(Problem(name, f"expected {size} bytes, found {file.stat().st_size}"))
            elif checksum(file, count) != expected:
                problems.append(Problem(name, "the checksum differs"))
        except OSError as error:
            problems.append(Problem(name, f"unreadable: {error.strerror}"))
    return problems


def checkpoint_problems(path: Path) -> list[Problem]:
    """What keeps a checkpoint from being loaded: files that are not what was written, or not of one checkpoint."""
    return verify_checkpoint(path) or _contradictions(path)


def _contradictions(path: Path) -> list[Problem]:
    """Whether manifest, state and topology are of one checkpoint, whatever their checksums say."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [Problem(MANIFEST, str(error))]
    try:
        state = read_state(path)
        if re.fullmatch("step_[0-9]{8}", path.name) and path.name != step_name(state.step):
            raise ValueError(f"expected the step of {path.name}, found {state.step}")
        for key, own, expected in (
            ("step", state.step, manifest.step),
            ("world_size", state.world_size, manifest.world_size),
        ):
            if own != expected:
                raise ValueError(f"expected {key} = {expected} as in {MANIFEST}, found {own}")
        if state.adam_step > state.step:
            raise ValueError(f"expected at most {state.step} as adam_step, found {state.adam_step}")
    except (CheckpointError, ValueError) as error:
        return [Problem(STATE, str(error))]
    try:
        found = _topology_digest(path, state)
    except (CheckpointError, ValueError) as error:
        return [Problem(TOPOLOGY, str(error))]
    if found != manifest.topology_digest:
        message = f"expected the topology {manifest.topology_digest} as in {MANIFEST}, found {found}"
        return [Problem(TOPOLOGY, message)]
    return []


def _topology_digest(path: Path, state: CheckpointState) -> str:
    """Of the topology in the file. Raises CheckpointError, or ValueError if it does not fit the layers."""
    tensors, digests = read_topology(path), {}
    kinds = state_parts(state.recipe.sparsity.fresh_moments)
    for name, layer in state.layers.items():
        if layer.block_size is None:
            continue
        parts = [f"{name}.{kind}" for kind in kinds]
        if missing := [part for part in parts if part not in tensors]:
            raise ValueError(f"expected {missing[0]}, found nothing of that name")
        rows, cols = tensors[parts[0]], tensors[parts[1]]
        topology = BlockTopology(layer.out_in, layer.block_size, rows, cols)
        if state.params.get(f"{name}.blocks") != [topology.num_active, layer.block_size, layer.block_size]:
            raise ValueError(f"expected {name} with the blocks of {STATE}, found {topology.num_active}")
        digests[name] = topology.digest()
    return combined_digest(digests)


def lies_inside(name: str) -> bool:
    """Whether what a manifest calls a file can only be one of the checkpoint's own."""
    parts = PurePosixPath(name).parts
    return bool(parts) and ".." not in parts and not name.startswith("/")


def read_topology(path: Path) -> dict[str, torch.Tensor]:
    """The mask manager's state of a checkpoint. Raises CheckpointError."""
    from safetensors.torch import load_file

    try:
        tensors: dict[str, torch.Tensor] = load_file(path / TOPOLOGY)
    except Exception as error:  # safetensors raises its own type, which is not an OSError
        raise CheckpointError(f"expected safetensors in {path / TOPOLOGY}, found: {error}") from None
    return tensors


def fragment_files(path: Path) -> list[Path]:
    """Those of a verified checkpoint, whatever else lies beside them. Raises CheckpointError."""
    world_size = read_manifest(path).world_size
    return [path / fragments_name(rank, world_size) for rank in range(world_size)]


def fragment_reader(path: Path) -> FragmentReader:
    """Over all fragment files of a verified checkpoint. Raises CheckpointError."""
    return FragmentReader(fragment_files(path))


@torch.no_grad()
def load_checkpoint(path: Path, engine: TrainEngine, masks: MaskManager) -> CheckpointState:
    """Restore weights, moments, topology and counters from a verified checkpoint, at any world size and ZeRO stage.

    Each rank reads the pieces that overlap its own shards. Returns state.json. Raises CheckpointError.
    """
    state, manifest = read_state(path), read_manifest(path)
    if state.step > engine.recipe.optim.total_steps:
        raise CheckpointError(f"expected {path} to be of the run's {engine.recipe.optim.total_steps} steps, found more")
    reader = fragment_reader(path)
    masks.load_state_dict(read_topology(path), step=state.step)
    if masks.digest() != manifest.topology_digest:
        found = f"{masks.digest()} instead of {manifest.topology_digest}"
        raise CheckpointError(f"expected the topology that {path} was saved with, found {found}: see `dsbert verify`")
    stepped = state.adam_step > 0  # before Adam's first step there are no moments
    if stepped:
        set_adam_step(engine.deepspeed_engine, state.adam_step)
    for name, param in engine.parameters.items():
        shard = engine.shard(name)
        for kind, tensor in {"master": shard.master, **(shard.moments if stepped else {})}.items():
            tensor.copy_(torch.from_numpy(reader.read(name, kind, shard.offset, shard.numel)))
        for tensor, offset in forward_copies(param):
            tensor.copy_(torch.from_numpy(reader.read(name, "master", offset, tensor.numel())))
    engine.plan_kernels(state.kernels)
    engine.step = state.step
    engine.restore_counters(state.engine.to_json())
    masks.verify_replicas()
    return state


def _raise_if_damaged(path: Path) -> None:
    problems = checkpoint_problems(path)
    if problems:
        raise CheckpointError(f"expected a valid checkpoint, found {path / problems[0].file}: {problems[0].problem}")


def _manifest_checksum(path: Path) -> str | None:
    try:
        return checksum(path / MANIFEST)
    except OSError:
        return None
