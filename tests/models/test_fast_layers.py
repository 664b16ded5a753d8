"""Dropout, attention and the fused GELU against torch's and transformers' own."""

from __future__ import annotations

import weakref
from typing import Any, cast
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import BertForPreTraining

from dsbert.data.stream import Batch
from dsbert.models import fast_layers
from dsbert.models import key_mask as module
from dsbert.models.bert import bert_config
from dsbert.models.construction import build_model
from dsbert.models.fast_layers import attention, drop, use_fast_layers_
from dsbert.models.key_mask import KeyMask, key_mask
from dsbert.models.varlen_attention import varlen_attention
from dsbert.sparse import half_precision
from dsbert.sparse.kernels import cpu
from tests import workbench as bench


def multiplies_half(monkeypatch: pytest.MonkeyPatch, able: bool) -> None:
    """As on a CPU that can, or cannot, multiply half precisions."""
    monkeypatch.setattr(half_precision, "multiplies", lambda dtype: able or dtype == torch.float32)


def operands(dtype: torch.dtype = torch.float32) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """q, k, v [3, 2, 10, 8] as transformers hands them over, and what is seen [3, 1, 10, 10]: all, a part, nothing."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 10, 2, 8).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    seen = torch.tensor([[True] * 10, [True] * 6 + [False] * 4, [False] * 10])
    return (q, k, v), seen[:, None, None, :].expand(3, 1, 10, 10)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(
    ("dtype", "slow", "tolerance"),
    [(torch.float32, False, 1e-6), (torch.bfloat16, False, 2e-2), (torch.bfloat16, True, 2e-2)],
)
def test_attention_with_dropout_is_attention(
    dtype: torch.dtype, slow: bool, tolerance: float, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernel and by torch, with the same draw: that of the shares in memory."""
    multiplies_half(monkeypatch, not slow)
    if not kernel:
        monkeypatch.setattr(fast_layers, "has_kernel", lambda *_: False)
    tensors, seen = operands(dtype)
    torch.manual_seed(5)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    kept = cpu.dropout(torch.ones(3, 2, 10, 10), 0.1, seed).double()
    torch.manual_seed(5)
    found, none = attention(torch.nn.Identity(), *tensors, seen, dropout=0.1, scaling=0.3)
    assert none is None
    assert found.shape == (3, 10, 2, 8)
    weights = torch.randn(found.shape).to(dtype)
    gradients = torch.autograd.grad((found * weights).sum(), tensors)
    q, k, v = doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    hidden = torch.zeros(seen.shape).masked_fill(~seen, -1e30)  # of the last sequence everything: what it says is open
    exact = ((q @ k.mT * 0.3 + hidden).softmax(-1) * kept @ v).transpose(1, 2)
    exact[:2].mul(weights[:2].double()).sum().backward()
    assert (found[:2].double() - exact[:2]).abs().max() < tolerance
    assert found.isfinite().all()
    for gradient, tensor in zip(gradients, doubles, strict=True):
        assert tensor.grad is not None
        assert (gradient[:2].double() - tensor.grad[:2]).abs().max() < 4 * tolerance
        assert gradient.isfinite().all()


