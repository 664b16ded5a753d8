from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsbert.data.order import Order

WINDOWS = st.sampled_from([0, 64, 160, 400, 5000])


@settings(max_examples=40, deadline=None)
@given(N=st.integers(1, 700), window=WINDOWS, seed=st.integers(0, 9), epoch=st.integers(0, 30))
def test_each_sample_stands_in_an_epoch_once(N, window, seed, epoch):
    epochs, samples = Order(N, seed, window).at(epoch * N, N)
    assert (epochs == epoch).all()
    assert np.array_equal(np.sort(samples), np.arange(N))


@settings(max_examples=15, deadline=None)
@given(N=st.integers(20, 9000), window=WINDOWS, cuts=st.lists(st.integers(0, 2000), max_size=5))
def test_any_position_can_be_asked_for_at_once(N, window, cuts):
    whole = Order(N, 3, window).at(0, 2000)[1]
    edges = [0, *sorted(cuts), 2000]
    order = Order(N, 3, window)
    for first, last in reversed(list(pairwise(edges))):
        assert np.array_equal(order.at(first, last - first)[1], whole[first:last])


def test_epochs_and_seeds_differ():
    first, second = Order(5000, 1, 512).at(0, 5000)[1], Order(5000, 1, 512).at(5000, 5000)[1]
    assert (first == second).mean() < 0.01
    assert (first == Order(5000, 2, 512).at(0, 5000)[1]).mean() < 0.01


def test_what_is_read_together_comes_from_few_places():
    N, window = 100_000, 1600
    samples = Order(N, 1, window).at(0, window)[1]
    assert len(np.unique(samples // (window // 16))) <= 17  # one chunk may be the short one
    assert len(np.unique(Order(N, 1).at(0, window)[1] // (window // 16))) > 500


@pytest.mark.parametrize("window", [0, 160])
def test_every_sample_is_equally_likely_at_every_place(window):
    """Chi-square over many epochs of a small domain: 400 samples, 10 classes of places by 10 classes of samples."""
    N, epochs = 400, 200
    samples = Order(N, 7, window).at(0, N * epochs)[1].reshape(epochs, N)
    for block in (slice(0, 40), slice(180, 220), slice(360, 400)):
        counts = np.bincount(samples[:, block].ravel() // 40, minlength=10)
        # Whole chunks of 10 stand together: a chunk is what is drawn, so the variance is 10 times as large.
        inflation = 1 if not window else 10
        chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum() / inflation
        assert chi_square < 27.9  # 9 degrees of freedom: p = 0.001


def test_a_negative_window_is_refused():
    with pytest.raises(ValueError, match="at least 0"):
        Order(10, 1, -1)


def test_what_is_kept_is_bounded():
    order = Order(50_000, 1, 4096)
    for position in range(0, 3_000_000, 100_000):
        order.at(position, 10)
    assert len(order._blocks) <= 8
    assert len(order._chunk_orders) <= 2
