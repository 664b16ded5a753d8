import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsbert.sparse import BlockTopology, DrawKey, TopologyUpdate, prune_and_regrow
from dsbert.sparse.config import BUILT_IN_RULES, BUILT_IN_SCORES
from dsbert.sparse.flat_blocks import PRUNE_SCORES
from dsbert.sparse.regrow import REGROW_RULES
from tests.sparse.toys import plain_draw


@st.composite
def cases(draw):
    """A topology of shuffled slots, norms with many ties, a number to prune, a rule and gradient norms with ties."""
    num_rows, num_cols = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    num_active = draw(st.integers(1, num_rows * num_cols))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    positions = torch.randperm(num_rows * num_cols, generator=generator)[:num_active]
    topology = BlockTopology(
        (num_rows * 4, num_cols * 4), 4, (positions // num_cols).int(), (positions % num_cols).int()
    )
    return {
        "topology": topology,
        "norms": torch.randint(draw(st.sampled_from([1, 3, 1000])), (num_active,), generator=generator),
        "num_pruned": draw(st.integers(0, num_active + 2)),
        "key": DrawKey(draw(st.integers(0, 100)), "regrow", 1, "x"),
        "rule": draw(st.sampled_from(sorted(REGROW_RULES))),
        "gradient_norms": torch.randint(50, (num_rows, num_cols), generator=generator).float(),
    }


def grown(update, topology):
    return (update.rows.long() * topology.grid[1] + update.cols).tolist()


@settings(max_examples=120, deadline=None)
@given(case=cases())
def test_an_update_keeps_what_it_must(case):
    before, norms = case["topology"], case["norms"].tolist()
    update = prune_and_regrow(**case)
    after = before.replace(update)
    slots = update.slots.tolist()

    # K is constant, coordinates are unique.
    assert after.num_active == before.num_active
    assert len(set(after.positions().tolist())) == after.num_active
    # As many as asked for, capped by the number of empty blocks.
    num_empty = before.mask().numel() - before.num_active
    assert len(slots) == len(set(slots)) == min(case["num_pruned"], before.num_active, num_empty)
    # The pruned are exactly those of smallest (norm, slot).
    assert slots == sorted(sorted(range(len(norms)), key=lambda slot: (norms[slot], slot))[: len(slots)])
    # Survivors keep slot and place.
    survivors = sorted(set(range(before.num_active)) - set(slots))
    assert after.positions()[survivors].tolist() == before.positions()[survivors].tolist()
    # What is regrown was empty before, so that a block pruned now is not back.
    assert not set(grown(update, before)) & set(before.positions().tolist())
    # Deterministic.
    again = prune_and_regrow(**case)
    assert before.replace(again).digest() == after.digest()


@settings(max_examples=50, deadline=None)
@given(case=cases())
def test_gradient_rule_picks_the_largest(case):
    topology, gradient = case["topology"], case["gradient_norms"].flatten().tolist()
    update = prune_and_regrow(**case | {"rule": "gradient"})
    empty = sorted(set(range(len(gradient))) - set(topology.positions().tolist()))
    largest = sorted(empty, key=lambda position: (-gradient[position], position))[: update.num_pruned]
    assert grown(update, topology) == sorted(largest)


@settings(max_examples=50, deadline=None)
@given(case=cases())
def test_random_rule_draws_among_the_empty(case):
    topology = case["topology"]
    update = prune_and_regrow(**case | {"rule": "random"})
    taken = set(topology.positions().tolist())
    empty = [position not in taken for position in range(topology.mask().numel())]
    assert grown(update, topology) == plain_draw(case["key"], empty, update.num_pruned)


@settings(max_examples=50, deadline=None)
@given(case=cases())
def test_the_shortcut_of_the_random_rule_takes_what_its_scores_say(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REGROW_RULES, "slow", dataclasses.replace(REGROW_RULES["random"], name="slow", draw=None))
        slow = prune_and_regrow(**case | {"rule": "slow"})
    assert grown(slow, case["topology"]) == grown(prune_and_regrow(**case | {"rule": "random"}), case["topology"])


def test_by_eye():
    """Slots 0..3 at positions 5, 0, 3, 1 of a 2 x 3 grid; 2 and 4 are empty."""
    topology = BlockTopology(
        (2, 3), 1, torch.tensor([1, 0, 1, 0], dtype=torch.int32), torch.tensor([2, 0, 0, 1], dtype=torch.int32)
    )
    norms = torch.tensor([7, 2, 9, 2])
    gradient = torch.tensor([[9.0, 9.0, 1.0], [9.0, 2.0, 9.0]])
    key = DrawKey(0, "regrow", 1, "x")
    update = prune_and_regrow(topology, norms, 1, key, "gradient", gradient)
    assert (update.slots.tolist(), update.rows.tolist(), update.cols.tolist()) == ([1], [1], [1])
    for asked in (2, 3, 4):
        update = prune_and_regrow(topology, norms, asked, key)
        assert (update.slots.tolist(), update.rows.tolist(), update.cols.tolist()) == ([1, 3], [0, 1], [2, 1])


def test_the_result_is_an_update_of_int32():
    topology = BlockTopology.random((16, 16), 4, 0.5, DrawKey(0, "init", 0, "x"))
    for asked in (0, 3):
        update = prune_and_regrow(topology, torch.ones(8), asked, DrawKey(0, "regrow", 1, "x"))
        assert isinstance(update, TopologyUpdate)
        assert (update.slots.dtype, update.rows.dtype, update.cols.dtype) == (torch.int64, torch.int32, torch.int32)
        assert update.num_pruned == asked


def test_errors():
    topology = BlockTopology.random((16, 16), 4, 0.5, DrawKey(0, "init", 0, "x"))
    key = DrawKey(0, "regrow", 1, "x")
    with pytest.raises(ValueError, match="expected 8 block norms, found 7"):
        prune_and_regrow(topology, torch.ones(7), 1, key)
    with pytest.raises(ValueError, match="expected gradient norms for regrowth by gradient, found none"):
        prune_and_regrow(topology, torch.ones(8), 1, key, "gradient")


def test_recipes_know_the_rules_and_scores_without_loading_them() -> None:
    assert tuple(REGROW_RULES) == BUILT_IN_RULES
    assert tuple(PRUNE_SCORES) == BUILT_IN_SCORES


def test_mixed_regrowth_takes_turns_between_chance_and_gradient() -> None:
    shape, size = (40, 60), 4
    topology = BlockTopology.random(shape, size, 0.3, DrawKey(1, "init", 0, "w"))
    gradient_norms = torch.rand(topology.grid, generator=torch.Generator().manual_seed(1))
    key = DrawKey(1, "regrow", 1, "w")
    norms = torch.rand(topology.num_active, generator=torch.Generator().manual_seed(2))

    def grown(rule: str, count: int) -> set[int]:
        update = prune_and_regrow(topology, norms, count, key, rule, gradient_norms)
        return set((update.rows * topology.grid[1] + update.cols).tolist())

    for half in (1, 5, 10):
        both = grown("random", half) | grown("gradient", half)
        mixed = grown("mixed", 2 * half)
        assert both <= mixed, "the first of each list are among them"
        assert len(mixed) == 2 * half
