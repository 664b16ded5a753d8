"""The loss of a vocabulary without its logits, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dsbert.models import vocabulary_loss
from dsbert.models.vocabulary_loss import VocabularyLinear
from dsbert.sparse import half_precision
from dsbert.sparse.kernels import cpu
from dsbert.sparse.kernels.index import Backend

HIDDEN, VOCABULARY = 24, 203  # vectors do not fill a row


def layer_of(dtype: torch.dtype, bias: bool = True) -> VocabularyLinear:
    torch.manual_seed(1)
    layer = nn.Linear(HIDDEN, VOCABULARY, bias=bias)
    layer.to(dtype).__class__ = VocabularyLinear
    assert isinstance(layer, VocabularyLinear)
    return layer


def predictions(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    labels = torch.randint(VOCABULARY, (count,))
    labels[::5] = -100
    return (2 * torch.randn(count, HIDDEN)).to(dtype).requires_grad_(), labels


def check(layer: VocabularyLinear, x: Tensor, labels: Tensor, factor: float, tolerance: float) -> None:
    """Loss, and the gradients of factor times the loss."""
    loss, hits = layer(x, labels)
    assert (loss.dtype, loss.shape, hits.dtype, hits.shape) == (torch.float32, (), torch.int64, ())
    inputs = [x, *layer.parameters()]
    found = torch.autograd.grad(loss * factor, inputs)
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    logits = functional.linear(*doubles)
    exact = functional.cross_entropy(logits, labels, reduction="sum")
    wanted = torch.autograd.grad(exact * factor, doubles)
    assert abs(loss.item() - exact.item()) <= tolerance * exact.item()
    for result, tensor, want in zip(found, inputs, wanted, strict=True):
        assert result.dtype == tensor.dtype
        assert (result.double() - want).norm() <= tolerance * want.norm()
    if layer.training:
        assert not hits
    else:
        assert int(hits) == int((layer(x).argmax(-1) == labels).sum())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1000, 7, 1])
@pytest.mark.parametrize(
    ("dtype", "able", "tolerance"),
    [
        (torch.float32, True, 2e-6),
        (torch.bfloat16, False, 4e-3),
        (torch.bfloat16, True, 2e-2),  # logits and their gradients are rounded as well
        (torch.float16, True, 1e-3),
    ],
)
def test_loss_and_gradients(
    dtype: torch.dtype, able: bool, tolerance: float, rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one part and in several, in fp32 and in half precisions, that the machine multiplies or does not. In fp16
    gradients are scaled by what makes them fit: unscaled, a thousandth of them would be nothing."""
    monkeypatch.setattr(half_precision, "multiplies", lambda kind: able)
    monkeypatch.setattr(vocabulary_loss, "CHUNK_BYTES", 4 * VOCABULARY * rows)
    layer = layer_of(dtype, bias)
    x, labels = predictions(40, dtype)
    factor = 2.0**-24 if dtype == torch.bfloat16 else 1.0 / 40
    check(layer.train(), x, labels, factor, tolerance)
    check(layer.eval(), x, labels, factor, tolerance)


def test_fp16_gradients_below_its_range_are_scaled_before_they_are_rounded() -> None:
    """Of a softmax over many classes nearly every entry is below what fp16 can hold."""
    layer = layer_of(torch.float16)
    x = torch.full((1, HIDDEN), 1e-3, dtype=torch.float16)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.linspace(-17, 0, VOCABULARY))
    loss, _ = layer(x, torch.tensor([VOCABULARY - 1]))
    (gradient,) = torch.autograd.grad(loss * 2.0**14, [layer.bias])
    wanted = 2.0**14 * torch.softmax(layer.bias.double(), 0)
    torch.testing.assert_close(gradient[:-1].double(), wanted[:-1].detach(), rtol=2e-3, atol=1e-6)
    assert float(wanted[0]) < 2.0**14 * 2.0**-24, "too large to show anything"


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_is_asked(count: int) -> None:
    """A zero that still has gradients, of nothing and of a prediction that does not count."""
    layer = layer_of(torch.float32)
    x, _ = predictions(count, torch.float32)
    loss, hits = layer(x, torch.full((count,), -100))
    loss.backward()
    assert not loss
    assert not hits
    for gradient in (x.grad, layer.weight.grad, layer.bias.grad):
        assert gradient is not None
        assert not gradient.any()


def test_evaluation_makes_no_gradients() -> None:
    layer = layer_of(torch.float32).eval()
    x, labels = predictions(40, torch.float32)
    with torch.no_grad():
        loss, hits = layer(x.detach(), labels)
        logits = layer(x.detach())
    torch.testing.assert_close(loss, functional.cross_entropy(logits, labels, reduction="sum"))
    assert int(hits) == int((logits.argmax(-1) == labels).sum())
    assert not loss.requires_grad


def test_what_is_not_finite_is_seen() -> None:
    for value in (float("nan"), float("inf")):
        layer = layer_of(torch.float32)
        x, labels = predictions(3, torch.float32)
        with torch.no_grad():
            layer.bias[7] = value
        loss, _ = layer(x, labels)
        loss.backward()
        assert not loss.isfinite()
        assert x.grad is not None
        assert x.grad[1].isnan().all()


def test_large_logits() -> None:
    logits = torch.tensor([[3e4, 0.0, -3e4], [-200.0, -100.0, -100.0]])
    labels = torch.tensor([1, 2])
    exact = functional.cross_entropy(logits.double(), labels, reduction="none")
    torch.testing.assert_close(cpu.cross_entropy_(logits.clone(), labels, True).double(), exact)


def test_labels_beyond_the_vocabulary_are_refused() -> None:
    x, labels = predictions(3, torch.float32)
    labels[1] = VOCABULARY
    with pytest.raises(IndexError, match=f"below {VOCABULARY}, found {VOCABULARY}"):
        layer_of(torch.float32)(x, labels)


@pytest.mark.parametrize("obstacle", ["no kernels", "float64", "autocast"])
def test_elsewhere_torch_runs(obstacle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.float64 if obstacle == "float64" else torch.float32
    if obstacle == "no kernels":
        missing = Backend(
            "cpu", cpu.BACKEND.forward, cpu.BACKEND.dgrad, cpu.BACKEND.wgrad, why_not=lambda *place: "none"
        )
        monkeypatch.setattr(cpu, "BACKEND", missing)
    monkeypatch.setattr(vocabulary_loss.VocabularyLoss, "apply", lambda *given: pytest.fail("the kernel was asked"))
    layer = layer_of(dtype)
    x, labels = predictions(9, dtype)
    with torch.autocast("cpu", enabled=obstacle == "autocast"):
        check(layer.eval(), x, labels, 1.0, 2e-2 if obstacle == "autocast" else 1e-6)


def test_logits_do_not_outlive_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more of them is made at a time than a part, and backward is left nothing of the size of all."""
    monkeypatch.setattr(vocabulary_loss, "CHUNK_BYTES", 4 * VOCABULARY * 10)
    seen = []
    original = cpu.cross_entropy_
    monkeypatch.setattr(
        cpu, "cross_entropy_", lambda logits, *rest: (seen.append(logits.shape), original(logits, *rest))[1]
    )
    layer = layer_of(torch.float32)
    x, labels = predictions(40, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.shape) or tensor, lambda tensor: tensor
    ):
        loss, _ = layer(x, labels)
    loss.backward()
    assert seen == [(10, VOCABULARY)] * 4
    assert saved == [x.shape, layer.weight.shape, (VOCABULARY,)]
