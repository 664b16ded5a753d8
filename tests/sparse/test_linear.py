import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional

from dsbert.sparse import BlockSparseLinear, BlockTopology, DrawKey
from dsbert.sparse.kernels import dense
from dsbert.sparse.kernels.dense import scratch_bytes
from dsbert.sparse.kernels.record import Choice
from dsbert.sparse.linear import dense_weight
from tests.sparse.toys import densify

BACKENDS = ("dense", "reference", "cpu")
EXACT = ("dense", "reference")  # compute in float64, too
CASES = [
    (backend, dtype)
    for backend in BACKENDS
    for dtype in (torch.float32, torch.bfloat16, torch.float64)
    if backend in EXACT or dtype != torch.float64
]
BLOCK_SIZES = (1, 4, 8, 16, 32, 64, 128)
SHAPES = ((128, 256), (256, 128), (128, 128), (12, 20), (48, 16))
# Largest error allowed, as a share of the largest entry of the float64 result.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def divides(shape, block_size):
    return shape[0] % block_size == shape[1] % block_size == 0


def make(shape, block_size, backend="dense", *, density=0.3, dtype=torch.float32, bias=True, seed=0):
    """A layer with random weights whose slots stand in no order: after updates they do not either."""
    drawn = BlockTopology.random(shape, block_size, density, DrawKey(seed, "init", 0, "x"))
    order = torch.randperm(drawn.num_active, generator=torch.Generator().manual_seed(seed))
    topology = BlockTopology(shape, block_size, drawn.rows[order], drawn.cols[order])
    layer = BlockSparseLinear(topology, bias=bias, kernels=backend, dtype=dtype)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return layer


