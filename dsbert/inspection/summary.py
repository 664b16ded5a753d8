"""What a checkpoint holds, topology layer by layer and bytes measured from its files; and which ones a run has."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsbert.base.durable import open_regular
from dsbert.base.errors import CheckpointError, UserError
from dsbert.base.text_table import table
from dsbert.checkpoint.loading import fragment_files, read_topology, resolve_checkpoint
from dsbert.checkpoint.state import manifest_object, read_state, state_object
from dsbert.engine.zero_shards import MOMENTS
from dsbert.inspection.audit_checkpoint import ASIDE, NAME, audit_checkpoint
from dsbert.inspection.audit_run import CHECKPOINTS, bytes_below, kind_of, read_latest
from dsbert.sparse import BlockTopology
from dsbert.sparse.config import density_of
from dsbert.sparse.low_rank import PARTS
from dsbert.sparse.topology import combined_digest, unpack_bits


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """Of a checkpoint, or the newest one of a run. Densities are those of blocks; low_rank is there where they have a
    term beside them. Bytes: encoder_* count the sparse weights of the encoder with their coordinates and low-rank terms
    (weights) and both Adam moments (optimizer), beside what the dense weights would take in the same dtype. Raises
    UserError or CheckpointError."""
    path = resolve_checkpoint(path)
    state, tensors = read_state(path), read_topology(path)
    sparsity = state.recipe.sparsity
    target = density_of(sparsity.pattern, sparsity.sparsity)
    layers: list[dict[str, Any]] = []
    digests: dict[str, int] = {}
    explored = positions = active = 0
    for name, entry in state.layers.items():
        shape, block_size = entry.out_in, entry.block_size
        positions += shape[0] * shape[1]
        layer = {"name": f"{name}.weight", "shape": list(shape), "density_target": target}
        if block_size is None:  # pattern dense
            layer |= {"num_active": shape[0] * shape[1], "density": 1.0, "digest": None}
            explored, active = explored + shape[0] * shape[1], active + shape[0] * shape[1]
        else:
            topology = BlockTopology(shape, block_size, tensors[f"{name}.rows"], tensors[f"{name}.cols"])
            digests[name] = topology.digest()
            explored += int(unpack_bits(tensors[f"{name}.explored"], topology.grid).sum()) * block_size**2
            active += topology.num_active * block_size**2
            layer |= {
                "num_active": topology.num_active,
                "density": topology.density,
                "digest": f"{digests[name]:016x}",
            }
        layers.append(layer)
    return {
        "step": state.step,
        "density": active / positions if positions else 1.0,
        "block_size": sparsity.block_size if digests else None,
        **({"low_rank": sparsity.low_rank} if sparsity.low_rank and digests else {}),
        "dof": explored / positions if positions else 1.0,
        "digest": combined_digest(digests),
        "layers": layers,
        "bytes": _measure(path, list(state.layers), positions, tensors),
    }


def inspect_kernels(path: Path) -> dict[str, Any]:
    """Which kernels a checkpoint's run chose: {step, tokens, dtype, device, gain, layers: {name: {product: {backend,
    ms, speedup}}}}. ms: one call as measured; speedup: times faster than the best dense product; gain: the same of all
    sparse products together (None where nothing was measured). Raises UserError or CheckpointError."""
    path = resolve_checkpoint(path)
    state = read_state(path)
    if state.kernels is None:
        raise UserError(f"expected a checkpoint that names its kernels, found {path}, written by an older version")
    return {"step": state.step, "gain": state.kernels.gain()} | state.kernels.to_json()


def inspect_lines(report: dict[str, Any]) -> Iterator[str]:
    """What `inspect_checkpoint` returned, for people."""
    block = f"blocks of {report['block_size']}" if report["block_size"] else "no sparse weights"
    block += f" and rank {report['low_rank']} beside them" if "low_rank" in report else ""
    yield f"step {report['step']}, density {report['density']:.4f}, {block}, explored {report['dof']:.1%}"
    sizes = report["bytes"]
    for what in ("weights", "optimizer"):
        own, dense = sizes[f"encoder_{what}"], sizes[f"encoder_{what}_dense"]
        yield f"encoder {what}: {own / 1e6:.2f} MB, dense they would be {dense / 1e6:.2f} MB"
    yield f"checkpoint: {sizes['checkpoint'] / 1e6:.2f} MB; topology digest {report['digest']}"
    rows = []
    for layer in report["layers"]:
        shape, active = "x".join(map(str, layer["shape"])), str(layer["num_active"])
        target = f"{layer['density_target']:.4f}"
        rows.append((layer["name"], shape, active, f"{layer['density']:.4f}", target, layer["digest"] or "-"))
    yield table(("layer", "shape", "active", "density", "target", "digest"), rows)


def kernel_lines(report: dict[str, Any]) -> Iterator[str]:
    """What `inspect_kernels` returned, for people."""
    yield f"{report['tokens']} tokens, {report['dtype']}, {report['device']}"
    rows = []
    for name, products in report["layers"].items():
        for product, row in products.items():
            ms = "-" if row["ms"] is None else f"{row['ms']:.3f}"
            rows.append((name, product, row["backend"], ms, "-" if row["ms"] is None else f"{row['speedup']:.1f}"))
    yield table(("layer", "product", "backend", "ms", "times dense"), rows)
    if report["gain"] is not None:
        yield f"all sparse products together: {report['gain']:.1f} times the best dense ones"


def _measure(path: Path, names: list[str], dense_numel: int, topology: dict[str, Any]) -> dict[str, int]:
    sizes = {"master": 0} | dict.fromkeys(MOMENTS, 0)
    wanted = {f"{name}.{part}" for name in names for part in ("blocks", "weight", *PARTS)}
    for file in fragment_files(path):
        for key, size in tensor_bytes(file).items():
            name, _, kind = key.rpartition("/")
            if name in wanted:
                sizes[kind] += size
    coordinates = sum(
        tensor.numel() * tensor.element_size() for key, tensor in topology.items() if key.endswith((".rows", ".cols"))
    )
    # fp32 throughout: the fragments hold the master weights.
    return {
        "encoder_weights": sizes["master"] + coordinates,
        "encoder_weights_dense": 4 * dense_numel,
        "encoder_optimizer": sum(sizes[name] for name in MOMENTS),
        "encoder_optimizer_dense": 4 * dense_numel * len(MOMENTS),
        "checkpoint": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
    }


def tensor_bytes(path: Path) -> dict[str, int]:
    """Bytes of every tensor of a file of fragments, from its header. Raises CheckpointError if it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        open_regular(path).close()  # the library would wait for a pipe, and map a hole
        with safe_open(path, framework="numpy") as file:
            pieces = {name: file.get_slice(name) for name in list(file.keys())}
            found = {name: (piece.get_dtype(), piece.get_shape()) for name, piece in pieces.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"expected safetensors in {path}, found: {error}") from None
    if other := next((name for name, (dtype, _) in found.items() if dtype != "F32"), None):
        raise CheckpointError(f"expected fp32 in {path}, found {other} in {found[other][0]}")
    return {name: 4 * math.prod(shape) for name, (_, shape) in found.items()}


