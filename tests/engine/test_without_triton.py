"""On a machine without a CUDA device nobody imports Triton: 74 MB in every rank."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest
import torch

from dsbert.base.optional_triton import triton_hidden
from tests.helpers import run_distributed


def loaded_by_training() -> dict[str, Any]:
    from dsbert.cluster import process_group
    from tests import workbench as bench

    world = process_group.init(60)
    engine, masks = bench.engine_and_masks(bench.recipe(sparsity={"block_size": 16}), world)
    for step in range(1, 6):
        engine.train_step(bench.step_batches(engine, bench.stream(), step - 1))
        masks.maybe_update(step)
    masks.verify_replicas()
    return {name: name in sys.modules for name in ("triton", "torch._dynamo", "transformers.models.bert.modeling_bert")}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_training_does_not_import_it() -> None:
    (loaded,) = run_distributed(loaded_by_training, 1)
    assert not loaded.pop("triton")
    assert all(loaded.values()), f"{loaded}: does the test still see who would import it?"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_sparse_layers_do_not_import_it() -> None:
    program = (
        "import sys, torch; from dsbert.sparse import SparsityConfig, sparsify_; "
        "model = torch.nn.Sequential(torch.nn.Linear(32, 32)); "
        "sparsify_(model, SparsityConfig(sparsity=0.5, modules=('*',))); "
        "model(torch.randn(4, 32)).sum().backward(); print('triton' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"


def test_it_is_hidden_only_where_it_is_of_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with triton_hidden(), pytest.raises(ImportError):
        importlib.import_module("triton")
    assert "triton" not in sys.modules
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with triton_hidden():
        assert "triton" not in sys.modules
    found = object()
    monkeypatch.setitem(sys.modules, "triton", found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with triton_hidden():  # whoever has it keeps it
        assert sys.modules["triton"] is found
