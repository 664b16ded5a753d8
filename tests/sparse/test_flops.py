import pytest

from dsbert.sparse.config import SparsityConfig
from dsbert.sparse.flops import attention_flops, linear_flops, sequence_flops
from dsbert.sparse.topology import num_active_blocks


def encoder_shapes(num_layers, hidden):
    """Query, key, value, attention output, FFN up and down of every layer."""
    return ([(hidden, hidden)] * 4 + [(4 * hidden, hidden), (hidden, 4 * hidden)]) * num_layers


@pytest.mark.parametrize(
    ("num_layers", "hidden", "sparsity", "paper", "digits"),
    [
        (12, 768, 0.9, 8.33e9, 3),  # Base
        (8, 512, 0.9, 2.738e9, 4),  # Medium
        (4, 512, 0.0, 10.07e9, 4),  # Small, dense
        (4, 256, 0.0, 2.617e9, 4),  # Mini, dense
    ],
)
def test_the_papers_figures(num_layers, hidden, sparsity, paper, digits):
    density = SparsityConfig(sparsity=sparsity).density
    shapes = encoder_shapes(num_layers, hidden)
    exact = sequence_flops(128, hidden, num_layers * 128**2, [round(out * into * density) for out, into in shapes])
    assert float(f"{exact:.{digits}g}") == paper
    # Whole blocks miss the density by a little.
    for size in (1, 4, 8, 16):
        weights = [num_active_blocks(shape, size, density) * size**2 for shape in shapes]
        assert sequence_flops(128, hidden, num_layers * 128**2, weights) == pytest.approx(exact, rel=1e-3)


def test_by_hand():
    # y = x W^T: a multiply and an add per weight and token; backward: the same for x and for W.
    assert linear_flops(tokens=10, num_weights=7) == 10 * 7 * 2 * 3
    # Q K^T and A V: seq x seq x hidden multiply-adds each.
    assert attention_flops(pairs=5 * 5, hidden_size=3) == 2 * (5 * 5 * 3) * 2 * 3
    assert sequence_flops(5, 3, 2 * 25, [7, 9]) == linear_flops(5, 16) + 2 * attention_flops(25, 3)
