"""Checkpoints: written in parallel, published at once or not at all, verified before use.

    step_00001000/
        fragments-00000-of-00002.safetensors    weights and moments, one file per rank (fragments.py)
        topology.safetensors                    rows, cols, birth and explored positions of every sparse weight
        state.json                              counters, identity, recipe, shapes
        tokenizer/, unigram.npy                 what evaluation and export need of the data
        manifest.json                           name, size and checksum of every file above
    latest                                      name of the newest one and its manifest's checksum, for people and tools

Ranks write into a directory named after the attempt; rank 0 writes the manifest from what the ranks say they wrote (a
listing of a network file system may be stale), renames, and only then replaces `latest`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from dsbert.distributed import World, gather_json, together
from dsbert.errors import CheckpointError, DsbertError, UserError
from dsbert.fragments import FragmentReader, fragments_name, write_durably, write_fragments
from dsbert.sparse import MaskManager
from dsbert.zero_shards import adam_step, forward_copies, set_adam_step

if TYPE_CHECKING:
    from dsbert.engine import TrainEngine

MANIFEST, STATE, TOPOLOGY, LATEST = "manifest.json", "state.json", "topology.safetensors", "latest"
KIND, FORMAT = "dsbert-checkpoint", 1


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file of a checkpoint."""

    file: str
    problem: str


def step_name(step: int) -> str:
    """The directory of the checkpoint of a step; names sort as steps do."""
    return f"step_{step:08d}"


def save_checkpoint(
    root: Path,
    engine: TrainEngine,
    masks: MaskManager,
    state: dict[str, Any],
    companions: Path,
    *,
    attempt: str,
    keep: int,
) -> Path:
    """Write, publish and return the checkpoint of the engine's present step. Collective.

    root: the run's `checkpoints` directory. state: what state.json holds beside the counters. companions: a directory
    whose files go into the checkpoint unchanged (tokenizer, unigram counts). keep: how many of the newest remain.
    Raises the same DsbertError on every rank if any rank could not write; nothing is published then.
    """
    world = engine.world
    target = root / step_name(engine.step)
    temporary = root / f".{target.name}.{attempt}.tmp"
    together(lambda: _make_directory(temporary), only_main=True)
    written = together(lambda: _write_own(temporary, engine, masks, state, companions, world))
    entries = [entry for rank_entries in gather_json(written) for entry in rank_entries]
    together(lambda: _publish(temporary, target, entries, engine, masks, keep), only_main=True)
    return target


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
        print(f"dsbert: skipped a damaged checkpoint: {line}", file=sys.stderr)
    if newest is None:
        raise CheckpointError(f"expected a valid checkpoint in {path / 'checkpoints'}, found none")
    return newest