def list_checkpoints(
    run: Path, quick: bool = False, progress: Callable[[str, int, int], None] = lambda stage, done, total: None
) -> dict[str, Any]:
    """The checkpoints of a run, oldest first, with those that were moved aside.

    Returns {run, latest, checkpoints: [{name, step, created, age_s, bytes, world, zero_stage, verified, digest, status,
    problem}]}. created: unix time. verified: whether everything was read and is right; None if quick. status:
    published, or how it was moved aside: damaged or superseded. What cannot be read off the files is None. Raises
    UserError if `run` is no run directory.
    """
    if (kind := kind_of(run)) != "run":
        what, command = {"checkpoint": ("a checkpoint", "inspect"), "data": ("prepared data", "data")}[kind]
        raise UserError(f"expected a run directory at {run}, found {what}: see `dsbert {command} {run}`")
    root = run / CHECKPOINTS
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        names = []
    except OSError as error:
        raise UserError(f"expected to read {root}, found: {error.strerror}: see to its permissions") from None
    published = [(int(match[1]), "published", name) for name in names if (match := NAME.fullmatch(name))]
    aside = [(int(match[1]), match[2], name) for name in names if (match := ASIDE.fullmatch(name))]
    found = sorted(aside + published, key=lambda one: (one[0], one[1] == "published", one[2]))
    checkpoints = []
    for done, (step, status, name) in enumerate(found):
        if not quick:
            progress("verify", done, len(found))
        checkpoints.append(_entry(root / name, step, status, quick))
    if not quick:
        progress("verify", len(found), len(found))
    latest = None
    with suppress(OSError):
        latest = read_latest(root)
    return {"run": str(run), "latest": latest[0] if latest else None, "checkpoints": checkpoints}


def _entry(path: Path, step: int, status: str, quick: bool) -> dict[str, Any]:
    manifest: dict[str, Any] = {}
    state: dict[str, Any] = {}
    with suppress(Exception):  # whatever stands there: `verified` tells
        manifest = manifest_object(path)
    with suppress(Exception):
        state = state_object(path)
    problems = [] if quick else audit_checkpoint(path).problems
    created = manifest.get("created")  # older checkpoints lack it
    created = created if isinstance(created, int | float) else None
    return {
        "name": path.name,
        "step": step,
        "created": created,
        "age_s": None if created is None else time.time() - created,
        "bytes": bytes_below(path),
        "world": manifest.get("world_size"),
        "zero_stage": state.get("zero_stage"),
        "verified": None if quick else not problems,
        "digest": manifest.get("topology_digest"),
        "status": status,
        "problem": f"{problems[0].file}: {problems[0].problem}" if problems else None,
    }


def checkpoint_table(listing: dict[str, Any]) -> Iterator[str]:
    """What `list_checkpoints` returned, for people."""
    heads = ("name", "age", "MB", "world", "stage", "verified", "status", "digest")
    yield table(heads, [tuple(_cells(entry)) for entry in listing["checkpoints"]])
    for entry in listing["checkpoints"]:
        if entry["problem"]:
            yield f"{entry['name']}/{entry['problem']}"
    yield f"latest: {listing['latest'] or 'none'}"


def _cells(entry: dict[str, Any]) -> Iterator[str]:
    yield entry["name"]
    yield "-" if entry["age_s"] is None else _duration(entry["age_s"])
    yield f"{entry['bytes'] / 1e6:.1f}"
    yield "-" if entry["world"] is None else str(entry["world"])
    yield "-" if entry["zero_stage"] is None else str(entry["zero_stage"])
    yield {True: "yes", False: "NO", None: "-"}[entry["verified"]]
    yield entry["status"]
    yield "-" if entry["digest"] is None else str(entry["digest"])[:8]


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
