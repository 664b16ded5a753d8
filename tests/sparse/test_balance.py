import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsbert.sparse import BlockTopology, DrawKey, MaskManager, TorchBlockEditor, prune_and_regrow, sparsify_
from dsbert.sparse.balance import draw_in_rows, prunable
from dsbert.sparse.config import SparsityConfig
from dsbert.sparse.regrow import REGROW_RULES
from dsbert.sparse.topology import num_active_blocks

KEY = DrawKey(1, "init", 0, "x")


def per_row(topology):
    return torch.bincount(topology.rows.long(), minlength=topology.grid[0]).tolist()


@pytest.mark.parametrize(
    ("shape", "size", "density", "kept"),
    [((768, 768), 16, 0.1, 5), ((768, 3072), 64, 0.1, 5), ((768, 768), 128, 0.01, 1), ((64, 32), 8, 1.0, 4)],
)
def test_every_row_begins_with_the_same_number_at_least_one(shape, size, density, kept):
    topology = BlockTopology.random(shape, size, density, KEY, "rows")
    assert per_row(topology) == [kept] * (shape[0] // size)
    assert topology.num_active == num_active_blocks(shape, size, density, "rows")
    assert topology.digest() == BlockTopology.random(shape, size, density, KEY, "rows").digest()
    assert topology.positions().tolist() == sorted(topology.positions().tolist())


def test_columns_are_drawn_uniformly():
    hits, rounds = torch.zeros(8), 400
    for seed in range(rounds):
        topology = BlockTopology.random((64, 64), 8, 0.25, DrawKey(seed, "init", 0, "x"), "rows")
        hits += torch.bincount(topology.cols.long(), minlength=8)
    expected = rounds * 8 * 2 / 8
    chi_square = ((hits - expected) ** 2 / expected).sum().item()
    assert chi_square < 24.3  # 7 degrees of freedom, p = 0.001


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 9), cols=st.integers(1, 9), density=st.floats(0.05, 1.0), seed=st.integers(0, 999),
    rule=st.sampled_from(sorted(REGROW_RULES)), ties=st.sampled_from([1, 3, 1000]), asked=st.integers(0, 90),
)  # fmt: skip
def test_an_update_keeps_every_rows_number(rows, cols, density, seed, rule, ties, asked):
    generator = torch.Generator().manual_seed(seed)
    before = BlockTopology.random((4 * rows, 4 * cols), 4, density, DrawKey(seed, "init", 0, "x"), "rows")
    norms = torch.randint(ties, (before.num_active,), generator=generator)
    gradient = torch.randint(9, (rows, cols), generator=generator).float()
    update = prune_and_regrow(before, norms, asked, DrawKey(seed, "regrow", 1, "x"), rule, gradient, "rows")
    after = before.replace(update)
    assert per_row(after) == per_row(before)
    new = set((update.rows.long() * cols + update.cols).tolist())
    assert not new & set(before.positions().tolist())
    # By brute force: the smallest (norm, slot) go, unless their row has no empty block left for what it lost already.
    room = [cols - count for count in per_row(before)]
    expected: list[int] = []
    for slot in sorted(range(before.num_active), key=lambda slot: (norms[slot].item(), slot)):
        row = int(before.rows[slot])
        if len(expected) < asked and room[row]:
            room[row] -= 1
            expected.append(slot)
    assert update.slots.tolist() == sorted(expected)
    if rule == "gradient":
        for row in range(rows):
            grown = sorted(position % cols for position in new if position // cols == row)
            empty = (~before.mask()[row]).nonzero().flatten().tolist()
            best = sorted(empty, key=lambda col: (-gradient[row, col].item(), col))[: len(grown)]
            assert grown == sorted(best)


def test_refuses_what_a_row_does_not_have():
    eligible = torch.tensor([[True, True], [False, True]])
    with pytest.raises(ValueError, match="expected at least 2 eligible positions in row 1, found 1"):
        draw_in_rows(KEY, eligible, torch.tensor([1, 2]))
    assert prunable(torch.tensor([0, 0, 1]), torch.tensor([1, 2, 3]), 3, torch.tensor([1, 0])).tolist() == [0]


@pytest.mark.parametrize("balance", ["rows", "even"])
def test_the_manager_keeps_rows_balanced(balance):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 64))
    config = SparsityConfig(sparsity=0.7, block_size=8, modules=("*",), num_updates=5, balance=balance)
    layers = sparsify_(model, config, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    masks = MaskManager(layers, config, total_steps=10, editor=TorchBlockEditor(optimizer), seed=1)
    before = {name: layer.digest() for name, layer in layers.items()}
    for step in range(1, 11):
        optimizer.zero_grad()
        model(torch.randn(16, 64)).square().mean().backward()
        optimizer.step()
        masks.maybe_update(step)
    masks.verify_replicas()
    for name, layer in layers.items():
        if balance == "rows":
            assert set(per_row(layer.topology)) == {layer.num_active // layer.topology.grid[0]}
        assert spread(per_row(layer.topology)) <= 2
        assert layer.digest() != before[name]


def spread(numbers):
    return max(numbers) - min(numbers)


def per_col(topology):
    return torch.bincount(topology.cols.long(), minlength=topology.grid[1]).tolist()


class TestEven:
    @pytest.mark.parametrize(
        ("shape", "size", "density"),
        [((128, 128), 16, 0.1), ((128, 512), 16, 0.1), ((512, 128), 4, 0.1), ((64, 64), 8, 0.9), ((64, 32), 8, 1.0)],
    )
    def test_rows_and_columns_begin_as_equal_as_can_be(self, shape, size, density):
        for seed in range(5):
            key = DrawKey(seed, "init", 0, "x")
            topology = BlockTopology.random(shape, size, density, key, "even")
            assert topology.num_active == num_active_blocks(shape, size, density, "even")
            assert topology.num_active == num_active_blocks(shape, size, density)
            assert spread(per_row(topology)) <= 1
            assert spread(per_col(topology)) <= (1 if density < 0.5 else 2)
            assert topology.digest() == BlockTopology.random(shape, size, density, key, "even").digest()

    def test_every_place_is_drawn_as_often(self):
        hits, rounds = torch.zeros(8, 4), 600
        for seed in range(rounds):
            topology = BlockTopology.random((64, 32), 8, 0.19, DrawKey(seed, "init", 0, "x"), "even")
            hits += topology.mask()
        expected = rounds * 6 / 32
        assert ((hits - expected) ** 2 / expected).sum().item() < 61.1  # 31 degrees of freedom, p = 0.001

    @settings(max_examples=60, deadline=None)
    @given(
        rows=st.integers(1, 9), cols=st.integers(1, 9), density=st.floats(0.05, 1.0), seed=st.integers(0, 999),
        asked=st.integers(0, 90),
    )  # fmt: skip
    def test_what_is_regrown_goes_where_least_is(self, rows, cols, density, seed, asked):
        generator = torch.Generator().manual_seed(seed)
        before = BlockTopology.random((4 * rows, 4 * cols), 4, density, DrawKey(seed, "init", 0, "x"))
        norms = torch.randint(1000, (before.num_active,), generator=generator)
        update = prune_and_regrow(before, norms, asked, DrawKey(seed, "regrow", 1, "x"), balance="even")
        after = before.replace(update)
        assert after.num_active == before.num_active
        count = min(asked, rows * cols - before.num_active)
        assert update.slots.tolist() == sorted(sorted(range(len(norms)), key=lambda slot: (norms[slot], slot))[:count])
        new = set((update.rows.long() * cols + update.cols).tolist())
        assert not new & set(before.positions().tolist())
        # Nothing was grown in a row above one that had room for it.
        room = [
            any(row * cols + col not in {*before.positions().tolist(), *new} for col in range(cols))
            for row in range(rows)
        ]
        numbers = per_row(after)
        for row in {position // cols for position in new}:
            assert all(numbers[row] <= numbers[other] + 1 for other in range(rows) if room[other])

    def test_fills_empty_rows_and_columns_first(self):
        shape, key = (128, 128), DrawKey(3, "regrow", 1, "x")
        crowded = BlockTopology((shape), 16, torch.arange(8, dtype=torch.int32) // 4, torch.arange(8).int() % 4)
        after = crowded.replace(prune_and_regrow(crowded, torch.arange(8.0), 6, key, balance="even"))
        assert sum(number == 0 for number in per_row(after)) == 1
        assert sum(number == 0 for number in per_col(after)) <= 2

    def test_is_refused_beside_other_rules(self):
        with pytest.raises(ValueError, match=r"expected sparsity\.regrow random beside balance even, found gradient"):
            SparsityConfig(balance="even", regrow="gradient")
