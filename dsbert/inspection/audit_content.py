"""Whether what was written into a checkpoint is right: state.json, topology and fragments held against each other.

Every function yields what is wrong; it may raise anything on bytes that are not what they claim to be.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsbert.checkpoint.fragments import FORMAT
from dsbert.checkpoint.loading import TOPOLOGY, Problem, read_topology
from dsbert.checkpoint.state import MANIFEST, STATE
from dsbert.engine.zero_shards import MOMENTS
from dsbert.sparse import BlockTopology
from dsbert.sparse.low_rank import PARTS
from dsbert.sparse.mask_manager import state_parts
from dsbert.sparse.topology import combined_digest, grid, unpack_bits

_CHUNK = 1 << 22  # elements that are looked at in one piece


def state_problems(state: dict[str, Any], manifest: dict[str, Any]) -> Iterator[Problem]:
    """Of state.json: counters that agree with the manifest's, and shapes of parameters and layers."""
    for key in ("step", "world_size"):
        if state.get(key) != manifest[key]:
            yield Problem(STATE, f"expected {key} = {manifest[key]} as in {MANIFEST}, found {state.get(key)!r}")
    if not _is_count(state.get("adam_step")):
        yield Problem(STATE, f"expected adam_step, found {state.get('adam_step')!r}")
    params, layers = state.get("params"), state.get("layers")
    if not isinstance(params, dict) or not params or not isinstance(layers, dict):
        yield Problem(STATE, "expected the shapes of parameters and layers, found none")
        return
    for name, shape in params.items():
        if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
            yield Problem(STATE, f"expected a shape of {name}, found {shape!r}")
    for name, layer in layers.items():
        shape, block_size = layer["shape"], layer["block_size"]
        if block_size is None:
            part, fits = "weight", params.get(f"{name}.weight") == shape
        else:
            part, own = "blocks", params.get(f"{name}.blocks")
            grid((shape[0], shape[1]), block_size)
            fits = isinstance(own, list) and len(own) == 3 and own[1:] == [block_size] * 2
        if not fits:
            yield Problem(
                STATE, f"expected {name}.{part} to fit its layer, {layer}, found {params.get(f'{name}.{part}')}"
            )
        # Left out of records while it is off.
        rank = 0 if block_size is None else state["recipe"]["sparsity"].get("low_rank", 0)
        for part, own in zip(PARTS, ([shape[0], rank], [rank, shape[1]]), strict=True):
            if params.get(f"{name}.{part}") != (own if rank else None):
                found = params.get(f"{name}.{part}")
                yield Problem(STATE, f"expected {name}.{part} of rank {rank}, {own if rank else None}, found {found}")


