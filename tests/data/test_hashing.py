import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dsbert.data.hashing import below, hash64, hash_int, mix64, substream, unit_interval

WORDS = st.integers(0, 2**64 - 1)


def test_mix64_golden():
    # The first outputs of splitmix64 seeded with 0, as published with the algorithm.
    stream = substream(np.zeros(1, dtype=np.uint64), np.arange(3))
    assert [hex(value) for value in stream.tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]
    assert mix64(np.zeros(1, dtype=np.uint64)).tolist() == [0]


@given(st.lists(WORDS, min_size=1, max_size=4))
def test_scalar_and_array_hashes_agree(parts):
    arrays = [np.array([part], dtype=np.uint64) for part in parts]
    assert hash64([], *arrays).tolist() == [hash_int(*parts)]
    assert hash64(parts[:1], *arrays[1:]).tolist() == [hash_int(*parts)]


def test_order_and_number_of_parts_matter():
    assert len({hash_int(1, 2), hash_int(2, 1), hash_int(1), hash_int(1, 2, 0), hash_int(0, 1, 2)}) == 5


def test_negative_integers_wrap():
    assert hash_int(-1) == hash_int(2**64 - 1)


def test_numbers_are_uniform():
    hashes = hash64([7], np.arange(100_000))
    unit = unit_interval(hashes)
    assert unit.min() >= 0
    assert unit.max() < 1
    assert abs(unit.mean() - 0.5) < 4 * np.sqrt(1 / 12 / len(unit))
    counts = np.bincount(below(hashes, 10), minlength=10)
    assert ((counts - 1e4) ** 2 / 1e4).sum() < 27.9  # chi-square, 9 degrees of freedom: p = 0.001
