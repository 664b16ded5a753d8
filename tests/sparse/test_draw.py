import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsbert.sparse import draw
from dsbert.sparse.draw import DrawKey, draw_positions, hash_positions, smallest
from tests.sparse.toys import plain_draw, plain_hash

KEY = DrawKey(seed=1, purpose="init", update=0, layer="encoder.0")


class WordKey(DrawKey):
    """A key whose word is its seed."""

    def word(self):
        return self.seed


def unsigned(hashes):
    return [value + (1 << 63) for value in hashes.tolist()]


GOLDEN_WORD = 16287076940051875747
# By position.
GOLDEN_HASHES = [
    "18bd2c1c231d69a3",
    "90f2d16cc653551d",
    "72f08b9082e6d4f8",
    "9c6d7f2c9c0db0ef",
    "2c3576a2fb5a48aa",
    "37475bc5fc91adcd",
    "1f2dac1d494d0f77",
    "dc84dfe7d0d47660",
    "03fee50ebba6fc79",
    "2dc36604ee7940d7",
    "04638c27a049d426",
    "94cf3c003aea46d7",
]
# How many of the twelve: which. Position 8 has the smallest hash, 7 the largest.
GOLDEN_DRAWS = {1: [8], 4: [0, 6, 8, 10], 6: [0, 4, 6, 8, 9, 10], 11: [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11]}


def test_hash_is_splitmix64():
    # The first outputs of splitmix64 seeded with 0, as published with the algorithm.
    hashes = unsigned(hash_positions(WordKey(0, "", 0, ""), torch.arange(3)))
    assert [f"{value:016x}" for value in hashes] == ["e220a8397b1dcdaf", "6e789e6aa1b965f4", "06c45d188009454f"]


def test_golden_hashes():
    assert KEY.word() == GOLDEN_WORD
    assert [f"{value:016x}" for value in unsigned(hash_positions(KEY, torch.arange(12)))] == GOLDEN_HASHES
    assert [f"{plain_hash(KEY, position):016x}" for position in range(12)] == GOLDEN_HASHES


@pytest.mark.parametrize("count", GOLDEN_DRAWS)
def test_golden_draws(count):
    assert draw_positions(KEY, torch.ones(12, dtype=torch.bool), count).tolist() == GOLDEN_DRAWS[count]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    update=st.integers(0, 10**6),
    first=st.integers(0, 2**40),
    layer=st.text("abc.0", max_size=12),
)
def test_hash_equals_plain_integers(seed, update, first, layer):
    key = DrawKey(seed, "regrow", update, layer)
    positions = [first, first + 1, first * 3 + 7]
    assert unsigned(hash_positions(key, torch.tensor(positions))) == [plain_hash(key, p) for p in positions]


@given(word=st.integers(-(2**63), 2**63 - 1))
def test_hash_at_the_edges_of_int64(word):
    key = WordKey(word, "", 0, "")
    assert unsigned(hash_positions(key, torch.tensor([0, 2**40]))) == [plain_hash(key, p) for p in (0, 2**40)]


def test_positions_never_tie():
    """Every step of the hash is a bijection, so that the order of a draw is strict."""
    assert hash_positions(KEY, torch.arange(300_000)).unique().numel() == 300_000


def test_ties_go_to_the_lower_index():
    assert smallest(torch.tensor([3, 1, 2, 1, 1]), 2).tolist() == [1, 3]
    assert smallest(torch.tensor([3, 1, 2, 1, 1]), 4).tolist() == [1, 2, 3, 4]
    assert smallest(torch.zeros(5), 3).tolist() == [0, 1, 2]
    assert smallest(torch.zeros(5), 0).tolist() == []


@given(values=st.lists(st.integers(-5, 5), min_size=1, max_size=60), data=st.data())
def test_smallest_equals_a_stable_sort(values, data):
    count = data.draw(st.integers(0, len(values)))
    expected = sorted(sorted(range(len(values)), key=lambda i: (values[i], i))[:count])
    assert smallest(torch.tensor(values), count).tolist() == expected