def topology_problems(path: Path, state: dict[str, Any], digest: str) -> Iterator[Problem]:
    """Of topology.safetensors: slots in range and unique, as many as the layer has blocks, all of them explored and no
    younger than the run; the digest is the manifest's."""
    tensors = read_topology(path)
    sparse = {name: layer for name, layer in state["layers"].items() if layer["block_size"] is not None}
    parts = state_parts(state["recipe"]["sparsity"].get("fresh_moments", "zero"))
    expected = {f"{name}.{part}" for name in sparse for part in parts}
    for key in sorted(expected ^ tensors.keys()):
        yield Problem(TOPOLOGY, f"{key}: {'missing' if key in expected else 'belongs to no layer'}")
    if not expected <= tensors.keys():
        return
    digests = {}
    for name, layer in sparse.items():
        shape, block_size = (layer["shape"][0], layer["shape"][1]), layer["block_size"]
        rows, cols, born, explored, *own_steps = (tensors[f"{name}.{part}"] for part in parts)
        slots = state["params"][f"{name}.blocks"][0]
        num_rows, num_cols = grid(shape, block_size)
        per_slot = {part.numel() for part in (rows, born, *own_steps)}
        if per_slot != {slots} or explored.numel() != -(-num_rows * num_cols // 8):
            yield Problem(TOPOLOGY, f"{name}: expected {slots} slots and a {num_rows} x {num_cols} grid, found others")
            continue
        try:
            topology = BlockTopology(shape, block_size, rows, cols)
        except ValueError as error:
            yield Problem(TOPOLOGY, f"{name}: {error}")
            continue
        if bool((topology.mask() & ~unpack_bits(explored, topology.grid)).any()):
            yield Problem(TOPOLOGY, f"{name}: expected active blocks to count as explored, found some that do not")
        if any(not 0 <= int(count) <= state["adam_step"] for births in own_steps for count in births.aminmax()):
            yield Problem(TOPOLOGY, f"{name}: expected blocks of Adam's steps 0..{state['adam_step']}, found others")
        digests[name] = topology.digest()
    if len(digests) == len(sparse) and combined_digest(digests) != digest:
        yield Problem(TOPOLOGY, f"expected the topology {digest} as in {MANIFEST}, found {combined_digest(digests)}")


def fragment_problems(path: Path, files: list[str], state: dict[str, Any]) -> Iterator[Problem]:
    """Of the fragments of all ranks: each element of each parameter once, moments with all or none of them, as Adam's
    step count says; only finite numbers."""
    numels = {name: math.prod(shape) for name, shape in state["params"].items()}
    pieces: dict[str, list[tuple[int, int, str]]] = {name: [] for name in numels}
    without = []  # files with pieces that have no moments
    with_moments = state["adam_step"] > 0
    for file in files:
        try:
            index, problems, kinds = _read_fragments(path / file, numels)
        except Exception as error:  # safetensors raises its own type
            yield Problem(file, f"unreadable: {error or repr(error)}")
            return
        yield from problems
        for name, (offset, length) in index.items():
            pieces[name].append((offset, length, file))
        with_moments |= any(kinds.values())
        without += [file] if not all(kinds.values()) else []
    if with_moments:
        for file in without:
            yield Problem(
                file, f"expected both moments of all weights at Adam's step {state['adam_step']}, found fewer"
            )
    for name, numel in numels.items():
        yield from _gaps(name, numel, sorted(pieces[name]), files[0])


def _read_fragments(
    path: Path, numels: dict[str, int]
) -> tuple[dict[str, tuple[int, int]], list[Problem], dict[str, bool]]:
    """Where the pieces of a file stand, what is wrong with them, and which of them have moments."""
    from safetensors import safe_open

    file = safe_open(path, framework="numpy")
    metadata = file.metadata() or {}
    if FORMAT not in metadata:
        return {}, [Problem(path.name, f"expected format {FORMAT}, found {sorted(metadata)}")], {}
    index, problems, kinds = {}, [], {}
    keys = set(file.keys())
    for name, (offset, length) in json.loads(metadata[FORMAT]).items():
        own = keys & {f"{name}/{kind}" for kind in ("master", *MOMENTS)}
        keys -= own
        if name not in numels or not _is_count(offset) or not _is_count(length) or offset + length > numels[name]:
            found = f"found elements {offset}..+{length} of {name}"
            problems.append(Problem(path.name, f"expected pieces of the parameters in {STATE}, {found}"))
            continue
        index[name] = (offset, length)
        master, moments = f"{name}/master", {f"{name}/{moment}" for moment in MOMENTS}
        kinds[name] = own > {master} and own == moments | {master}
        if own != {master} and not kinds[name]:
            problems.append(Problem(path.name, f"{name}: expected master and moments, found {sorted(own)}"))
        for key in sorted(own):
            piece = file.get_slice(key)
            if piece.get_dtype() != "F32" or list(piece.get_shape()) != [length]:
                message = f"{key}: expected F32 [{length}], found {piece.get_dtype()} {list(piece.get_shape())}"
                problems.append(Problem(path.name, message))
            elif not all(np.isfinite(piece[at : min(at + _CHUNK, length)]).all() for at in range(0, length, _CHUNK)):
                problems.append(Problem(path.name, f"{key}: expected finite numbers, found others"))
    problems += [Problem(path.name, f"{key}: not in the file's index") for key in sorted(keys)]
    return index, problems, kinds


def _gaps(name: str, numel: int, pieces: list[tuple[int, int, str]], first: str) -> Iterator[Problem]:
    """Where sorted pieces (offset, length, file) of a parameter do not meet; named is the file before the gap."""
    end, before = 0, first
    for offset, length, file in pieces:
        if offset > end:
            yield Problem(before, f"{name}: expected elements {end}..{offset}, found them in no file")
        elif offset < end:
            yield Problem(file, f"{name}: expected elements {offset}..{end} once, found them in {before} as well")
        end, before = max(end, offset + length), file
    if end < numel:
        yield Problem(before, f"{name}: expected elements {end}..{numel}, found them in no file")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
