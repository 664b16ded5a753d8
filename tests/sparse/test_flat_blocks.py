import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsbert.sparse.flat_blocks import PRUNE_SCORES, fill_blocks_, partial_scores, runs

NUMEL = 16  # elements of a block


@st.composite
def cuts(draw):
    """(weights [K, 16], slices): any cut of the flat parameter; small slices lie inside one block."""
    num_blocks = draw(st.integers(1, 8))
    edges = draw(st.lists(st.integers(0, num_blocks * NUMEL), max_size=10))
    scale = draw(st.sampled_from([1e-6, 0.02, 1.0, 1e5]))
    seed = draw(st.integers(0, 10**6))
    weights = torch.randn(num_blocks, NUMEL, generator=torch.Generator().manual_seed(seed)) * scale
    return weights, sorted([0, *edges, num_blocks * NUMEL])


def combine(score, parts):
    stacked = torch.stack(parts)
    return stacked.sum(0) if score.combine == "sum" else stacked.amax(0)


def plain_scores(weights, score):
    return combine(score, list(score.terms(weights).unbind(1)))


@settings(max_examples=80, deadline=None)
@given(cut=cuts(), name=st.sampled_from(sorted(PRUNE_SCORES)))
def test_slices_sum_exactly_to_the_whole(cut, name):
    weights, edges = cut
    score, flat = PRUNE_SCORES[name], weights.flatten()
    parts = [
        partial_scores(flat[start:stop], start, len(weights), NUMEL, score) for start, stop in itertools.pairwise(edges)
    ]
    assert torch.equal(combine(score, parts), plain_scores(weights, score))
    assert torch.equal(partial_scores(flat, 0, len(weights), NUMEL, score), plain_scores(weights, score))


@pytest.mark.parametrize("name", sorted(PRUNE_SCORES))
def test_every_slice_of_three_blocks(name):
    """All cuts in three: edges in one block, in neighbours, on borders, empty slices."""
    weights = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    score, flat = PRUNE_SCORES[name], weights.flatten()
    whole = plain_scores(weights, score)
    for first, second in itertools.combinations_with_replacement(range(13), 2):
        parts = [
            partial_scores(flat[start:stop], start, 3, 4, score)
            for start, stop in ((0, first), (first, second), (second, 12))
        ]
        assert torch.equal(combine(score, parts), whole), (first, second)


@pytest.mark.parametrize(("name", "order"), [("l1", 1), ("l2", 2), ("linf", float("inf"))])
@pytest.mark.parametrize("scale", [1e-3, 0.02, 3.0])
def test_scores_are_the_norms(name, order, scale):
    weights = torch.randn(50, 256, generator=torch.Generator().manual_seed(2)) * scale
    score = PRUNE_SCORES[name]
    found = partial_scores(weights.flatten(), 0, 50, 256, score).double() / score.scale
    found = found.sqrt() if name == "l2" else found
    expected = torch.linalg.vector_norm(weights.double(), ord=order, dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(found.argsort(), expected.argsort())


@pytest.mark.parametrize("name", sorted(PRUNE_SCORES))
def test_large_weights_saturate_and_do_not_overflow(name):
    score = PRUNE_SCORES[name]
    weights = torch.full((2, 128 * 128), 3e38)
    weights[1] = float("-inf")
    scores = partial_scores(weights.flatten(), 0, 2, 128 * 128, score)
    assert int(scores.min()) > 0
    assert int(scores[0]) == int(scores[1])


def test_scoring_leaves_the_weights_alone():
    for score in PRUNE_SCORES.values():
        weights = torch.linspace(-9000, 9000, 32)
        before = weights.clone()
        partial_scores(weights, 0, 2, NUMEL, score)
        assert torch.equal(weights, before)


@settings(max_examples=80, deadline=None)
@given(cut=cuts(), data=st.data())
def test_zeroing_slices_equals_zeroing_blocks(cut, data):
    weights, edges = cut
    slots = sorted(data.draw(st.sets(st.integers(0, len(weights) - 1))))
    flat = weights.flatten().clone()
    for start, stop in itertools.pairwise(edges):
        fill_blocks_(flat[start:stop], start, NUMEL, torch.tensor(slots, dtype=torch.int64))
    expected = weights.clone()
    expected[slots] = 0
    assert torch.equal(flat.view_as(weights), expected)


@pytest.mark.parametrize("block_numel", [1, 4])
def test_runs_have_a_row_for_each_block(block_numel):
    for first, second in itertools.combinations_with_replacement(range(13), 2):
        elements, found = torch.arange(first, second), []
        for part, block, blocks in runs(first, second - first, block_numel):
            rows = elements[part].view(blocks, -1)
            assert torch.equal(rows // block_numel, torch.arange(block, block + blocks)[:, None].expand_as(rows))
            found += rows.flatten().tolist()
        assert found == elements.tolist(), (first, second)


def test_zeroing_every_slice_of_three_blocks():
    for first, second in itertools.combinations_with_replacement(range(13), 2):
        for slots in ([0], [1], [2], [0, 2], [0, 1, 2]):
            flat = torch.ones(12)
            fill_blocks_(flat[first:second], first, 4, torch.tensor(slots))
            expected = [float(not (first <= i < second and i // 4 in slots)) for i in range(12)]
            assert flat.tolist() == expected, (first, second, slots)