def results(layer, x, dy):
    """Output and all gradients of the layer."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(dy)
    dbias = None if layer.bias is None else layer.bias.grad
    return {"y": y.detach(), "dx": x.grad, "dblocks": layer.blocks.grad, "dbias": dbias}


def expected_results(layer, x, dy):
    """The same by F.linear on the densified weight, in float64, by autograd."""
    x, blocks = x.detach().double().requires_grad_(), layer.blocks.detach().double().requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach().double().requires_grad_()
    y = functional.linear(x, densify(layer.shape, blocks, layer.rows, layer.cols), bias)
    y.backward(dy.double())
    return {"y": y.detach(), "dx": x.grad, "dblocks": blocks.grad, "dbias": None if bias is None else bias.grad}


def assert_close(found, expected, tolerance, dtype=None):
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
            continue
        assert found[name].shape == value.shape, name
        assert dtype is None or found[name].dtype == dtype, name
        error = (found[name].double() - value).abs().max().item() if value.numel() else 0.0
        scale = value.abs().max().item() if value.numel() else 0.0
        assert error <= tolerance * scale, f"{name}: {error:.3g} of {scale:.3g}"


def check(layer, x, dy, tolerance=None):
    dtype = layer.blocks.dtype
    assert_close(results(layer, x, dy), expected_results(layer, x, dy), tolerance or TOLERANCES[dtype], dtype)


def inputs(layer, *sizes, seed=1):
    generator = torch.Generator().manual_seed(seed)
    dtype = layer.blocks.dtype
    x = torch.randn(*sizes, layer.in_features, generator=generator).to(dtype)
    return x, torch.randn(*sizes, layer.out_features, generator=generator).to(dtype)


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_equals_the_dense_layer(backend, block_size, dtype):
    shapes = [shape for shape in SHAPES if divides(shape, block_size)]
    # Block by block in the expectation: thousands of 1 x 1 blocks only where the matrix is small.
    for shape in shapes if block_size > 1 else shapes[-2:]:
        for bias in (True, False):
            layer = make(shape, block_size, backend, dtype=dtype, bias=bias)
            check(layer, *inputs(layer, 9))


@pytest.mark.exhaustive
@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("density", [0.01, 0.2, 1.0])
def test_equals_the_dense_layer_everywhere(backend, density, dtype):
    shapes = [*SHAPES, (4, 4), (1, 1), (384, 128), (128, 512)]
    for shape, block_size, bias, tokens in itertools.product(shapes, BLOCK_SIZES, (True, False), (1, 33)):
        # The expectation is a loop over blocks: 1 x 1 only where there are few.
        if divides(shape, block_size) and shape[0] * shape[1] <= 1100 * block_size**2:
            layer = make(shape, block_size, backend, density=density, dtype=dtype, bias=bias)
            check(layer, *inputs(layer, tokens))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_in_half_precision(backend, block_size):
    layer = make(SHAPES[0] if block_size > 1 else SHAPES[3], block_size, backend, dtype=torch.float16)
    x, _ = inputs(layer, 9)
    expected = densify(layer.shape, layer.blocks.detach().double(), layer.rows, layer.cols)
    expected = functional.linear(x.double(), expected, layer.bias.detach().double())
    assert_close({"y": layer(x).detach()}, {"y": expected}, TOLERANCES[torch.float16], torch.float16)


@pytest.mark.parametrize("sizes", [(), (1,), (7,), (2, 5), (2, 1, 3), (0,), (3, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_leading_shape(backend, sizes):
    for block_size in (4, 16):
        layer = make((48, 16), block_size, backend)
        x, dy = inputs(layer, *sizes)
        assert layer(x).shape == dy.shape
        check(layer, x, dy)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_and_gradients_that_are_not_contiguous(backend):
    layer = make((48, 16), 4, backend)
    x, dy = inputs(layer, 5, 7)
    check(layer, x.transpose(0, 1), dy.transpose(0, 1))
    x, dy = inputs(layer, 16)
    check(layer, x.t()[:, :16], dy)
    check(layer, x[::2], dy[1::2])
    x, _ = inputs(layer, 6)
    check(layer, x, torch.ones(1, 1).expand(6, 48))
    check(layer, x[:1].expand(6, 16), torch.ones(48, 6).t())


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_block_rows_and_columns(backend):
    rows, cols = torch.tensor([2, 0, 2], dtype=torch.int32), torch.tensor([1, 3, 3], dtype=torch.int32)
    layer = BlockSparseLinear(BlockTopology((16, 16), 4, rows, cols), kernels=backend)
    assert layer.bias is not None
    nn.init.normal_(layer.bias)
    x, dy = inputs(layer, 5)
    check(layer, x, dy)
    found = results(layer, x, dy)
    assert torch.equal(found["y"][:, 4:8], layer.bias.detach()[4:8].expand(5, 4))
    assert not found["dx"][:, :4].any()
    assert not found["dx"][:, 8:12].any()


@pytest.mark.parametrize("backend", EXACT)
def test_gradcheck(backend):
    for bias in (True, False):
        layer = make((8, 12), 4, backend, density=0.5, dtype=torch.float64, bias=bias)
        x = inputs(layer, 3)[0].requires_grad_()
        assert torch.autograd.gradcheck(lambda x, *_, layer=layer: layer(x), (x, *layer.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend, dtype):
    layer = make((48, 16), 4, backend)
    x, dy = inputs(layer, 2, 5)
    x = x.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    y.backward(dy.to(dtype))
    found = {"y": y.detach(), "dx": x.grad, "dblocks": layer.blocks.grad, "dbias": layer.bias.grad}
    assert {name for name, value in found.items() if value.dtype == torch.float32} == {"dx", "dblocks", "dbias"}
    assert_close(found, expected_results(layer, x, dy), TOLERANCES[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_accumulate_and_can_be_left_out(backend):
    layer = make((48, 16), 4, backend)
    x, dy = inputs(layer, 5)
    once = results(layer, x, dy)
    layer(x).backward(dy)
    torch.testing.assert_close(layer.blocks.grad, 2 * expected_results(layer, x, dy)["dblocks"].float())
    assert once["dx"] is not None
    layer.zero_grad()
    layer.blocks.requires_grad_(False)
    layer(x.detach().requires_grad_()).backward(dy)
    assert layer.blocks.grad is None
    assert layer.bias.grad is not None


def test_two_layers_share_the_scratch():
    """It is overwritten between forward and backward of the first layer: nothing may depend on what it held."""
    first, second = make((48, 16), 4, seed=1), make((32, 48), 8, seed=2)
    x, _ = inputs(first, 6)
    _, dy = inputs(second, 6)
    x = x.requires_grad_()
    second(first(x)).backward(dy)
    reference = nn.Sequential(make((48, 16), 4, "reference", seed=1), make((32, 48), 8, "reference", seed=2))
    other = x.detach().requires_grad_()
    reference(other).backward(dy)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(first.blocks.grad, reference[0].blocks.grad, rtol=1e-5, atol=1e-4)
    assert scratch_bytes() >= 32 * 48 * 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_dense_gradient(backend, autocast):
    """While it is collected: the gradient of every weight, summed over backward passes, active or not."""
    layer = make((48, 16), 4, backend)
    layer.dense_gradient = torch.zeros(layer.shape)
    expected = torch.zeros(layer.shape)
    for seed in (1, 2):
        x, dy = inputs(layer, 2, 5, seed=seed)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = layer(x)
        y.backward(dy.to(y.dtype))
        expected += torch.einsum("abo,abi->oi", dy, x)
    tolerance = 2e-2 if autocast else 2e-6
    assert_close({"dense": layer.dense_gradient}, {"dense": expected.double()}, tolerance, torch.float32)


def test_set_topology_keeps_every_identity():
    layer = make((48, 16), 4)
    blocks, rows, cols = layer.blocks, layer.rows, layer.cols
    before = blocks.detach().clone()
    moved = BlockTopology.random((48, 16), 4, 0.3, DrawKey(9, "init", 0, "x"))
    digest = layer.digest()
    layer.set_topology(moved)
    assert layer.blocks is blocks
    assert layer.rows is rows
    assert layer.cols is cols
    assert torch.equal(blocks, before)
    assert layer.digest() == moved.digest() != digest
    assert layer.topology.digest() == moved.digest()
    check(layer, *inputs(layer, 5))


@pytest.mark.parametrize(
    ("shape", "block_size", "density"),
    [((16, 48), 4, 0.3), ((48, 16), 4, 0.5), ((48, 16), 8, 0.3), ((48, 32), 4, 0.15)],
)
def test_set_topology_refuses_another_shape(shape, block_size, density):
    layer = make((48, 16), 4)
    with pytest.raises(ValueError, match=r"expected shape, B, K = \(\(48, 16\), 4, 14\), found"):
        layer.set_topology(BlockTopology.random(shape, block_size, density, DrawKey(0, "init", 0, "x")))


def test_topology_is_a_copy():
    layer = make((48, 16), 4)
    copy = layer.topology
    layer.rows.zero_()
    assert copy.digest() != layer.digest()


def test_digest_is_taken_from_what_the_kernels_read():
    layer = make((48, 16), 4)
    digest = layer.digest()
    layer.cols[3] = (layer.cols[3] + 1) % 4
    assert layer.digest() != digest
    x, _ = inputs(layer, 5)
    torch.testing.assert_close(
        layer(x), functional.linear(x, densify(layer.shape, layer.blocks, layer.rows, layer.cols), layer.bias)
    )


def test_to_dense():
    layer = make((48, 16), 4)
    expected = densify(layer.shape, layer.blocks.detach(), layer.rows, layer.cols)
    assert torch.equal(layer.to_dense(), expected)
    assert torch.equal(dense_weight(layer.shape, layer.blocks, layer.rows, layer.cols), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_linear_keeps_the_active_blocks(dtype):
    linear = nn.Linear(16, 48, dtype=dtype)
    topology = BlockTopology.random((48, 16), 4, 0.3, DrawKey(0, "init", 0, "x"))
    layer = BlockSparseLinear.from_linear(linear, topology)
    mask = topology.mask().repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.equal(layer.to_dense(), linear.weight * mask)
    assert layer.bias is not None
    assert torch.equal(layer.bias, linear.bias)
    assert layer.blocks.dtype == dtype
    assert BlockSparseLinear.from_linear(nn.Linear(16, 48, bias=False), topology).bias is None


def test_only_the_blocks_are_kept():
    layer = make((128, 256), 16)
    assert {name: tuple(value.shape) for name, value in layer.named_parameters()} == {
        "blocks": (38, 16, 16),
        "bias": (128,),
    }
    assert {name: tuple(value.shape) for name, value in layer.named_buffers()} == {
        "rows": (38,),
        "cols": (38,),
        "order": (8 + 1 + 38 + 16 + 1 + 38,),
    }
    assert set(layer.state_dict()) == {"blocks", "bias", "rows", "cols"}
    assert "block_size=16, num_active=38, density=0.2969" in repr(layer)


def test_initial_weights():
    layer = BlockSparseLinear(BlockTopology.random((256, 256), 16, 0.5, DrawKey(0, "init", 0, "x")))
    assert layer.blocks.abs().max() <= 0.04
    assert layer.blocks.std().item() == pytest.approx(0.02 * 0.88, rel=0.03)  # a normal cut at two deviations
    assert not layer.bias.any()


def test_refuses_unknown_kernels():
    with pytest.raises(
        ValueError, match=r"expected kernels in \['auto', 'cpu', 'dense', 'reference', 'triton'\], found 'fast'"
    ):
        BlockSparseLinear(BlockTopology.random((16, 16), 4, 0.5, DrawKey(0, "init", 0, "x")), kernels="fast")


def test_load_state_dict_moves_the_kernels_too():
    """`order` is derived and in no state dict; kernels that read it must see the coordinates that came in."""
    source, x = make((64, 96), 16, "cpu", seed=1), torch.randn(5, 96)
    for target in (make((64, 96), 16, "cpu", seed=2), make((64, 96), 16, "cpu").to("meta").to_empty(device="cpu")):
        target.load_state_dict(source.state_dict())
        assert target.index.is_consistent()
        assert torch.equal(target(x), source(x))
    assigned = make((64, 96), 16, "cpu").to("meta")
    assigned.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(assigned(x), source(x))
    damaged = source.state_dict() | {"rows": torch.full_like(source.rows, 9)}
    with pytest.raises(RuntimeError, match=r"rows and cols: expected rows in 0\.\.3, found 9\.\.9"):
        make((64, 96), 16).load_state_dict(damaged)


def test_made_under_a_meta_device_the_topology_is_real():
    topology = BlockTopology.random((64, 96), 16, 0.3, DrawKey(0, "init", 0, "x"))
    with torch.device("meta"):
        layer = BlockSparseLinear(topology)
    assert layer.blocks.device.type == "meta"
    assert layer.rows.device.type == layer.order.device.type == "cpu"
    assert layer.index.is_consistent()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_mixed_dtypes_are_refused(backend, dtypes):
    """The C++ kernels would read one as the other."""
    layer = make((64, 96), 16, backend, dtype=dtypes[0])
    with pytest.raises(RuntimeError, match="one dtype"):
        layer(torch.zeros(3, 96, dtype=dtypes[1]))


@pytest.mark.parametrize("choice", ["cpu", "dense_onednn", "dense"])
def test_moved_to_another_dtype_the_kernels_are_chosen_anew_where_they_must(choice):
    layer, x = make((64, 96), 16, "auto"), torch.randn(7, 96)
    layer(x)
    layer.choice = Choice(choice, choice, choice)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            y = layer(x)
        y.sum().backward()
        assert y.dtype == dtype
    assert (layer.choice == (choice,) * 3) == (choice != "dense_onednn")
    double = layer.double()
    torch.testing.assert_close(double(x.double()), functional.linear(x.double(), double.to_dense(), double.bias))


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("backend", EXACT)
def test_gradients_of_gradients(backend, activation):
    layer = make((8, 12), 4, backend, dtype=torch.float64)
    layer.activation = activation

    def function(x, blocks, bias):
        return torch.func.functional_call(layer, {"blocks": blocks, "bias": bias}, (x,))

    inputs = (torch.randn(3, 12, dtype=torch.float64, requires_grad=True), layer.blocks, layer.bias)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradients_of_gradients_in_cpp(activation):
    found = []
    for backend in ("reference", "cpu"):
        layer = make((64, 96), 16, backend)
        layer.activation = activation
        x = torch.linspace(-1, 1, 5 * 96).view(5, 96).requires_grad_()
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        found.append((x.grad, layer.blocks.grad))
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


@pytest.mark.parametrize("backend", ["dense", "dense_onednn", "reference", "cpu"])
def test_tokenless(backend):
    layer = make((64, 96), 16, "auto")
    layer.choice = Choice(backend, backend, backend)
    x = torch.zeros(0, 96, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (0, 96)
    assert not layer.blocks.grad.any()


def test_the_scratch_serves_inference_mode_training_and_threads():
    layers = [make((256, 256), 16, "dense", seed=seed) for seed in (1, 2)]
    for layer in layers:
        layer.choice = Choice("dense", "dense", "dense")
    x = torch.randn(32, 256)
    dense._scratch.clear()
    with torch.inference_mode():
        expected = [layer(x).clone() for layer in layers]
    layers[0](x).sum().backward()

    def wrong(index):
        with torch.no_grad():
            return sum(not torch.equal(layers[index](x), expected[index]) for _ in range(200))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(wrong, (0, 1))) == [0, 0]
