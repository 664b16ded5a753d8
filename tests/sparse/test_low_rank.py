"""W = blocks + U V against dense float64 autograd of just that, on every backend; what begins, moves and counts."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from dsbert.sparse import BlockSparseLinear, SparsityConfig, SparsityError, half_precision, sparsify_
from dsbert.sparse.convert import num_kept_weights
from dsbert.sparse.flops import linear_flops
from dsbert.sparse.low_rank import PARTS
from tests.sparse.test_linear import CASES, EXACT, TOLERANCES, assert_close, inputs
from tests.sparse.toys import TOTAL_STEPS, Toy, batch, densify

RANK = 3
SHAPE = (96, 64)


def make(backend="dense", *, dtype=torch.float32, bias=True, activation=None, shape=SHAPE, size=16):
    """A layer whose blocks, bias, U and V are all random."""
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)
    config = SparsityConfig(
        sparsity=0.7, block_size=size, modules=("*",), kernels=backend, low_rank=RANK, allow_density_error=True
    )
    (layer,) = sparsify_(nn.Sequential(linear), config).values()
    layer.activation = activation
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return layer


def weight_of(layer, blocks, u, v):
    return densify(layer.shape, blocks, layer.rows, layer.cols) + u @ v


def expected_results(layer, x, dy):
    """By F.linear on the summed weight, in float64, by autograd; "dense" is the gradient of that weight."""
    exact = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    x = x.detach().double().requires_grad_()
    weight = weight_of(layer, exact["blocks"], exact[PARTS[0]], exact[PARTS[1]])
    weight.retain_grad()
    y = functional.linear(x, weight, exact.get("bias"))
    y = y if layer.activation is None else functional.gelu(y)
    y.backward(dy.double())
    return {"y": y.detach(), "x": x.grad, "dense": weight.grad} | {name: p.grad for name, p in exact.items()}


def results(layer, x, dy):
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


def check(layer, x, dy):
    """In half precisions y is rounded before the term is added, too: three times what a layer of blocks is allowed."""
    expected = expected_results(layer, x, dy)
    del expected["dense"]
    assert_close(results(layer, x, dy), expected, 3 * TOLERANCES[x.dtype], x.dtype)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
def test_equals_the_dense_layer(backend, dtype, activation):
    for bias in (True, False):
        layer = make(backend, dtype=dtype, bias=bias, activation=activation)
        check(layer, *inputs(layer, 9))
        check(layer, *inputs(layer, 2, 5))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_half_precision_that_a_cpu_cannot_multiply_is_multiplied_in_fp32(backend, activation, monkeypatch):
    layer = make(backend, dtype=torch.bfloat16, activation=activation)
    x, dy = inputs(layer, 33)
    seen = []
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: seen.append(a.dtype) or product(a, b))
    for able in (True, False):
        monkeypatch.setattr(half_precision, "multiplies", lambda dtype, able=able: able)
        seen.clear()
        layer(x)
        assert set(seen) == {torch.bfloat16 if able else torch.float32}
        check(layer, x, dy)
    # Under autocast as without it, to the bit.
    expected = layer(x)
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x.float()), expected)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("backend", EXACT)
def test_gradients_and_theirs(backend, activation):
    layer = make(backend, dtype=torch.float64, activation=activation, shape=(8, 12), size=4)
    names = [name for name, _ in layer.named_parameters()]
    assert names == ["blocks", "bias", *PARTS]

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, *layer.parameters()))
    assert torch.autograd.gradgradcheck(function, (x, *layer.parameters()))


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("frozen", [("blocks", "bias"), PARTS, ("blocks", "bias", *PARTS)])
def test_what_is_frozen_gets_no_gradient_and_the_rest_gets_its_own(frozen, activation):
    layer = make("cpu", activation=activation)
    x, dy = inputs(layer, 9)
    expected = expected_results(layer, x, dy)
    for name in frozen:
        layer.get_parameter(name).requires_grad_(False)
    found = results(layer, x, dy)
    for name, gradient in found.items():
        if name in frozen:
            assert gradient is None
        else:
            assert_close({name: gradient}, {name: expected[name]}, 3 * TOLERANCES[torch.float32])


def test_without_tokens():
    for activation in (None, "gelu"):
        layer = make("auto", activation=activation)
        x = torch.zeros(0, SHAPE[1], requires_grad=True)
        layer(x).sum().backward()
        assert not layer.low_rank_u.grad.any()
        assert not layer.low_rank_v.grad.any()


def test_the_dense_copy_is_the_sum():
    layer = make(dtype=torch.float32)
    exact = weight_of(layer, *(layer.get_parameter(name).detach().double() for name in ("blocks", *PARTS)))
    assert_close({"W": layer.to_dense()}, {"W": exact}, TOLERANCES[torch.float32], torch.float32)
    assert not layer.to_dense().requires_grad
    x = torch.randn(5, SHAPE[1])
    torch.testing.assert_close(layer(x), functional.linear(x, layer.to_dense(), layer.bias), rtol=1e-4, atol=1e-4)


def sparse_pair(low_rank, *, global_seed, seed=5, device="cpu"):
    torch.manual_seed(11)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)).to(device)
    torch.manual_seed(global_seed)
    config = SparsityConfig(sparsity=0.75, block_size=16, modules=("*",), kernels="cpu", low_rank=low_rank)
    return model, sparsify_(model, config, seed=seed)


def test_a_layer_begins_as_its_blocks_alone_and_from_the_seed_alone():
    plain, _ = sparse_pair(0, global_seed=1)
    model, layers = sparse_pair(8, global_seed=1)
    _, others = sparse_pair(8, global_seed=2)
    _, reseeded = sparse_pair(8, global_seed=1, seed=6)
    x = torch.randn(7, 128)
    assert torch.equal(model(x), plain(x))
    for name, layer in layers.items():
        assert not layer.low_rank_u.any()
        assert layer.low_rank_v.abs().max() <= 0.04
        assert layer.low_rank_v.std().item() == pytest.approx(0.02 * 0.88, rel=0.05)  # a normal cut at two deviations
        assert torch.equal(layer.low_rank_v, others[name].low_rank_v)
        assert not torch.equal(layer.low_rank_v, reseeded[name].low_rank_v)
        assert "low_rank=8" in repr(layer)
    assert not torch.equal(layers["0"].low_rank_v[:, :128], layers["2"].low_rank_v[:, :128])
    # Neither gradient may be zero for ever: U moves at the first step, V from the second on.
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    begin = copy.deepcopy(layers["2"].low_rank_v.detach())
    for moved in (False, True):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        assert layers["2"].low_rank_u.any()
        assert torch.equal(layers["2"].low_rank_v, begin) != moved


def test_where_it_is_off_nothing_is_there():
    """Neither parameters nor draws: the generator stands where it would."""
    model, layers = sparse_pair(0, global_seed=3)
    after = torch.rand(1)
    torch.manual_seed(11)
    twin = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))
    torch.manual_seed(3)
    for index in (0, 2):
        replaced = BlockSparseLinear(layers[str(index)].topology)
        assert set(replaced.state_dict()) == {"blocks", "bias", "rows", "cols"}
        twin[index] = replaced
    assert torch.equal(after, torch.rand(1))
    assert set(model.state_dict()) == set(twin.state_dict())
    assert "low_rank" not in repr(layers["0"])


def test_a_rank_above_a_weights_is_refused():
    model = nn.Sequential(nn.Linear(128, 16))
    config = SparsityConfig(sparsity=0.5, block_size=16, modules=("*",), low_rank=17)
    with pytest.raises(SparsityError, match=r"^expected low_rank of at most 16 for 0, 16 x 128, found 17$"):
        sparsify_(model, config)
    assert sparsify_(model, config.model_copy(update={"pattern": "dense"})) == {}


def test_every_weight_of_the_term_counts():
    """128 x 512 at density 0.25 and block 16: 64 blocks of 256, and 4 x (128 + 512) weights."""
    config = SparsityConfig(sparsity=0.75, block_size=16, modules=("0",), low_rank=4)
    (layer,) = sparsify_(nn.Sequential(nn.Linear(512, 128)), config).values()
    assert layer.num_weights == sum(p.numel() for p in layer.parameters()) - 128 == 16384 + 2560
    assert num_kept_weights("0", (128, 512), config) == 16384 + 2560
    assert num_kept_weights("1", (128, 512), config) == 128 * 512
    assert num_kept_weights("0", (128, 512), config.model_copy(update={"pattern": "dense"})) == 128 * 512
    forward = 10 * (2 * 16384 + 2 * 4 * 512 + 2 * 4 * 128)  # ten tokens: blocks, X V^T, and that times U^T
    assert linear_flops(10, layer.num_weights) == 3 * forward


@pytest.mark.parametrize("regrow", ["random", "gradient"])
def test_mask_updates_leave_the_term_alone(regrow):
    toy = Toy(low_rank=2, regrow=regrow)
    assert toy.masks.density == Toy().masks.density
    moved = 0
    for step in range(1, TOTAL_STEPS + 1):
        toy.step(step)
        before = {id(p): [p.detach().clone(), *map(torch.clone, moments(toy, p))] for p in terms(toy)}
        moved += toy.masks.maybe_update(step) is not None
        for parameter in terms(toy):
            after = [parameter.detach(), *moments(toy, parameter)]
            assert all(torch.equal(a, b) for a, b in zip(before[id(parameter)], after, strict=True))
    assert moved == 5
    assert all(parameter.any() for parameter in terms(toy)), "it is trained"


def terms(toy):
    return [layer.get_parameter(part) for layer in toy.layers.values() for part in PARTS]


def moments(toy, parameter):
    return [toy.optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")]


def test_regrowth_sees_the_gradient_of_the_summed_weight():
    toy = Toy(low_rank=2, regrow="gradient", num_updates=TOTAL_STEPS)  # armed from the first step on
    with torch.no_grad():
        for parameter in terms(toy):
            parameter.normal_()
    x, y = batch(1)
    toy.optimizer.zero_grad()
    toy.loss(x, y).backward()
    weights = {}
    for name, layer in toy.layers.items():
        values = (layer.get_parameter(part).detach() for part in ("blocks", *PARTS))
        weights[name] = weight_of(layer, *values).requires_grad_()
    hidden = functional.linear(x, weights["0"], toy.layers["0"].bias.detach()).tanh()
    functional.mse_loss(functional.linear(hidden, weights["2"], toy.layers["2"].bias.detach()), y).backward()
    for name, gradient in toy.masks.dense_gradients().items():
        torch.testing.assert_close(gradient, weights[name].grad, rtol=1e-4, atol=1e-5)


def test_it_survives_a_round_through_its_state():
    _, layers = sparse_pair(8, global_seed=1)
    source = layers["0"]
    with torch.no_grad():
        source.low_rank_u.normal_()
    target = BlockSparseLinear(source.topology, low_rank=8, kernels="cpu")
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 128)
    assert torch.equal(source(x), target(x))
