"""What a checkpoint holds: topology layer by layer, and bytes measured from its files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from dsbert.checkpoint import read_state, read_topology, resolve_checkpoint
from dsbert.sparse import BlockTopology
from dsbert.sparse.topology import combined_digest, unpack_bits
from dsbert.zero_shards import MOMENTS


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """Of a checkpoint, or the newest one of a run. Bytes: encoder_* count the sparse weights of the encoder with their
    coordinates (weights) and both Adam moments (optimizer), beside what the dense weights would take in the same dtype.
    Raises UserError or CheckpointError."""
    path = resolve_checkpoint(path)
    state, tensors = read_state(path), read_topology(path)
    sparsity = state["recipe"]["sparsity"]
    target = 1.0 if sparsity["pattern"] == "dense" else round(1.0 - sparsity["sparsity"], 12)
    layers: list[dict[str, Any]] = []
    digests: dict[str, int] = {}
    explored = positions = active = 0
    for name, entry in state["layers"].items():
        shape, block_size = (entry["shape"][0], entry["shape"][1]), entry["block_size"]
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
        "step": state["step"],
        "density": active / positions if positions else 1.0,
        "block_size": sparsity["block_size"] if digests else None,
        "dof": explored / positions if positions else 1.0,
        "digest": combined_digest(digests),
        "layers": layers,
        "bytes": _measure(path, list(state["layers"]), positions, tensors),
    }


def _measure(path: Path, names: list[str], dense_numel: int, topology: dict[str, Any]) -> dict[str, int]:
    sizes = {"master": 0} | dict.fromkeys(MOMENTS, 0)
    wanted = {f"{name}.{part}" for name in names for part in ("blocks", "weight")}
    for file in path.glob("fragments-*.safetensors"):
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
    """Bytes of every tensor of a safetensors file, from its header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {
        name: entry["data_offsets"][1] - entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }
