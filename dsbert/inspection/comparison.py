"""How two checkpoints of one model differ: topology, weights, moments, counters and identity, layer by layer.

They may have been written at different world sizes and ZeRO stages. Held in memory at once is one sparse layer of each,
and of dense parameters a piece of each.

Slots: K per sparse layer; a position is a block of the weight's grid, row * C + col (sparse/topology.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsbert.base.errors import CheckpointError, UserError
from dsbert.base.jsonl import first_difference, value_differences
from dsbert.checkpoint.fragments import Floats, FragmentReader
from dsbert.checkpoint.loading import fragment_reader, read_topology, resolve_checkpoint
from dsbert.checkpoint.state import read_state
from dsbert.engine.zero_shards import MOMENTS
from dsbert.sparse import BlockTopology
from dsbert.sparse.mask_manager import state_parts
from dsbert.sparse.topology import combined_digest

_CHUNK = 1 << 22  # elements of a dense parameter that are compared in one piece
_COUNTERS = ("step", "adam_step", "world_size", "zero_stage", "precision")
_SHOWN = 10  # parameters in the report for people
Positions = NDArray[np.int64]


class _Side:
    """A checkpoint that was found whole, open for reading. Raises UserError or CheckpointError."""

    def __init__(self, path: Path) -> None:
        self.path = resolve_checkpoint(path)
        self.state = read_state(self.path)
        self.has_moments = self.state.adam_step > 0
        self.topologies: dict[str, BlockTopology] = {}
        self.births: dict[str, list[Tensor]] = {}  # by layer: when each slot was allocated
        try:
            tensors = read_topology(self.path)
            for name, layer in self.state.layers.items():
                if layer.block_size is not None:
                    rows, cols = tensors[f"{name}.rows"], tensors[f"{name}.cols"]
                    topology = BlockTopology(layer.out_in, layer.block_size, rows, cols)
                    self.topologies[f"{name}.blocks"] = topology
                    kinds = state_parts(self.state.recipe.sparsity.fresh_moments)
                    self.births[name] = [tensors[f"{name}.{kind}"] for kind in kinds if kind.startswith("born")]
            self._reader: FragmentReader = fragment_reader(self.path)
        except CheckpointError:
            raise
        except Exception as error:  # right checksums of wrong content
            raise CheckpointError(
                f"expected a checkpoint at {self.path}, found {error!r}: see `dsbert verify`"
            ) from None

    def read(self, name: str, kind: str, offset: int, length: int) -> Floats:
        """fp32 [length] of a parameter. Raises CheckpointError."""
        try:
            return self._reader.read(name, kind, offset, length)
        except CheckpointError:
            raise
        except Exception as error:  # safetensors raises its own type
            raise CheckpointError(
                f"expected {name}/{kind} in {self.path}, found {error!r}: see `dsbert verify`"
            ) from None

    def digest(self) -> str:
        """Of the topology, in slot order."""
        return combined_digest({key.removesuffix(".blocks"): one.digest() for key, one in self.topologies.items()})

    def summary(self) -> dict[str, Any]:
        """Where it is, and its counters."""
        return {"path": str(self.path)} | self.counters()

    def counters(self) -> dict[str, int | str]:
        """By name."""
        return {key: getattr(self.state, key) for key in _COUNTERS}


def compare_checkpoints(
    a: Path, b: Path, progress: Callable[[str, int, int], None] = lambda stage, done, total: None
) -> dict[str, Any]:
    """Of two checkpoints, or the newest ones of runs that verify.

    Returns {a, b, identical, counters, identity, topology, layers}. identical: same step and Adam step, same topology
    in slot order, slots of the same ages, same weights and moments bit for bit; identity, world and cut into files may
    differ. layers: an entry per parameter, whose weights and moments are compared where both have the block, at
    whatever slots. Raises UserError if their models have different shapes, CheckpointError if one is damaged.
    """
    one, other = _Side(a), _Side(b)
    _assert_same_shapes(one, other)
    layers = []
    for done, (name, shape) in enumerate(one.state.params.items()):
        progress("compare", done, len(one.state.params))
        layers.append(_compare_parameter(one, other, name, shape))
    progress("compare", len(layers), len(layers))
    both = one.counters(), other.counters()
    counters = {key: {"a": both[0][key], "b": both[1][key]} for key in _COUNTERS if both[0][key] != both[1][key]}
    topology = _total([layer["topology"] for layer in layers if layer["topology"]])
    topology |= {"digest_a": one.digest(), "digest_b": other.digest(), "same_ages": _same_ages(one, other)}
    same_bits = all(
        layer[kind] is None or layer[kind]["bit_identical"] for layer in layers for kind in ("master", *MOMENTS)
    )
    return {
        "a": one.summary(),
        "b": other.summary(),
        "identical": not counters.keys() & {"step", "adam_step"}
        and topology["same_slots"]
        and topology["same_ages"]
        and same_bits,
        "counters": counters,
        "identity": [
            {"key": key, "a": a, "b": b}
            for key, a, b in value_differences(one.state.identity.whole, other.state.identity.whole)
        ],
        "topology": topology,
        "layers": layers,
    }


def summary_lines(report: dict[str, Any]) -> Iterator[str]:
    """The report for people: what differs, the parameters with the largest relative difference first."""
    for side in ("a", "b"):
        own = report[side]
        yield f"{side}: {own['path']} at step {own['step']}"
    if report["identical"]:
        yield "identical: same step, topology, weights and moments, bit for bit"
    for key, values in report["counters"].items():
        yield f"  {key}: {values['a']} in a, {values['b']} in b"
    for entry in report["identity"]:
        yield f"  identity {entry['key']}: {entry['a']!r} in a, {entry['b']!r} in b"
    topology = report["topology"]
    yield (
        f"  topology: {topology['common']} blocks in both ({topology['moved']} at different slots), "
        f"{topology['only_a']} only in a, {topology['only_b']} only in b, Jaccard {topology['jaccard']:.4f}"
    )
    if topology["same_slots"] and not topology["same_ages"]:
        yield "  ages: some slots were allocated at another update or step of Adam's"
    changed = [layer for layer in report["layers"] if not layer["master"]["bit_identical"]]
    yield f"  weights: {len(changed)} of {len(report['layers'])} parameters differ where both have them"
    changed.sort(key=lambda layer: -(layer["master"]["l2_relative"] or 0.0))
    for layer in changed[:_SHOWN]:
        own = layer["master"]
        relative = "-" if own["l2_relative"] is None else f"{own['l2_relative']:.3e}"
        yield f"    {layer['name']}: relative L2 {relative}, largest {own['max_abs']:.3e}"
    if len(changed) > _SHOWN:
        yield f"    and {len(changed) - _SHOWN} more, by less: see --json"
    for moment in MOMENTS:
        count = sum(layer[moment] is not None and not layer[moment]["bit_identical"] for layer in report["layers"])
        yield f"  {moment}: {count} of {len(report['layers'])} parameters differ where both have them"


def _same_ages(one: _Side, other: _Side) -> bool:
    """Whether each slot was allocated at the same update in both and, where that is kept, at the same Adam step."""
    pairs = [(one.births[name], other.births[name]) for name in one.births]
    return all(len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in pairs)


def _assert_same_shapes(one: _Side, other: _Side) -> None:
    for what in ("params", "layers"):
        found = first_difference(one.state.to_json()[what], other.state.to_json()[what])
        if found:
            key, mine, theirs = found
            raise UserError(
                f"expected two models of the same shapes, found {key} = {mine} in {one.path} and {theirs} in "
                f"{other.path}: compare checkpoints of one model and sparsity"
            )


def _compare_parameter(one: _Side, other: _Side, name: str, shape: list[int]) -> dict[str, Any]:
    mine, theirs = one.topologies.get(name), other.topologies.get(name)
    entry: dict[str, Any] = {"name": name, "shape": shape, "topology": None}
    common: tuple[Positions, Positions] | None = None
    if mine is not None and theirs is not None:
        entry["topology"], common = _compare_topologies(mine, theirs)
    for kind in ("master", *MOMENTS):
        has = (kind == "master" or one.has_moments, kind == "master" or other.has_moments)
        entry[kind] = _compare_values(_pairs(one, other, name, kind, shape, common)) if all(has) else None
    return entry


def _compare_topologies(
    mine: BlockTopology, theirs: BlockTopology
) -> tuple[dict[str, Any], tuple[Positions, Positions]]:
    """Counts of blocks, and the slots in either at which the common blocks stand, in the first one's slot order."""
    a, b = mine.positions().numpy(), theirs.positions().numpy()
    both, slots_a, slots_b = np.intersect1d(a, b, assume_unique=True, return_indices=True)
    order = np.argsort(slots_a)
    slots_a, slots_b = slots_a[order], slots_b[order]
    counts = {
        "only_a": len(a) - len(both),
        "only_b": len(b) - len(both),
        "common": len(both),
        "moved": int(np.count_nonzero(slots_a != slots_b)),
    }
    return _total([counts]), (slots_a, slots_b)