def masks() -> dict[str, tuple[Tensor | None, int | None, bool]]:
    """Name -> what may be seen, [3, 1, 10 or 1, 10]; the hint at a window; whether the kernel can do it."""
    keys = torch.ones(3, 1, 1, 10, dtype=torch.bool)
    keys[1, :, :, 8:] = False  # every query has one within its window: what is made of none is open
    places = torch.arange(10)
    near = (places - places[:, None]).abs() <= 2
    odd = keys.expand(3, 1, 10, 10).clone()
    odd[0, 0, 4, 7] = False
    return {
        "all": (None, None, True),
        "keys": (keys, None, True),
        "keys, for each query": (keys.expand(3, 1, 10, 10), None, True),
        "keys, for each query, in memory": (keys.expand(3, 1, 10, 10).contiguous(), None, True),
        "window": (keys & near, 3, True),
        "one for all sequences": (near[None, None], 3, True),
        "another window": (keys & near, 4, False),
        "window without a hint": (keys & near, None, False),
        "a pair": (odd, 3, False),
    }


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_masks_that_the_kernel_knows_and_others(dropout: float, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways hide the same, and all of a mask."""
    mask, hint, known = masks()[name]
    tensors, _ = operands()
    results = []
    with mock.patch.object(fast_layers, "varlen_attention", wraps=varlen_attention) as kernel:
        for able in (True, False):
            if not able:
                monkeypatch.setattr(fast_layers, "has_kernel", lambda *_: False)
            torch.manual_seed(1)
            out, _ = attention(Encoder(), *tensors, mask, dropout=dropout, sliding_window=hint)
            results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    assert kernel.call_count == known
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class Encoder(torch.nn.Module):
    is_causal = False


def test_a_mask_is_read_once_and_again_when_it_has_changed() -> None:
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    first = key_mask(mask, 6)
    assert first is not None
    assert key_mask(mask, 6) is first
    mask[:, :, :, 4:] = False
    second = key_mask(mask, 6)
    assert second is not None
    assert second.visible is not None
    assert second.visible.tolist() == [[True] * 4 + [False] * 2] * 2
    for _ in range(20):
        key_mask(torch.ones(1, 1, 6, 6, dtype=torch.bool), 6)
    assert len(module._read) <= 4
    assert key_mask(mask.float(), 6) is None
    assert key_mask(mask, 7) is None


def test_a_mask_is_not_kept_and_asked_anew_with_another_hint() -> None:
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril(1).triu(-1)
    assert key_mask(mask, 6) is None
    assert key_mask(mask, 6, 2) == KeyMask(mock.ANY, 1)
    known = weakref.ref(mask)
    del mask
    assert known() is None
    with torch.inference_mode():
        padded = torch.ones(1, 1, 6, 6, dtype=torch.bool)
        padded[..., 4:] = False
        assert key_mask(padded, 6) is not None


def test_what_has_no_second_derivative_says_so() -> None:
    q, k, v = (torch.randn(5, 2, 8, requires_grad=True) for _ in range(3))
    out = varlen_attention(q, k, v, torch.tensor([0, 5]))
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_attention_that_looks_back_only_is_left_to_torch() -> None:
    (q, k, v), _ = operands()
    causal, _ = attention(Encoder(), q, k, v, None, is_causal=True)
    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(causal, expected)


def test_attention_drops_shares() -> None:
    tensors, seen = operands()
    exact, _ = attention(torch.nn.Identity(), *tensors, seen, scaling=0.3)
    torch.manual_seed(1)
    mean = torch.zeros_like(exact)
    for _ in range(3000):
        mean += attention(torch.nn.Identity(), *tensors, seen, dropout=0.5, scaling=0.3)[0] / 3000
    assert (mean[:2] - exact[:2]).abs().max() < 0.15
    assert (mean[:2] - exact[:2]).abs().mean() < 0.02


def test_dropout_draws_the_same_mask_in_backward_and_after_the_same_seed() -> None:
    x = torch.randn(33, 47, requires_grad=True)
    torch.manual_seed(3)
    first = drop(x, 0.3)
    second = drop(x, 0.3)
    torch.manual_seed(3)
    assert torch.equal(first, drop(x, 0.3))
    assert not torch.equal(first, second)
    first.backward(torch.full_like(first, 2.0))
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.where(first == 0, 0.0, 2.0 / 0.7))
    assert drop(x, 0.3, training=False) is x
    assert drop(x, 0.0) is x or torch.equal(drop(x, 0.0), x)
    seed = torch.tensor(5)
    torch.library.opcheck(torch.ops.dsbert.dropout.default, (x.detach().requires_grad_(), seed, 0.3))


def test_without_the_kernels_torch_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(100, 100, dtype=torch.float64)  # which they do not compute
    torch.manual_seed(0)
    expected = functional.dropout(x, 0.3)
    torch.manual_seed(0)
    assert torch.equal(drop(x, 0.3), expected)


def test_dropout_of_everything_and_of_nonsense() -> None:
    x = torch.ones(100, requires_grad=True)
    y = fast_layers.Dropout(1.0)(x)
    y.sum().backward()
    assert not y.any()
    assert x.grad is not None
    assert not x.grad.any()
    for p in (-0.5, 1.5):
        with pytest.raises(ValueError, match="between 0 and 1"):
            drop(x, p)


def test_attention_to_nothing_in_fp16() -> None:
    q, k, v = (torch.full((1, 1, 4, 16), value, dtype=torch.float16) for value in (2.0, -3.0, 1.0))
    found, _ = attention(torch.nn.Identity(), q, k, v, torch.zeros(1, 1, 4, 4, dtype=torch.bool), dropout=0.1)
    assert found.isfinite().all()


class OneLayer(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(300, 40, dtype=dtype)

    def set_attn_implementation(self, name: str) -> None:
        """It has no attention."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dense_layers_where_half_precisions_are_slow(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 around the product, and rounded once: of forward, and of every gradient."""
    torch.manual_seed(0)
    model = OneLayer(dtype)
    kept = dict(model.named_parameters())
    use_fast_layers_(cast(BertForPreTraining, model))
    layer = model.layer
    assert all(parameter is kept[name] for name, parameter in model.named_parameters())
    x, dy = torch.randn(2, 7, 300).to(dtype).requires_grad_(), torch.randn(2, 7, 40).to(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, layer.weight, layer.bias)]
    y = functional.linear(*exact)
    wanted = [y, *torch.autograd.grad(y, exact, dy.double())]
    for able in (False, True):
        multiplies_half(monkeypatch, able)
        with mock.patch.object(functional, "linear", wraps=functional.linear) as product:
            found = layer(x)
        assert [call.args[0].dtype for call in product.call_args_list] == [dtype if able else torch.float32]
        results = [found, *torch.autograd.grad(found, [x, layer.weight, layer.bias], dy)]
        for result, want in zip(results, wanted, strict=True):
            assert result.dtype == dtype
            error = (result.double() - want).norm() / want.norm()
            # Half an ulp, on the average less, where only the result is rounded.
            assert error < torch.finfo(dtype).eps * (0.3 if not able else 2)


def outputs(model: Any, batch: Batch) -> Tensor:
    found: Tensor = model.bert(**bench.padded(batch)).last_hidden_state
    return found


@pytest.mark.parametrize("pattern", ["dense", "static"])
def test_the_model_is_the_one_of_transformers(pattern: str) -> None:
    """In eval mode, and while training without dropout; with sparse layers, GELU comes out of their kernel."""
    recipe = bench.recipe(sparsity={"pattern": pattern}, model={"dropout": 0.0})
    model, layers = build_model(recipe, bench.VOCAB_SIZE)
    assert any(layer.activation == "gelu" for layer in layers.values()) == (pattern == "static")
    twin = BertForPreTraining(bert_config(recipe.model, bench.VOCAB_SIZE))
    weights = dict(model.state_dict())
    for name, layer in layers.items():
        weights[f"{name}.weight"] = layer.to_dense()
        for part in ("blocks", "rows", "cols"):
            del weights[f"{name}.{part}"]
    twin.load_state_dict(weights, strict=False)
    batch = bench.stream().batch(0, 4)
    for training in (False, True):
        model.train(training)
        twin.train(training)
        torch.testing.assert_close(outputs(model, batch), outputs(twin, batch), rtol=1e-4, atol=1e-5)