def newest_checkpoint(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that does not."""
    skipped: list[str] = []
    for path in reversed(_published(root)):
        problems = verify_checkpoint(path)
        if not problems:
            return path, skipped
        skipped.append(f"{path / problems[0].file}: {problems[0].problem}")
    return None, skipped


def verify_checkpoint(path: Path) -> list[Problem]:
    """Read everything; what is wrong, or nothing."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if (manifest["kind"], manifest["format"]) != (KIND, FORMAT):
            return [Problem(MANIFEST, f"expected {KIND} {FORMAT}, found {manifest['kind']} {manifest['format']}")]
        entries = [(str(name), int(entry["bytes"]), str(entry["xxh3"])) for name, entry in manifest["files"].items()]
        needed = {
            STATE,
            TOPOLOGY,
            *(fragments_name(rank, manifest["world_size"]) for rank in range(manifest["world_size"])),
        }
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return [Problem(MANIFEST, f"unreadable: {' '.join(str(error).split())}")]
    problems = [Problem(name, "not in the manifest") for name in sorted(needed - {name for name, *_ in entries})]
    for name, size, checksum in entries:
        file = path / name
        if not file.is_file():
            problems.append(Problem(name, "missing"))
        elif file.stat().st_size != size:
            problems.append(Problem(name, f"expected {size} bytes, found {file.stat().st_size}"))
        elif _checksum(file) != checksum:
            problems.append(Problem(name, "the checksum differs"))
    return problems


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises CheckpointError."""
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"expected {path / STATE}, found: {error}") from None
    if state.get("format") != FORMAT:
        raise CheckpointError(f"expected checkpoint format {FORMAT} in {path / STATE}, found {state.get('format')!r}")
    return state


def read_topology(path: Path) -> dict[str, torch.Tensor]:
    """The mask manager's state of a checkpoint."""
    from safetensors.torch import load_file

    return load_file(path / TOPOLOGY)


def fragment_reader(path: Path) -> FragmentReader:
    """Over all fragment files of a checkpoint. Raises CheckpointError."""
    return FragmentReader(sorted(path.glob("fragments-*.safetensors")))


@torch.no_grad()
def load_checkpoint(path: Path, engine: TrainEngine, masks: MaskManager) -> dict[str, Any]:
    """Restore weights, moments, topology and counters from a verified checkpoint, at any world size and ZeRO stage.

    Each rank reads the pieces that overlap its own shards. Returns state.json. Raises CheckpointError.
    """
    state = read_state(path)
    reader = fragment_reader(path)
    masks.load_state_dict(read_topology(path), step=state["step"])
    stepped = state["adam_step"] > 0  # before Adam's first step there are no moments
    if stepped:
        set_adam_step(engine.deepspeed_engine, state["adam_step"])
    for name, param in engine.parameters.items():
        shard = engine.shard(name)
        for kind, tensor in {"master": shard.master, **(shard.moments if stepped else {})}.items():
            tensor.copy_(torch.from_numpy(reader.read(name, kind, shard.offset, shard.numel)))
        for tensor, offset in forward_copies(param):
            tensor.copy_(torch.from_numpy(reader.read(name, "master", offset, tensor.numel())))
    engine.step = state["step"]
    engine.restore_counters(state["engine"])
    masks.verify_replicas()
    return state


def _write_own(
    directory: Path, engine: TrainEngine, masks: MaskManager, state: dict[str, Any], companions: Path, world: World
) -> list[dict[str, Any]]:
    """This rank's files; what it wrote, as (name, size, checksum)."""
    names = [fragments_name(world.rank, world.world_size)]
    try:
        write_fragments(directory / names[0], engine.shards())
        if world.is_main:
            names += _write_shared(directory, engine, masks, state, companions)
        return [
            {"file": name, "bytes": (directory / name).stat().st_size, "xxh3": _checksum(directory / name)}
            for name in names
        ]
    except OSError as error:
        raise DsbertError(f"could not write the checkpoint in {directory}: {error}") from None


def _write_shared(
    directory: Path, engine: TrainEngine, masks: MaskManager, state: dict[str, Any], companions: Path
) -> list[str]:
    from safetensors.torch import save

    write_durably(directory / TOPOLOGY, save(masks.state_dict()))
    counters = {
        "format": FORMAT,
        "step": engine.step,
        "adam_step": adam_step(engine.deepspeed_engine),
        "engine": engine.counters(),
        "world_size": engine.world.world_size,
        "zero_stage": engine.zero_stage,
        "precision": engine.precision,
    }
    write_durably(directory / STATE, (json.dumps(counters | state, indent=1) + "\n").encode())
    names = [TOPOLOGY, STATE]
    for source in sorted(path for path in companions.rglob("*") if path.is_file()):
        name = source.relative_to(companions).as_posix()
        (directory / name).parent.mkdir(exist_ok=True)
        write_durably(directory / name, source.read_bytes())
        names.append(name)
    return names


def _published(root: Path) -> list[Path]:
    """The checkpoints under their final names, oldest first."""
    return sorted(root.glob("step_" + "[0-9]" * 8))


def _make_directory(path: Path) -> None:
    try:
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)
    except OSError as error:
        raise DsbertError(f"could not make the checkpoint directory {path}: {error}") from None


def _publish(
    temporary: Path, target: Path, entries: list[dict[str, Any]], engine: TrainEngine, masks: MaskManager, keep: int
) -> None:
    manifest = {
        "kind": KIND,
        "format": FORMAT,
        "step": engine.step,
        "world_size": engine.world.world_size,
        "topology_digest": masks.digest(),
        "files": {entry["file"]: {"bytes": entry["bytes"], "xxh3": entry["xxh3"]} for entry in entries},
    }
    try:
        text = (json.dumps(manifest, indent=1) + "\n").encode()
        write_durably(temporary / MANIFEST, text)
        _sync_directory(temporary)
        if target.exists():
            os.replace(target, target.with_name(f"{target.name}.superseded-{temporary.name.split('.')[-2]}"))
        os.replace(temporary, target)
        _sync_directory(target.parent)
        latest = target.parent / f".{LATEST}.tmp"
        write_durably(latest, f"{target.name} {xxhash.xxh3_128_hexdigest(text)}\n".encode())
        os.replace(latest, target.parent / LATEST)
        _sync_directory(target.parent)
        for old in _published(target.parent)[:-keep]:
            if old != target:
                shutil.rmtree(old)
    except OSError as error:
        raise DsbertError(f"could not publish the checkpoint {target}: {error}") from None


def _raise_if_damaged(path: Path) -> None:
    problems = verify_checkpoint(path)
    if problems:
        raise CheckpointError(f"expected a valid checkpoint, found {path / problems[0].file}: {problems[0].problem}")


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            hasher.update(chunk)
    return hasher.hexdigest()
