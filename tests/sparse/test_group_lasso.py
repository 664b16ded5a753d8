import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsbert.sparse.group_lasso import shrink_factors, shrink_slice_

LASSO = {"strength": 3.0, "weight_std": 0.02, "lr": 1e-2}


def shrunk(blocks, block_size, strength, weight_std, lr):
    """The paper's formula, weight by weight, in float64."""
    out = blocks.double().clone()
    for block in out:
        norm = math.sqrt(sum(w * w for w in block.flatten().tolist()) + 1e-6)
        block -= strength * weight_std * math.sqrt(block_size) * lr * block.clone() / norm
    return out


def factors_of(blocks, block_size):
    return shrink_factors(blocks.square().sum((1, 2)), block_size=block_size, **LASSO)


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.02, 1.0])
def test_equals_the_formula(block_size, scale):
    blocks = torch.randn(6, block_size, block_size, generator=torch.Generator().manual_seed(1)) * scale
    expected = shrunk(blocks, block_size, **LASSO)
    flat = blocks.flatten()
    shrink_slice_(flat, 0, block_size**2, factors_of(blocks, block_size))
    torch.testing.assert_close(flat.view_as(blocks).double(), expected, rtol=1e-6, atol=1e-12)


def test_pulls_weak_blocks_harder():
    blocks = torch.stack([torch.full((4, 4), 1.0), torch.full((4, 4), 0.01)])
    strong, weak = (1 - factors_of(blocks, 4)).tolist()
    # By the same distance, so that the smaller loses the larger share: 100 times.
    assert weak / strong == pytest.approx(100, rel=0.01)
    assert shrink_factors(torch.ones(1), strength=0.0, weight_std=0.02, block_size=4, lr=1.0).tolist() == [1.0]


@settings(max_examples=100, deadline=None)
@given(edges=st.lists(st.integers(0, 5 * 16), max_size=8), seed=st.integers(0, 1000))
def test_sliced_equals_whole(edges, seed):
    blocks = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(seed)) * 0.02
    factors = factors_of(blocks, 4)
    whole, sliced = blocks.flatten(), blocks.flatten().clone()
    for start, stop in itertools.pairwise(sorted([0, *edges, 80])):
        shrink_slice_(sliced[start:stop], start, 16, factors)
    expected = (blocks * factors[:, None, None]).flatten()
    shrink_slice_(whole, 0, 16, factors)
    assert torch.equal(sliced, expected)
    assert torch.equal(whole, expected)