@settings(max_examples=80, deadline=None)
@given(size=st.integers(1, 1500), seed=st.integers(0, 2**63 - 1), free=st.floats(0, 1), share=st.floats(0, 1))
def test_draw_equals_brute_force(size, seed, free, share):
    eligible = torch.rand(size, generator=torch.Generator().manual_seed(seed % 1000)) < free
    count = round(share * int(eligible.sum()))
    key = DrawKey(seed, "regrow", 3, "x")
    assert draw_positions(key, eligible, count).tolist() == plain_draw(key, eligible.tolist(), count)


def test_draw_over_several_chunks_equals_brute_force():
    size = 2 * draw._CHUNK + 5
    eligible = torch.arange(size) % 3 > 0
    for count in (1, 40, 9000):
        assert draw_positions(KEY, eligible, count).tolist() == plain_draw(KEY, eligible.tolist(), count)


def test_draw_does_not_depend_on_the_threshold(monkeypatch):
    """When too few hashes pass the threshold, it is raised until enough do."""
    asked, candidates = [], draw._candidates

    def starve(key, eligible, fraction):
        asked.append(fraction)
        return candidates(key, eligible, fraction / 50)

    monkeypatch.setattr(draw, "_candidates", starve)
    eligible = torch.ones(2000, dtype=torch.bool)
    assert draw_positions(KEY, eligible, 700).tolist() == plain_draw(KEY, eligible.tolist(), 700)
    assert len(asked) > 3


def test_draws_nothing_everything_and_not_more():
    eligible = torch.tensor([True, False, True])
    assert draw_positions(KEY, eligible, 0).tolist() == []
    assert draw_positions(KEY, eligible, 2).tolist() == [0, 2]
    with pytest.raises(ValueError, match="expected at least 3 eligible positions, found 2"):
        draw_positions(KEY, eligible, 3)


def test_draws_are_nested():
    """A draw of fewer is part of the draw of more."""
    eligible = torch.ones(500, dtype=torch.bool)
    assert set(draw_positions(KEY, eligible, 20).tolist()) < set(draw_positions(KEY, eligible, 60).tolist())


def test_needs_no_generator_and_moves_none():
    state = torch.get_rng_state()
    draw_positions(KEY, torch.ones(500, dtype=torch.bool), 20)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_position_is_equally_likely():
    size, count, keys = 20, 5, 1200
    hits = torch.zeros(size)
    for seed in range(keys):
        hits[draw_positions(DrawKey(seed, "regrow", 1, "x"), torch.ones(size, dtype=torch.bool), count)] += 1
    expected = keys * count / size
    # Drawn without replacement: the counts vary less, by (N - n) / (N - 1).
    chi_square = float(((hits - expected) ** 2 / expected).sum()) * (size - 1) / (size - count)
    assert 4.9 < chi_square < 43.8  # 19 degrees of freedom, p = 0.0005 and 0.999


def test_a_draw_is_spread_evenly():
    drawn = draw_positions(KEY, torch.ones(100_000, dtype=torch.bool), 10_000)
    hits = torch.bincount(drawn // 5000, minlength=20).double()
    chi_square = float(((hits - 500) ** 2 / 500).sum()) * 19 / 20 / 0.9
    assert 4.9 < chi_square < 43.8


@pytest.mark.parametrize("other", [{"seed": 2}, {"purpose": "regrow"}, {"update": 1}, {"layer": "encoder.1"}])
def test_keys_are_independent(other):
    """Two draws share as many positions as chance has it: a hypergeometric number."""
    size, count = 10_000, 1000
    eligible = torch.ones(size, dtype=torch.bool)
    first = set(draw_positions(KEY, eligible, count).tolist())
    second = set(draw_positions(dataclasses.replace(KEY, **other), eligible, count).tolist())
    mean, deviation = count**2 / size, math.sqrt(count * 0.1 * 0.9 * (size - count) / (size - 1))
    assert abs(len(first & second) - mean) < 4 * deviation


def test_fields_of_a_key_do_not_run_into_each_other():
    words = {DrawKey(1, "a", 11, "b").word(), DrawKey(1, "a", 1, "1b").word(), DrawKey(11, "a", 1, "b").word()}
    assert len(words) == 3
