"""What stands beside dsbert in benchmarks computes the same: a comparison with something else would say nothing."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dsbert.data.stream import Batch
from dsbert.models.construction import build_model
from dsbert.models.device_batch import DeviceBatch
from tests import workbench as bench
from tools import peer_mkl
from tools.peer_transformers import TransformersPeer, padded_inputs


def batch(full: bool) -> Batch:
    """Three samples with padding behind them; full: as if what is there in its place were text."""
    rows = bench.stream().batch(0, 3)
    assert not rows.attention_mask.all()
    return replace(rows, attention_mask=np.ones_like(rows.attention_mask)) if full else rows


@pytest.mark.parametrize("full", [True, False], ids=["full rows", "padding"])
def test_transformers_has_our_loss_and_gradients(full: bool) -> None:
    recipe = bench.recipe(model=bench.recipe().model.model_dump() | {"dropout": 0.0}, sparsity={"pattern": "dense"})
    model, _ = build_model(recipe, bench.VOCAB_SIZE)
    rows = batch(full)
    peer = TransformersPeer(recipe, bench.VOCAB_SIZE, [rows], torch.device("cpu"), "fp32")
    peer.model.load_state_dict(model.state_dict())
    losses, _ = model.train()(DeviceBatch.of(rows, torch.device("cpu")))
    loss = losses[0] / rows.mlm_labels.size + losses[1] / len(rows.nsp_labels)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert peer.step() == pytest.approx(loss.item(), rel=1e-5)
    theirs = dict(peer.model.named_parameters())
    for name, param in model.named_parameters():
        assert param.grad is not None
        torch.testing.assert_close(theirs[name].grad, param.grad, rtol=1e-3, atol=1e-6)


def test_only_padding_has_a_mask() -> None:
    assert "attention_mask" not in padded_inputs(batch(full=True))
    rows = batch(full=False)
    inputs = padded_inputs(rows)
    assert inputs["attention_mask"].sum() == rows.num_tokens
    assert ((inputs["labels"] >= 0) <= (inputs["attention_mask"] == 1)).all()
    assert (inputs["labels"] >= 0).sum() == rows.mlm_labels.size


def test_bf16_is_autocast() -> None:
    recipe = bench.recipe(sparsity={"pattern": "dense"})
    peer = TransformersPeer(recipe, bench.VOCAB_SIZE, [batch(full=False)], torch.device("cpu"), "bf16")
    seen = []
    peer.model.bert.encoder.layer[0].output.dense.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    first = peer.step()
    assert seen == [torch.bfloat16]
    assert all(param.dtype == torch.float32 for param in peer.model.parameters())
    for _ in range(30):
        last = peer.step()
    assert last < first  # it trains


def test_mkl_is_asked_for_our_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without MKL: scipy multiplies in its place, so that what is seen is what goes in and what comes out."""
    pytest.importorskip("scipy.sparse")
    stand_in = SimpleNamespace(
        mkl_set_num_threads=lambda count: None, dot_product_mkl=lambda matrix, dense: matrix @ dense
    )
    monkeypatch.setitem(sys.modules, "sparse_dot_mkl", stand_in)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 16, 2, 16, generator=generator) * torch.tensor([[1.0, 0.0]] * 4).view(4, 1, 2, 1)
    weight = weight.reshape(64, 32)
    x, dy, bias = (torch.randn(size, generator=generator) for size in ((9, 32), (9, 64), (64,)))
    calls = peer_mkl.products(weight, 16, x, dy, bias)
    torch.testing.assert_close(calls["forward"](), x @ weight.t() + bias)
    torch.testing.assert_close(calls["dgrad"](), dy @ weight)


def test_mkl_that_is_not_installed_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sparse_dot_mkl", None)
    peer_mkl.why_not.cache_clear()
    reason = peer_mkl.why_not()
    peer_mkl.why_not.cache_clear()
    assert reason is not None
    assert reason.startswith("MKL's block-sparse product is left out: ")
    assert reason.endswith("(pip install sparse-dot-mkl mkl)")
    assert "\n" not in reason
