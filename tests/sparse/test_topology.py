import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from dsbert.sparse import BlockTopology, DrawKey, TopologyUpdate
from dsbert.sparse.topology import combined_digest, grid, num_active_blocks, topology_digest

KEY = DrawKey(seed=1, purpose="init", update=0, layer="encoder.0")

GOLDEN_4 = """
# . . . # .
# . # . # .
. . . . . .
# . . . . .
"""
GOLDEN_1 = """
# . . . # # # .
# # # . . . . .
# . # . . . . .
. . . . . # . .
. . . . . . # .
. . # . . # # .
. . . # . . . .
. . . . . . # .
"""


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def topology(rows=(0, 2, 1), cols=(1, 0, 1), shape=(12, 8), block_size=4):
    return BlockTopology(shape, block_size, int32(*rows), int32(*cols))


def draw(mask):
    return "\n" + "".join(" ".join(".#"[int(active)] for active in row) + "\n" for row in mask)


@pytest.mark.parametrize(("shape", "block_size", "golden"), [((16, 24), 4, GOLDEN_4), ((8, 8), 1, GOLDEN_1)])
def test_golden_masks(shape, block_size, golden):
    drawn = BlockTopology.random(shape, block_size, 0.25, KEY)
    assert draw(drawn.mask()) == golden
    assert torch.equal(drawn.positions(), drawn.mask().flatten().nonzero().flatten())


def test_golden_digests():
    drawn = BlockTopology.random((16, 24), 4, 0.25, KEY)
    assert f"{drawn.digest():016x}" == "e4d59947bc8ef0c5"
    plain = b"16 24 4" + b"".join(v.to_bytes(4, "little") for v in (0, 0, 1, 1, 1, 3, 0, 4, 0, 2, 4, 0))
    assert drawn.digest() == xxhash.xxh3_64_intdigest(plain)
    assert combined_digest({"b": 2, "a": 1}) == combined_digest({"a": 1, "b": 2})
    assert combined_digest({"a": 1, "b": 2}) != combined_digest({"a": 2, "b": 1})


def test_slots_and_mask():
    example = topology()
    assert (example.grid, example.num_active, example.density) == ((3, 2), 3, 0.5)
    assert example.positions().tolist() == [1, 4, 3]
    assert draw(example.mask()) == "\n. #\n. #\n# .\n"


def test_digest_sees_everything_and_the_slot_order():
    digests = [
        topology().digest(),
        topology(rows=(2, 0, 1), cols=(0, 1, 1)).digest(),  # two slots swapped: the same mask
        topology(rows=(0, 2, 1), cols=(1, 1, 1)).digest(),
        topology(shape=(12, 12)).digest(),
        topology(shape=(24, 8)).digest(),
        topology(shape=(6, 4), block_size=2).digest(),
        BlockTopology((12, 8), 4, topology().cols, topology().rows.clamp(max=1)).digest(),
    ]
    assert len(set(digests)) == len(digests)
    example = topology()
    assert topology_digest(example.shape, 4, example.rows.clone(), example.cols) == example.digest()
    strided = torch.stack([example.rows, example.cols], 1)
    assert topology_digest(example.shape, 4, strided[:, 0], strided[:, 1]) == example.digest()


def test_replace_moves_the_named_slots_alone():
    before = topology()
    after = before.replace(TopologyUpdate(torch.tensor([1]), int32(0), int32(0)))
    assert after.rows.tolist() == [0, 0, 1]
    assert after.cols.tolist() == [1, 0, 1]
    assert before.rows.tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (([1], [0], [1]), "expected 3 distinct blocks, found 2"),
        (([0, 1], [2, 2], [1, 1]), "expected 3 distinct blocks, found 2"),
        (([1], [3], [0]), r"expected rows in 0\.\.2, found 0\.\.3"),
        (([1], [0], [-1]), r"expected cols in 0\.\.1, found -1\.\.1"),
    ],
)
def test_replace_refuses(update, message):
    slots, rows, cols = update
    with pytest.raises(ValueError, match=message):
        topology().replace(TopologyUpdate(torch.tensor(slots), int32(*rows), int32(*cols)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": (0, 0, 1), "cols": (1, 1, 1)}, "expected 3 distinct blocks, found 2"),
        ({"rows": (0, 1)}, "expected as many rows as cols, found 2 and 3"),
        ({"rows": (0, 1, 3)}, r"expected rows in 0\.\.2"),
        ({"shape": (12, 10)}, "expected a block size that divides 12 x 10, found 4"),
        ({"block_size": 0}, "expected a block size that divides 12 x 8, found 0"),
    ],
)
def test_refuses_what_is_no_topology(arguments, message):
    with pytest.raises(ValueError, match=message):
        topology(**arguments)


def test_refuses_other_dtypes():
    with pytest.raises(ValueError, match=r"expected rows int32 \[K\], found torch.int64 \[1\]"):
        BlockTopology((4, 4), 4, torch.tensor([0]), int32(0))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 30),
    cols=st.integers(1, 30),
    block_size=st.sampled_from([1, 4, 8, 16]),
    density=st.floats(0.001, 1),
    seed=st.integers(0, 1000),
)
def test_random_has_the_density(rows, cols, block_size, density, seed):
    shape = (rows * block_size, cols * block_size)
    drawn = BlockTopology.random(shape, block_size, density, DrawKey(seed, "init", 0, "x"))
    assert drawn.grid == grid(shape, block_size) == (rows, cols)
    assert drawn.num_active == int(drawn.mask().sum()) == max(1, round(density * rows * cols))
    assert drawn.num_active == num_active_blocks(shape, block_size, density)
    assert drawn.density == drawn.num_active / (rows * cols)
    again = BlockTopology.random(shape, block_size, density, DrawKey(seed, "init", 0, "x"))
    assert again.digest() == drawn.digest()


def test_random_refuses_a_block_size_that_does_not_divide():
    with pytest.raises(ValueError, match="expected a block size that divides 16 x 20, found 8"):
        BlockTopology.random((16, 20), 8, 0.5, KEY)
