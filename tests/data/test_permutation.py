import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsbert.data.permutation import permute


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_is_a_bijection(n, key):
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9, 1024, 1025])
def test_is_a_bijection_at_powers_of_two(n):
    assert np.array_equal(np.sort(permute(np.arange(n), n, 3)), np.arange(n))


GOLDEN_12 = [1, 10, 9, 4, 11, 0, 3, 5, 8, 6, 7, 2]
GOLDEN_LARGE = [880604889705, 365230464425, 852830299210]


def test_golden():
    assert permute(np.arange(12), 12, 42).tolist() == GOLDEN_12
    assert permute(np.array([0, 1, 10**12]), 10**12 + 1, 42).tolist() == GOLDEN_LARGE


def test_a_part_is_the_part_of_the_whole():
    whole = permute(np.arange(1000), 1000, 5)
    assert np.array_equal(permute(np.arange(300, 310), 1000, 5), whole[300:310])


def test_other_key_other_order():
    first, second = permute(np.arange(1000), 1000, 1), permute(np.arange(1000), 1000, 2)
    assert (first == second).mean() < 0.02
    assert (first == np.arange(1000)).mean() < 0.02


@pytest.mark.parametrize(("n", "keys"), [(2, 500), (5, 3000), (13, 500)])
def test_every_place_is_equally_likely(n, keys):
    images = np.stack([permute(np.arange(n), n, key) for key in range(keys)])
    for position in range(n):
        counts = np.bincount(images[:, position], minlength=n)
        chi_square = ((counts - keys / n) ** 2 / (keys / n)).sum()
        assert chi_square < (n - 1) + 5 * np.sqrt(2 * (n - 1)) + 5


def test_neighbours_part():
    """The distance of neighbours is that of independent draws, n / 3 in the mean."""
    n = 20_000
    distance = np.abs(np.diff(permute(np.arange(n), n, 9))).mean()
    assert abs(distance / (n / 3) - 1) < 0.03


@pytest.mark.parametrize(("positions", "n"), [([0], 0), ([5], 5), ([-1], 5), ([0], 2**62)])
def test_refuses_what_lies_outside(positions, n):
    with pytest.raises(ValueError, match="must be in"):
        permute(np.array(positions), n, 0)
