"""No work on padding: losses and gradients are those of transformers' own models on the padded rows.

The reference is transformers' class with the densified weights, which knows nothing of dsbert's batches or attention.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dsbert.data.stream import IGNORE, Batch
from dsbert.models.construction import build_model
from dsbert.models.device_batch import DeviceBatch, any_batch
from dsbert.models.spec import model_spec
from dsbert.models.varlen_attention import varlen_attention
from dsbert.sparse import BlockSparseLinear
from tests import workbench as bench

CPU = torch.device("cpu")
ARCHITECTURES = ("bert", "modernbert")


def model_and_twin(
    architecture: str, dtype: torch.dtype, kernels: str
) -> tuple[Any, dict[str, BlockSparseLinear], Any]:
    """Ours, its sparse layers, and transformers' with the same weights, so large that all that is seen tells."""
    recipe = bench.recipe(
        model={"architecture": architecture, "num_layers": 3, "max_positions": 256, "dropout": 0.0,
               "initializer_std": 0.1},
        data={"nsp": architecture == "bert"},
        sparsity={"kernels": kernels},
    )  # fmt: skip
    model, layers = build_model(recipe, bench.VOCAB_SIZE)
    twin = model_spec(recipe.model).exported(model.config)
    weights = dict(model.state_dict())
    for name, layer in layers.items():
        weights[f"{name}.weight"] = layer.to_dense()
        for part in ("blocks", "rows", "cols"):
            del weights[f"{name}.{part}"]
    assert not twin.load_state_dict(weights, strict=False).unexpected_keys
    return model.to(dtype).train(), layers, twin.to(dtype).train()


