"""A layer's autograd function against its operators: the same bits, and operators wherever somebody looks for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dsbert.models import varlen_attention as attention
from dsbert.sparse.kernels import eager, ops
from tests.sparse.test_linear import make, results


class Seen(TorchDispatchMode):
    """The names of dsbert's operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dsbert":
            self.names.append(func._opname)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_the_operators(activation: str | None, block_size: int, dtype: torch.dtype) -> None:
    layer = make((48, 16), block_size, "cpu", dtype=dtype)
    layer.activation = activation
    x, dy = torch.randn(21, 16, dtype=dtype), torch.randn(21, 48, dtype=dtype)
    plain = results(layer, x, dy)
    with Seen() as seen:
        by_operators = results(layer, x, dy)
    assert seen.names == (["linear_gelu", "gelu_gradient"] if activation else ["linear"]) + ["dgrad", "wgrad"]
    for name, value in plain.items():
        assert torch.equal(value, by_operators[name]), name


def test_without_anybody_who_looks_on_no_operator_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("an operator was called")

    monkeypatch.setattr(ops, "linear", refuse)
    layer = make((48, 16), 16, "cpu")
    assert layer(torch.randn(5, 16)).shape == (5, 48)
    assert layer(torch.randn(2, 5, 16)).shape == (2, 5, 48)


def test_fake_tensors_get_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    operator = ops.linear
    monkeypatch.setattr(ops, "linear", lambda *given: called.append("linear") or operator(*given))
    layer, x = make((48, 16), 16, "cpu"), torch.randn(5, 16)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = layer(mode.from_tensor(x))
    assert found.shape == (5, 48)
    assert called == ["linear"]
    assert not eager.needs_operators(torch.ones(1), None)


def test_what_is_saved_may_not_move_before_backward() -> None:
    layer = make((48, 16), 16, "cpu", density=0.5)
    y = layer(torch.randn(5, 16))
    layer.rows.copy_(layer.rows.clone())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_attention_has_the_bits_of_its_operator() -> None:
    starts, found = torch.tensor([0, 4, 12]), []
    for mode in (None, Seen()):
        torch.manual_seed(0)
        q, k, v = (torch.randn(12, 2, 8, requires_grad=True) for _ in range(3))
        if mode is None:
            attention.varlen_attention(q, k, v, starts, dropout=0.3).square().sum().backward()
        else:
            with mode:
                attention.varlen_attention(q, k, v, starts, dropout=0.3).square().sum().backward()
            assert mode.names == ["varlen_attention", "varlen_attention_gradient"]
        found.append(torch.stack([x.grad for x in (q, k, v) if x.grad is not None]))
    assert found[0].shape == (3, 12, 2, 8)
    assert torch.equal(*found)
