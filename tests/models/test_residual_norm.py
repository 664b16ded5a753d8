"""Residual, dropout and LayerNorm in one pass, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertForPreTraining
from transformers.models.bert.modeling_bert import BertOutput

from dsbert.models import residual_norm
from dsbert.models.fast_layers import drop, use_fast_layers_
from dsbert.models.residual_norm import Norm, fuse_norms_
from dsbert.sparse.kernels import cpu
from dsbert.sparse.kernels.index import Backend

# Half an ulp of each result; of fp32 a few, since sums are as well.
TOLERANCE = {torch.float32: 5e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SHAPES = [
    (3, 5, 128),
    (2, 33, 47),
    (1, 4, 7),
    (2, 700, 24),
]  # widths that vectors fill, and do not; many groups of rows


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def norm_of(width: int, dtype: torch.dtype, bias: bool = True) -> Norm:
    torch.manual_seed(1)
    norm = nn.LayerNorm(width, eps=1e-5, bias=bias, dtype=dtype)
    nn.init.normal_(norm.weight)
    if bias:
        nn.init.normal_(norm.bias)
    norm.__class__ = Norm
    assert isinstance(norm, Norm)
    return norm


def results(norm: Norm, x: Tensor, residual: Tensor | None, p: float) -> list[Tensor]:
    """y, and the gradients of x, of the residual and of the parameters."""
    inputs = [tensor.clone().requires_grad_() for tensor in (x, residual) if tensor is not None]
    dropout = nn.Dropout(p) if p and not norm.after else None
    torch.manual_seed(5)
    y = norm(*inputs, dropout=dropout)
    torch.manual_seed(6)
    dy = torch.randn(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, [*inputs, *norm.parameters()], dy)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("with_residual", "p", "after", "bias"),
    [(True, 0.0, False, True), (True, 0.3, False, True), (False, 0.0, False, False), (False, 0.3, True, True)],
)
def test_one_pass_is_dropout_residual_and_norm(
    dtype: torch.dtype, shape: tuple[int, ...], with_residual: bool, p: float, after: bool, bias: bool
) -> None:
    """What falls is what `drop` has fall after the same seed; the rest against float64."""
    norm = norm_of(shape[-1], dtype, bias)
    norm.after = p if after else 0.0
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype) * 3 + 1 if with_residual else None
    found = results(norm, x, residual, p)
    torch.manual_seed(5)
    kept = drop(torch.ones(shape), p).double()
    assert not p or 0 < (kept == 0).sum() < kept.numel()
    exact = [tensor.double().requires_grad_() for tensor in (x, residual) if tensor is not None]
    parameters = [parameter.detach().double().requires_grad_() for parameter in norm.parameters()]
    total = exact[0] if after else exact[0] * kept
    total = total + exact[1] if with_residual else total
    y = functional.layer_norm(total, shape[-1:], parameters[0], parameters[1] if bias else None, norm.eps)
    y = y * kept if after else y
    torch.manual_seed(6)
    dy = torch.randn(shape).to(dtype)
    wanted = [y, *torch.autograd.grad(y, [*exact, *parameters], dy.double())]
    for number, (result, want) in enumerate(zip(found, wanted, strict=True)):
        assert result.dtype == dtype
        assert (result.double() - want).norm() <= TOLERANCE[dtype] * want.norm() * 3, number


def test_the_bits_do_not_hang_on_threads(threads: Any) -> None:
    norm = norm_of(24, torch.float32)
    x, residual = torch.randn(2, 700, 24), torch.randn(2, 700, 24)
    found = []
    for number in (1, 2, 3):
        threads(number)
        found.append(results(norm, x, residual, 0.3))
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_extreme_rows() -> None:
    """A row without variance, one of large numbers, one that is not finite, none at all."""
    norm = norm_of(16, torch.float32)
    rows = torch.stack([torch.full((16,), 4.0), torch.arange(16.0) + 1e6, torch.full((16,), float("nan"))])
    y = norm(rows)
    wanted = functional.layer_norm(rows.double(), (16,), norm.weight.double(), norm.bias.double(), norm.eps)
    # fp32 keeps of numbers around 1e6 no more than a sixteenth.
    torch.testing.assert_close(y.double(), wanted, rtol=1e-2, atol=1e-2, equal_nan=True)
    none = torch.empty(0, 16, requires_grad=True)
    norm(none, none).sum().backward()
    assert norm.weight.grad is not None
    assert not norm.weight.grad.any()


def test_a_width_that_is_not_the_norms_is_refused() -> None:
    """The kernel would read, and write, beyond the weight."""
    with pytest.raises(RuntimeError, match="normalized_shape"):
        norm_of(32, torch.float32)(torch.randn(3, 48))


def test_there_is_no_second_derivative() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(norm_of(8, torch.float32)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("obstacle", ["no kernels", "autocast", "dtypes", "shapes", "float64"])
def test_elsewhere_torch_runs(obstacle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if obstacle == "no kernels":
        missing = Backend(
            "cpu", cpu.BACKEND.forward, cpu.BACKEND.dgrad, cpu.BACKEND.wgrad, why_not=lambda *place: "none"
        )
        monkeypatch.setattr(cpu, "BACKEND", missing)
    monkeypatch.setattr(residual_norm.ResidualNorm, "apply", lambda *given: pytest.fail("the kernel was asked"))
    norm = norm_of(8, torch.float64 if obstacle == "float64" else torch.float32)
    x = torch.randn(3, 8).to(norm.weight.dtype)
    residual = torch.randn(1 if obstacle == "shapes" else 3, 8).to(x.dtype)
    residual = residual.bfloat16() if obstacle == "dtypes" else residual
    with torch.autocast("cpu", enabled=obstacle == "autocast"):
        y = norm(x, residual)
    torch.testing.assert_close(y, functional.layer_norm(x + residual, (8,), norm.weight, norm.bias, norm.eps))


def test_a_model_of_transformers_keeps_its_names_and_its_numbers() -> None:
    """In eval mode, and while training with dropout: with what fell before, for the same seed."""
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    plain, fused = BertForPreTraining(config), BertForPreTraining(config)
    fused.load_state_dict(plain.state_dict())
    for model in (plain, fused):
        use_fast_layers_(model)
    before = [name for name, _ in fused.named_modules()]
    fuse_norms_(fused)
    assert [name for name, _ in fused.named_modules()] == before
    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert sum(isinstance(module, Norm) for module in fused.modules()) == 6  # 2 a layer, embeddings, head
    assert not any(type(module) is BertOutput for module in fused.modules())
    ids = torch.randint(50, (3, 11))
    for training in (False, True):
        outputs = []
        for model in (plain, fused):
            model.train(training)
            torch.manual_seed(3)
            outputs.append(model.bert(ids).last_hidden_state)
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    assert not torch.equal(*outputs), "nothing was fused"
