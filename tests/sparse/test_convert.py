import pytest
import torch
from torch import nn

from dsbert.base.errors import UserError
from dsbert.config.sparsity_keys import named_as_in_recipes
from dsbert.sparse import BlockSparseLinear, BlockTopology, DrawKey, SparsityConfig, sparsify_
from dsbert.sparse.sparsity_errors import SparsityError
from tests.sparse.toys import densify


class Tree(nn.Module):
    def __init__(self, device=None):
        super().__init__()
        self.encoder = nn.ModuleDict(
            {"up": nn.Linear(16, 64, device=device), "down": nn.Linear(64, 16, bias=False, device=device)}
        )
        self.head = nn.Linear(16, 10, device=device)


def config(**values):
    return SparsityConfig(**{"modules": ("encoder.*",), "block_size": 4, "sparsity": 0.75} | values)


def test_replaces_what_fits_and_keeps_its_weights():
    model = Tree()
    head, up = model.head, model.encoder["up"]
    layers = sparsify_(model, config(), seed=5)
    assert list(layers) == ["encoder.up", "encoder.down"]
    assert model.encoder["up"] is layers["encoder.up"]
    assert isinstance(model.encoder["down"], BlockSparseLinear)
    assert model.encoder["down"].bias is None
    assert model.head is head
    layer = layers["encoder.up"]
    assert isinstance(up, nn.Linear)
    assert layer.bias is not None
    expected = BlockTopology.random((64, 16), 4, 0.25, DrawKey(5, "init", 0, "encoder.up"))
    assert layer.topology.digest() == expected.digest()
    mask = expected.mask().repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.equal(densify(layer.shape, layer.blocks.detach(), layer.rows, layer.cols), up.weight * mask)
    assert torch.equal(layer.bias, up.bias)


def test_patterns_depend_on_seed_and_name_alone():
    torch.manual_seed(1)
    first = {name: layer.digest() for name, layer in sparsify_(Tree(), config(), seed=5).items()}
    torch.manual_seed(2)
    part = sparsify_(Tree(), config(modules=("*.down",)), seed=5)
    assert part["encoder.down"].digest() == first["encoder.down"]
    other = {name: layer.digest() for name, layer in sparsify_(Tree(), config(), seed=6).items()}
    assert not set(first.values()) & set(other.values())


def test_on_the_meta_device():
    layers = sparsify_(Tree("meta"), config(), seed=5)
    real = sparsify_(Tree(), config(), seed=5)
    for name, layer in layers.items():
        assert layer.blocks.device.type == "meta"
        assert layer.digest() == real[name].digest()


def test_pattern_dense_replaces_nothing():
    model = Tree()
    assert sparsify_(model, config(pattern="dense", block_size=32)) == {}
    assert isinstance(model.encoder["up"], nn.Linear)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"modules": ("decoder.*",)},
            r"^expected linear layers that fit modules \['decoder\.\*'\], found none",
        ),
        (
            {"block_size": 32},
            "^block_size for encoder.up: expected a block size that divides 64 x 16, found 32",
        ),
        ({"modules": ("*",)}, "^block_size for head: expected a block size that divides 10 x 16, found 4"),
        (
            {"block_size": 16, "sparsity": 0.9},
            r"expected density 0\.1 in encoder.up, found 0\.25 as the nearest that 4 x 1 blocks of 16 allow",
        ),
    ],
)
def test_refuses_and_changes_nothing(values, message):
    model = Tree()
    before = list(model.modules())
    with pytest.raises(SparsityError, match=message) as caught:
        sparsify_(model, config(**values))
    assert "\n" not in str(caught.value)
    assert list(model.modules()) == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modules": ("x",)}, "expected linear layers that fit sparsity.modules ['x'], found none"),
        (
            {"block_size": 32},
            "sparsity.block_size for encoder.up: expected a block size that divides 64 x 16, found 32",
        ),
        (
            {"block_size": 16, "sparsity": 0.9},
            "expected density 0.1 in encoder.up, found 0.25 as the nearest that 4 x 1 blocks of 16 allow: use a "
            "smaller block or sparsity.allow_density_error=true",
        ),
    ],
)
def test_to_who_writes_recipes_the_errors_name_their_keys(values, message):
    with pytest.raises(UserError) as caught, named_as_in_recipes():
        sparsify_(Tree(), config(**values))
    assert str(caught.value) == message


def test_a_recipe_that_asks_for_kernels_that_cannot_run_is_told_its_key():
    reason = "block size 4 is below 16"
    for everywhere in (False, True):
        with pytest.raises(UserError) as caught, named_as_in_recipes(on_all_ranks=everywhere):
            sparsify_(Tree(), config(kernels="triton"))["encoder.up"](torch.zeros(1, 16))
        assert str(caught.value) == f"expected sparsity.kernels that can run here, found triton: {reason}; choose auto"
        assert caught.value.shared == everywhere


def test_a_density_off_the_mark_can_be_allowed():
    layers = sparsify_(Tree(), config(block_size=16, sparsity=0.9, allow_density_error=True))
    assert [layer.num_active for layer in layers.values()] == [1, 1]