def ragged(lengths: list[int], columns: int) -> Batch:
    """Rows of random tokens, B from the middle on; of every fourth token it is asked, and of one that stands alone. Of
    the last rows, NSP is not."""
    rng = np.random.default_rng(0)
    n, shape = len(lengths), (len(lengths), columns)
    ends = np.array(lengths)
    real = np.arange(columns) < ends[:, None]
    asked = np.flatnonzero(real & ((np.arange(columns) % 4 == 1) | (ends[:, None] == 1)))
    nsp = np.full(n, IGNORE)
    nsp[: n - n // 3] = rng.integers(0, 2, n - n // 3)
    return Batch(
        input_ids=np.where(real, rng.integers(5, bench.VOCAB_SIZE, shape), 0),
        token_type_ids=(real & (np.arange(columns) >= ends[:, None] // 2)).astype(np.int64),
        attention_mask=real.astype(np.int64),
        mlm_positions=asked,
        mlm_labels=rng.integers(5, bench.VOCAB_SIZE, asked.size),
        nsp_labels=nsp,
        num_tokens=sum(lengths),
    )


def reference(twin: Any, batch: Batch) -> list[Tensor]:
    """Summed losses of transformers' model on the padded rows."""
    bert = hasattr(twin, "bert")
    outputs = twin(**bench.padded(batch, *["token_type_ids"][: not bert]))
    logits = (outputs.prediction_logits if bert else outputs.logits).flatten(0, 1)[batch.mlm_positions]
    losses = [functional.cross_entropy(logits, torch.from_numpy(batch.mlm_labels), reduction="sum")]
    if bert:
        labels = torch.from_numpy(batch.nsp_labels)
        losses.append(functional.cross_entropy(outputs.seq_relationship_logits, labels, reduction="sum"))
    return losses


def assert_gradients_agree(model: Any, layers: dict[str, BlockSparseLinear], twin: Any, tolerance: float) -> None:
    """Of every parameter; of sparse weights at their blocks. The tolerance is relative to the gradient's norm."""
    theirs = {name: param.grad for name, param in twin.named_parameters()}
    largest = max(float(gradient.norm()) for gradient in theirs.values())
    seen = 0
    for name, param in model.named_parameters():
        layer = layers.get(name.rpartition(".")[0])
        wanted = theirs[name.replace(".blocks", ".weight")]
        if layer is not None and name.endswith(".blocks"):
            size = layer.block_size
            blocked = wanted.view(layer.shape[0] // size, size, layer.shape[1] // size, size).transpose(1, 2)
            wanted = blocked[layer.rows.long(), layer.cols.long()]
        # The key projections' biases have a gradient of zero but for rounding: softmax does not see them.
        scale = max(float(wanted.norm()), 1e-3 * largest)
        assert float((param.grad - wanted).norm()) <= tolerance * scale, name
        seen += 1
    assert seen == len(list(model.parameters()))


@pytest.mark.parametrize(("dtype", "kernels", "tolerance"), [
    (torch.float64, "reference", 1e-12),
    (torch.float32, "auto", 1e-6),
])  # fmt: skip
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_and_gradients_are_those_of_padded_rows(
    architecture: str, dtype: torch.dtype, kernels: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one token and up to more than local attention sees (64 to each side), none of them full; and a few that
    are, without any padding."""
    if dtype == torch.float64:
        monkeypatch.setattr(Tensor, "float", lambda tensor: tensor)  # of logits and rotations: nothing is rounded
    model, layers, twin = model_and_twin(architecture, dtype, kernels)
    for batch in (ragged([37, 1, 150, 2, 90], 200), ragged([24, 24], 24), bench.stream().batch(0, 5)):
        model.zero_grad()
        twin.zero_grad()
        ready = DeviceBatch.of(batch, CPU)
        assert ready.num_tokens == batch.num_tokens == int(ready.starts[-1])
        losses, hits = model(ready)
        expected = reference(twin, batch)
        torch.testing.assert_close(losses.to(dtype), torch.stack(expected), rtol=tolerance, atol=0)
        assert not hits.any()
        losses.sum().backward()
        torch.stack(expected).sum().backward()
        assert_gradients_agree(model, layers, twin, tolerance)


def test_rotations_are_small_in_every_sequence() -> None:
    """Only differences of positions count, so losses do not tell: but the angles of the ten thousandth are inexact."""
    model, _, _ = model_and_twin("modernbert", torch.float32, "auto")
    seen = []
    model.model.rotary_emb.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    model(DeviceBatch.of(ragged([3, 5, 1], 8), CPU))
    assert [positions.tolist() for positions in seen] == [[[0, 1, 2, 0, 1, 2, 3, 4, 0]]] * 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_micro_batch_without_samples_moves_nothing(architecture: str) -> None:
    """Losses and gradients are zero, and every parameter has one."""
    model, _, _ = model_and_twin(architecture, torch.float32, "auto")
    ready = DeviceBatch.of(bench.stream().batch(3, 0), CPU)
    assert ready.starts.tolist() == [0, 1]
    losses, hits = model(ready)
    losses.sum().backward()
    assert losses.tolist() == [0.0] * len(losses)
    assert not hits.any()
    for name, param in model.named_parameters():
        assert param.grad is not None, name
        assert not param.grad.any(), name


def test_a_batch_without_its_padding() -> None:
    """Value by value."""
    batch = Batch(
        input_ids=np.array([[2, 9, 4, 3, 0], [2, 4, 3, 0, 0], [2, 5, 6, 7, 3]]),
        token_type_ids=np.array([[0, 0, 1, 1, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]),
        attention_mask=np.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        mlm_positions=np.array([2, 6, 13]),
        mlm_labels=np.array([11, 12, 7]),
        nsp_labels=np.array([0, IGNORE, 1]),
        num_tokens=12,
    )
    found = DeviceBatch.of(batch, CPU)
    assert found.input_ids.tolist() == [2, 9, 4, 3, 2, 4, 3, 2, 5, 6, 7, 3]
    assert found.token_type_ids.tolist() == [0, 0, 1, 1, 0, 1, 1, 0, 0, 0, 1, 1]
    assert found.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]
    assert found.starts.tolist() == [0, 4, 7, 12]
    assert found.first_tokens.tolist() == [0, 4, 7]
    assert found.mlm_positions.tolist() == [2, 5, 10]
    assert found.mlm_labels.tolist() == [11, 12, 7]
    assert found.nsp_labels.tolist() == [0, IGNORE, 1]


@pytest.mark.parametrize(("name", "index", "value"), [("mlm_positions", 0, 4), ("mlm_positions", -1, 19)])
def test_nobody_is_asked_for_padding(name: str, index: int, value: int) -> None:
    batch = ragged([3, 4], 10)
    getattr(batch, name)[index] = value
    with pytest.raises(ValueError, match="asked for tokens alone, found padding"):
        DeviceBatch.of(batch, CPU)
    empty = ragged([3, 4], 10)
    empty.attention_mask[1] = 0
    with pytest.raises(ValueError, match="at least one token"):
        DeviceBatch.of(empty, CPU)


def test_any_batch_is_one() -> None:
    found = any_batch(3, 8, CPU)
    assert found.starts.tolist() == [0, 8, 16, 24]
    assert found.position_ids.tolist() == [*range(8)] * 3
    assert (found.first_tokens.tolist(), found.nsp_labels.tolist()) == ([0, 8, 16], [0, 0, 0])


@pytest.mark.parametrize("window", [None, 0, 2, 100])
def test_attention_stays_within_sequences(window: int | None) -> None:
    """Against a softmax written out, sequence by sequence, head by head; values and gradients."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.tensor([0, 1, 8, 8, 13])
    query, key, value = (
        torch.randn(13, 2, 5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)
    )
    visible = torch.ones(13, dtype=torch.bool)
    visible[[2, 9]] = False
    for seen in (None, visible):
        found = varlen_attention(query, key, value, starts, scaling=0.4, window=window, visible=seen)
        rows = []
        for position in range(13):
            begin = int(starts[starts <= position].max())
            end = int(starts[starts > position].min())
            near = [
                other for other in range(begin, end)
                if (window is None or abs(other - position) <= window) and (seen is None or bool(seen[other]))
            ]  # fmt: skip
            if not near:
                assert found[position].isfinite().all()
                rows.append(found[position])
                continue
            scores = torch.einsum("hd,jhd->hj", query[position], key[near]) * 0.4
            rows.append(torch.einsum("hj,jhd->hd", scores.softmax(-1), value[near]))
        expected = torch.stack(rows)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        weights = torch.randn(found.shape, generator=generator, dtype=torch.float64)
        ours = torch.autograd.grad((found * weights).sum(), (query, key, value), retain_graph=True)
        theirs = torch.autograd.grad((expected * weights).sum(), (query, key, value))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