def _total(counts: list[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {key: sum(one[key] for one in counts) for key in ("only_a", "only_b", "common", "moved")}
    union = total["only_a"] + total["only_b"] + total["common"]
    total["jaccard"] = total["common"] / union if union else 1.0
    total["same_slots"] = not (total["only_a"] or total["only_b"] or total["moved"])
    return total


def _pairs(
    one: _Side, other: _Side, name: str, kind: str, shape: list[int], common: tuple[Positions, Positions] | None
) -> Iterator[tuple[Floats, Floats]]:
    """Values that stand at the same place of the dense weight."""
    numel = int(np.prod(shape))
    if common is not None:
        a, b = (side.read(name, kind, 0, numel).reshape(shape) for side in (one, other))
        yield a[common[0]], b[common[1]]
        return
    for start in range(0, numel, _CHUNK):
        length = min(_CHUNK, numel - start)
        yield one.read(name, kind, start, length), other.read(name, kind, start, length)


def _compare_values(pairs: Iterator[tuple[Floats, Floats]]) -> dict[str, Any]:
    """max_abs: largest |a - b|; l2_relative: |a - b| / |a|, None where that is no number; as bits, -0 is not 0."""
    compared, same, largest, squares, reference = 0, True, 0.0, 0.0, 0.0
    for a, b in pairs:
        compared += a.size
        if np.array_equal(np.ascontiguousarray(a).view(np.uint32), np.ascontiguousarray(b).view(np.uint32)):
            reference += float(np.square(a, dtype=np.float64).sum())
            continue
        same = False
        difference = np.subtract(a, b, dtype=np.float64)
        largest = float(np.maximum(largest, np.abs(difference).max()))  # a NaN stays one
        squares += float(np.square(difference).sum())
        reference += float(np.square(a, dtype=np.float64).sum())
    relative = (squares / reference) ** 0.5 if reference else (None if squares else 0.0)
    return {"compared": compared, "bit_identical": same, "max_abs": largest, "l2_relative": relative}
