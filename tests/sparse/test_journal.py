import json

import pytest
import torch

from dsbert.sparse import BlockTopology, TopologyUpdate
from dsbert.sparse.journal import journal_entry, pack, replay, unpack
from dsbert.sparse.mask_manager import MaskUpdate
from tests.sparse.toys import Toy


def test_a_run_can_be_replayed():
    toy = Toy()
    before = toy.masks.topologies
    start = dict(before)
    entries = [json.loads(json.dumps(journal_entry(update))) for update in toy.train()]
    assert [entry["update"] for entry in entries] == [1, 2, 3, 4, 5]
    replayed = replay(start, entries)
    for name, topology in toy.masks.topologies.items():
        assert torch.equal(replayed[name].rows, topology.rows)
        assert torch.equal(replayed[name].cols, topology.cols)
        assert replayed[name].digest() == toy.layers[name].digest() != start[name].digest()
    assert entries[-1]["digest"] == toy.masks.digest()
    assert entries[0]["pruned"] == sum(len(layer["slots"]) for layer in entries[0]["layers"].values()) > 0
    # From any point on, and without touching what it starts from.
    middle = replay(start, entries[:2])
    assert {name: t.digest() for name, t in replay(middle, entries[2:]).items()} == {
        name: t.digest() for name, t in replayed.items()
    }


@pytest.mark.parametrize("count", [0, 1, 4096, 4097, 100_000])
def test_pack_and_unpack(count):
    generator = torch.Generator().manual_seed(count)
    for values in (
        torch.arange(count) * 7,
        torch.randint(2**31, (count,), generator=generator),
        torch.randint(3072, (count,), generator=generator).int(),
    ):
        packed = pack(values)
        assert isinstance(packed, list if count <= 4096 else str)
        assert torch.equal(unpack(json.loads(json.dumps(packed))), values.long())


def test_ascending_slots_pack_small():
    """Four million slots of BERT-Base at B = 1 are no more than a few bits each."""
    assert len(pack(torch.arange(100_000) * 20)) < 2000


def test_a_large_update_replays():
    """Beyond 4,096 entries: every block of a full upper half moves to the lower one."""
    side, half = 100, 5000
    positions = torch.arange(half, dtype=torch.int32)
    start = BlockTopology((side, side), 1, positions // side, positions % side)
    moved = torch.randperm(half, generator=torch.Generator().manual_seed(0)).int() + half
    change = TopologyUpdate(positions.long(), moved // side, moved % side)
    entry = journal_entry(MaskUpdate(1, 10, {"x": change}, 0.0, 1.0, "", 0.0))
    assert isinstance(entry["layers"]["x"]["rows"], str)
    after = replay({"x": start}, [json.loads(json.dumps(entry))])["x"]
    assert after.digest() == start.replace(change).digest()


def test_refuses_an_entry_that_does_not_fit():
    toy = Toy()
    start = dict(toy.masks.topologies)
    entry = journal_entry(toy.train()[0])
    taken = {"slots": [5], "rows": [int(start["0"].rows[0])], "cols": [int(start["0"].cols[0])]}
    with pytest.raises(ValueError, match="distinct blocks"):
        replay(start, [entry | {"layers": {"0": taken}}])
