"""Norms of kept, dropped and new blocks, against norms of the blocks before the update. That all ranks
have the same, at any world size and ZeRO stage, is looked at where ranks are: test_mask_manager.py, test_engine.py."""

import pytest
import torch

from dsbert.sparse.flat_blocks import PRUNE_SCORES
from dsbert.sparse.journal import journal_entry, replay
from dsbert.sparse.update_norms import SUMMARY, norm_summary
from tests.sparse.toys import TOTAL_STEPS, Toy


@pytest.mark.parametrize("prune_score", ["l1", "l2", "linf", "l1_by_age"])
def test_norms_are_those_of_the_blocks(prune_score):
    toy = Toy(prune_score=prune_score)
    order = {"l2": 2.0, "linf": float("inf")}.get(prune_score, 1.0)
    new = {name: torch.zeros(layer.num_active, dtype=torch.bool) for name, layer in toy.layers.items()}
    groups = set()
    for step in range(1, TOTAL_STEPS + 1):
        toy.step(step)
        norms = {
            name: torch.linalg.vector_norm(layer.blocks.detach().double(), order, dim=(1, 2))
            for name, layer in toy.layers.items()
        }
        update = toy.masks.maybe_update(step)
        for name, change in update.layers.items() if update else ():
            dropped = torch.zeros_like(new[name])
            dropped[change.slots] = True
            expected = {"kept": norms[name][~dropped], "dropped": norms[name][dropped], "new": norms[name][new[name]]}
            found = update.norms[name]
            assert set(found) == {group for group, values in expected.items() if len(values)}
            for group, summary in found.items():
                values = expected[group].sort().values
                ranks = [round(share * (len(values) - 1)) for share in (0.1, 0.5, 0.9)]
                plain = [values.mean().item(), *values[ranks].tolist()]
                assert summary == pytest.approx(plain, rel=1e-5), (step, name, group)
            groups |= set(found)
            new[name] = dropped
    assert groups == {"kept", "dropped", "new"}
    assert len(SUMMARY) == 4


def test_nothing_that_trains_depends_on_them(monkeypatch):
    """The same digests without, and a journal without them is replayed as ever."""
    digests = [update.digest for update in Toy().train()]
    monkeypatch.setattr("dsbert.sparse.mask_manager.norm_summary", lambda *unused: {})
    toy = Toy()
    start = dict(toy.masks.topologies)
    updates = toy.train()
    assert [update.digest for update in updates] == digests
    entries = [journal_entry(update) for update in updates]
    for entry in entries:
        del entry["norms"]
    after = replay(start, entries)
    assert {name: one.digest() for name, one in after.items()} == {
        name: layer.digest() for name, layer in toy.layers.items()
    }


def test_a_group_without_blocks_is_left_out():
    scores = torch.tensor([3, 1, 2]) << 36
    none = torch.zeros(3, dtype=torch.bool)
    found = norm_summary(scores, PRUNE_SCORES["l1"], torch.empty(0, dtype=torch.int64), none)
    assert found == {"kept": (2.0, 1.0, 2.0, 3.0)}
    assert norm_summary(scores, PRUNE_SCORES["l1"], torch.arange(3), none) == {"dropped": found["kept"]}


def test_of_very_many_blocks_a_sample_is_ordered():
    scores = (torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 2.0**36).long()
    none = torch.zeros(100_000, dtype=torch.bool)
    found = norm_summary(scores, PRUNE_SCORES["l1"], torch.empty(0, dtype=torch.int64), none)["kept"]
    assert found[0] == pytest.approx(scores.double().mean().item() / 2**36, rel=1e-5)
    assert found[1:] == pytest.approx((0.1, 0.5, 0.9), abs=0.02)
