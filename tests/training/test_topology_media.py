"""Pictures and histograms that are made of masks.jsonl alone, against the topology that a checkpoint holds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dsbert.checkpoint.loading import read_topology
from dsbert.checkpoint.state import read_state
from dsbert.config.recipe import recipe_from_dict
from dsbert.training.first_topologies import first_topologies
from dsbert.training.topology_media import TopologyMedia, open_media, whole_histogram

UPDATES = (3, 6, 9)


def ages_of(run: Path, checkpoint: str, number: int) -> np.ndarray:
    """In updates, of all blocks of a checkpoint that follows update `number`."""
    tensors = read_topology(run / "checkpoints" / checkpoint)
    return np.concatenate([number - tensors[name].numpy() for name in sorted(tensors) if name.endswith(".born")])


def test_what_is_drawn_is_what_checkpoints_hold(run: Path) -> None:
    media = open_media(run)
    found = {step: media.after(step) for step in range(1, 13)}
    assert tuple(step for step, one in found.items() if one) == UPDATES
    updates = [json.loads(line) for line in (run / "masks.jsonl").read_text().splitlines()]
    for step, update in zip(UPDATES, updates, strict=True):
        shown = found[step]
        assert shown is not None
        assert shown.histograms["age_at_death"].counts.sum() == update["pruned"]
        assert shown.blocks.dtype == np.uint8
    for checkpoint, step, number in (("step_00000006", 6, 2), ("step_00000012", 9, 3)):
        shown = found[step]
        assert shown is not None
        expected = np.bincount(ages_of(run, checkpoint, number), minlength=number + 1)
        assert shown.histograms["age"].counts.tolist() == expected.tolist()
        assert shown.histograms["age"].edges.tolist() == [edge - 0.5 for edge in range(number + 2)]


def test_a_map_tells_young_old_left_and_unused_apart(run: Path) -> None:
    state = read_state(run / "checkpoints" / "step_00000012")
    tensors = read_topology(run / "checkpoints" / "step_00000012")
    name = next(name for name, layer in state.layers.items() if layer.block_size is not None)
    topologies = first_topologies(run, recipe_from_dict(state.recipe.whole), state.layers)
    media = TopologyMedia(run / "masks.jsonl", topologies)
    shown = media.after(9)
    assert shown is not None
    (rows, cols), scale = topologies[name].grid, 96 // max(topologies[name].grid)
    cells = shown.blocks[: rows * scale : scale, : cols * scale : scale].astype(int)
    places = tensors[f"{name}.rows"].long(), tensors[f"{name}.cols"].long()
    active = np.zeros((rows, cols), dtype=bool)
    active[places] = True
    grey = (cells == 205).all(2)
    white = (cells == 255).all(2)
    assert ((~grey & ~white) == active).all()
    explored = np.unpackbits(tensors[f"{name}.explored"].numpy(), count=rows * cols).reshape(rows, cols).astype(bool)
    assert (white == ~explored).all()
    young = np.zeros((rows, cols), dtype=bool)
    young[places] = tensors[f"{name}.born"].numpy() == 3
    assert ((cells == (253, 231, 37)).all(2) == young).all()


def test_the_journal_is_followed_as_it_grows(run: Path, tmp_path: Path) -> None:
    state = read_state(run / "checkpoints" / "step_00000012")
    topologies = first_topologies(run, recipe_from_dict(state.recipe.whole), state.layers)
    lines = (run / "masks.jsonl").read_bytes().splitlines(keepends=True)
    journal = tmp_path / "masks.jsonl"
    journal.write_bytes(lines[0] + lines[1][:50])
    media = TopologyMedia(journal, topologies)
    assert media.after(3) is not None
    assert media.after(6) is None, "half a line is none yet"
    journal.write_bytes(b"".join(lines))
    assert media.after(8) is None, "the update is gone by"
    last = media.after(9)
    assert last is not None
    assert last.number == 3


@pytest.mark.parametrize("harm", ["another digest", "a line is missing", "no JSON"])
def test_a_damaged_journal_draws_nothing(run: Path, tmp_path: Path, harm: str) -> None:
    state = read_state(run / "checkpoints" / "step_00000012")
    topologies = first_topologies(run, recipe_from_dict(state.recipe.whole), state.layers)
    lines = (run / "masks.jsonl").read_bytes().splitlines(keepends=True)
    entry = json.loads(lines[0])
    first = {
        "another digest": json.dumps(entry | {"digest": "0" * 32}).encode() + b"\n",
        "a line is missing": b"",
        "no JSON": b"{\n",
    }[harm]
    (tmp_path / "masks.jsonl").write_bytes(first + b"".join(lines[1:]))
    media = TopologyMedia(tmp_path / "masks.jsonl", topologies)
    with pytest.raises(ValueError, match="expected"):
        media.after(9)


def test_many_values_share_a_bar() -> None:
    counts, edges = whole_histogram(np.array([0, 1, 1, 999]))
    assert len(counts) <= 64
    assert len(edges) == len(counts) + 1
    assert (counts.sum(), counts[0], counts[-1]) == (4, 3, 1)
    assert edges[0] == -0.5
    assert whole_histogram(np.empty(0, dtype=np.int64)).counts.tolist() == [0]
