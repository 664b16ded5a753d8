"""A sparse model of transformers is the dense one: outputs, losses, gradients; it is saved and loaded as any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsbert import hf
from dsbert.base.errors import UserError
from dsbert.hf.from_checkpoint import pretrained_of
from dsbert.hf.unpadded import Unpadded
from dsbert.models.construction import build_model
from dsbert.sparse import BlockSparseLinear
from tests import workbench as bench
from tests.hf.models import PAIRS, dense_twin, padded_rows, sparse_model

LENGTHS, COLUMNS = [16, 9, 1, 12], 16
# Sums of a few hundred fp32 products in another order, in outputs of about 1.
TOLERANCE = 1e-5


def labels_of(head: str, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    real = rows["attention_mask"].bool()
    count = len(real)
    tokens = torch.where(real & (torch.arange(COLUMNS) % 3 == 0), rows["input_ids"], -100)
    return {
        "pre-training": {"labels": tokens, "next_sentence_label": torch.arange(count) % 2},
        "masked": {"labels": tokens},
        "sequence": {"labels": torch.arange(count) % 3},
        "token": {"labels": torch.where(real, torch.randint(0, 3, real.shape, generator=generator), -100)},
        "answer": {"start_positions": torch.zeros(count).long(), "end_positions": torch.tensor(LENGTHS) - 1},
    }.get(head, {})


def assert_outputs_agree(ours: Any, theirs: Any, seen: Tensor) -> None:
    """All that both return, where there are tokens."""
    assert ours.keys() == theirs.keys()
    for name, one in ours.items():
        other = theirs[name]
        for found, expected in zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]:
            if found.shape[:2] == seen.shape:
                found, expected = found[seen], expected[seen]
            assert (found - expected).abs().max() < TOLERANCE, name


@pytest.mark.parametrize("head", PAIRS)
def test_outputs_and_losses_are_the_dense_models(head: str) -> None:
    changes: dict[str, Any] = {} if head in ("base", "pre-training", "masked", "answer") else {"num_labels": 3}
    model = sparse_model(head, low_rank=2 * (head == "masked"), **changes)
    twin, rows = dense_twin(model, head), padded_rows(LENGTHS, COLUMNS)
    seen = rows["attention_mask"].bool()
    assert sum(isinstance(module, BlockSparseLinear) for module in model.modules()) == 18
    given = rows | labels_of(head, rows)
    with torch.no_grad():
        ours, theirs = (dict(one(**given, output_hidden_states=True)) for one in (model, twin))
    assert len(ours["hidden_states"]) == 4
    assert ("loss" in ours) == (head != "base")
    if head == "answer":  # the scores of padding count in it, and those are not alike
        del ours["loss"], theirs["loss"]
    assert_outputs_agree(ours, theirs, seen)
    assert ours["hidden_states"][1][~seen].abs().max() == 0


@pytest.mark.parametrize("kind", ["no mask", "holes", "left", "empty row", "pairs", "embeddings", "positions", "tuple"])
def test_whatever_rows_are_given(kind: str) -> None:
    """Also those that cannot be taken apart."""
    model = sparse_model("base")
    twin, rows = dense_twin(model, "base"), padded_rows(LENGTHS, COLUMNS)
    seen = rows["attention_mask"].bool()
    if kind == "no mask":
        del rows["attention_mask"], rows["token_type_ids"]
        seen = torch.ones_like(seen)
    elif kind == "holes":
        rows["attention_mask"][0, [3, 7]] = 0
        seen = rows["attention_mask"].bool()
    elif kind == "left":
        rows = {name: x.flip(1) for name, x in rows.items()}
        seen = seen.flip(1)
    elif kind == "empty row":
        rows["attention_mask"][1] = 0
        seen[1] = False
    elif kind == "pairs":
        twin.set_attn_implementation("sdpa")  # which takes masks of truths
        rows["attention_mask"] = (seen[:, None, :, None] & seen[:, None, None, :]) | torch.eye(COLUMNS).bool()
    elif kind == "embeddings":
        rows["inputs_embeds"] = model.embeddings.word_embeddings(rows.pop("input_ids")).detach()
    elif kind == "positions":
        rows["position_ids"] = torch.arange(COLUMNS).flip(0)[None]
    with torch.no_grad():
        ours, theirs = (one(**rows, return_dict=kind != "tuple") for one in (model, twin))
    if kind == "tuple":
        assert isinstance(ours, tuple)
        ours, theirs = ({str(number): x for number, x in enumerate(found)} for found in (ours, theirs))
    if kind == "empty row":
        ours, theirs = (dict(found, pooler_output=found.pooler_output[[0, 2, 3]]) for found in (ours, theirs))
    assert_outputs_agree(ours, theirs, seen)


def test_gradients_are_the_dense_models() -> None:
    model = sparse_model("masked", low_rank=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    twin, rows = dense_twin(model, "masked"), padded_rows(LENGTHS, COLUMNS)
    model.activation_checkpointing_enable()
    for one in (model, twin):
        one.train()(**rows, **labels_of("masked", rows)).loss.backward()
    theirs = dict(twin.named_parameters())
    for name, param in model.named_parameters():
        if name in theirs:
            assert param.grad is not None, name
            assert (param.grad - theirs[name].grad).abs().max() < TOLERANCE, name
    for name, layer in model.named_modules():
        if isinstance(layer, BlockSparseLinear):
            size, dense = layer.block_size, theirs[f"{name}.weight"].grad
            row, col = int(layer.rows[-1]) * size, int(layer.cols[-1]) * size
            assert dense is not None
            wanted = dense[row : row + size, col : col + size]
            assert layer.blocks.grad is not None
            assert (layer.blocks.grad[-1] - wanted).abs().max() < TOLERANCE, name
            assert (layer.low_rank_u.grad - dense @ layer.low_rank_v.T).abs().max() < TOLERANCE


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    model, rows = sparse_model(low_rank=2), padded_rows(LENGTHS, COLUMNS)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("dsbert", ["DsbertForPreTraining"])
    assert (config["block_size"], config["low_rank"], len(config["active_blocks"])) == (8, 2, 18)
    for path in (tmp_path, str(tmp_path)):
        loaded = transformers.AutoModelForPreTraining.from_pretrained(path)
        assert type(loaded) is hf.DsbertForPreTraining
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        layers = [module for module in loaded.modules() if isinstance(module, BlockSparseLinear)]
        assert all(layer.index.is_consistent() for layer in layers)
        with torch.no_grad():
            assert torch.equal(loaded(**rows).prediction_logits, model(**rows).prediction_logits)
    decoder, embeddings = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert decoder.weight is embeddings.weight
    half = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    found = half.encoder.layer[0].output.dense
    assert (found.blocks.dtype, found.rows.dtype) == (torch.bfloat16, torch.int32)
    assert half(**rows).last_hidden_state.isfinite().all()


def test_every_auto_class_takes_the_encoder_and_a_new_head_begins_as_transformers(tmp_path: Path) -> None:
    model, rows = sparse_model(), padded_rows(LENGTHS, COLUMNS)
    model.save_pretrained(tmp_path / "whole")
    with torch.no_grad():
        expected = model.bert(**rows).last_hidden_state
    autos = {
        "base": transformers.AutoModel,
        "masked": transformers.AutoModelForMaskedLM,
        "sequence": transformers.AutoModelForSequenceClassification,
        "token": transformers.AutoModelForTokenClassification,
        "answer": transformers.AutoModelForQuestionAnswering,
    }
    for head, auto in autos.items():
        loaded = auto.from_pretrained(tmp_path / "whole", num_labels=2)
        assert type(loaded) is PAIRS[head][0]
        base = loaded if head == "base" else loaded.bert
        with torch.no_grad():
            assert torch.equal(base(**rows).last_hidden_state, expected)
        if head in ("sequence", "token"):
            assert 0.05 < loaded.classifier.weight.std() < 0.2
            assert not loaded.classifier.bias.any()
        if head == "base":
            loaded.save_pretrained(tmp_path / "encoder")
    masked = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "encoder")
    norm = masked.cls.predictions.transform.LayerNorm
    assert (norm.weight.unique().tolist(), norm.bias.unique().tolist()) == ([1.0], [0.0])


def test_from_a_configuration_alone_it_begins_at_random() -> None:
    config = sparse_model().config
    first = transformers.AutoModelForMaskedLM.from_config(config)
    layer = first.bert.encoder.layer[1].attention.self.query
    assert layer.num_active == config.active_blocks["encoder.layer.1.attention.self.query"]
    assert 0.05 < layer.blocks.std() < 0.2
    assert len(layer.rows.unique()) > 1
    assert first.get_output_embeddings().weight is first.get_input_embeddings().weight
    assert first(**padded_rows(LENGTHS, COLUMNS)).logits.isfinite().all()


def test_other_attention_of_transformers_computes_the_same_and_keeps_scores() -> None:
    model, rows = sparse_model("base"), padded_rows(LENGTHS, COLUMNS)
    seen = rows["attention_mask"].bool()
    assert model.config._attn_implementation == "dsbert"
    with torch.no_grad():
        expected = model(**rows).last_hidden_state[seen]
        with pytest.raises(ValueError, match="expected attn_implementation='eager' for output_attentions, found"):
            model(**rows, output_attentions=True)
        model.set_attn_implementation("eager")
        found = model(**rows, output_attentions=True)
    assert [scores.shape for scores in found.attentions] == [(4, 2, COLUMNS, COLUMNS)] * 3
    assert (found.last_hidden_state[seen] - expected).abs().max() < TOLERANCE


def damaged(what: str, directory: Path) -> str:
    """A part of the message."""
    weights, config = directory / "model.safetensors", json.loads((directory / "config.json").read_text())
    name = "encoder.layer.0.attention.self.key"
    if what in ("beyond", "twice", "no rows"):
        tensors = load_file(weights)
        rows = tensors[f"bert.{name}.rows"]
        if what == "no rows":
            del tensors[f"bert.{name}.rows"], tensors[f"bert.{name}.cols"]
        elif what == "beyond":
            rows[0] = 4
        else:
            tensors[f"bert.{name}.rows"], tensors[f"bert.{name}.cols"] = rows * 0, rows * 0
        save_file(tensors, weights, metadata={"format": "pt"})
        return "a sparse layer of the model has no topology: expected"
    if what == "no layer":
        config["active_blocks"] = {"embeddings": 3}
    elif what == "too many":
        config["active_blocks"][name] = 17
    elif what == "block size":
        config["block_size"] = 7
    elif what == "rank":
        config["low_rank"] = 33
    elif what == "kernels":
        config["kernels"] = "fast"
    else:
        config["is_decoder"] = True
    (directory / "config.json").write_text(json.dumps(config))
    return {
        "no layer": "expected linear layers in active_blocks of config.json, found 'embeddings'",
        "too many": f"expected 1 to 16 active_blocks of {name} in config.json, found 17",
        "block size": "expected a block size that divides 32 x 32, found 7",
        "rank": "expected low_rank up to 32 in config.json, found 33",
        "kernels": "expected kernels of auto, reference, cpu, triton, dense in config.json, found 'fast'",
        "decoder": "expected an encoder in config.json, found a decoder",
    }[what]


@pytest.mark.parametrize(
    "what",
    ["beyond", "twice", "no rows", "no layer", "too many", "block size", "rank", "kernels", "decoder"],
)
def test_what_no_sparse_model_can_be_is_refused_in_one_line(what: str, tmp_path: Path) -> None:
    """Kernels read where a topology sends them: one of a stranger's is looked at before."""
    sparse_model().save_pretrained(tmp_path)
    message = damaged(what, tmp_path)
    with pytest.raises(UserError) as error:
        transformers.AutoModel.from_pretrained(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_another_architecture_is_refused() -> None:
    recipe = bench.recipe(model={"architecture": "modernbert"}, data={"nsp": False})
    with pytest.raises(
        UserError, match="expected a model of the architecture bert for a sparse form, found modernbert"
    ):
        pretrained_of(*build_model(recipe, bench.VOCAB_SIZE))


def test_a_dense_run_has_a_sparse_form_without_blocks(tmp_path: Path) -> None:
    model, layers = build_model(bench.recipe(sparsity={"pattern": "dense"}), bench.VOCAB_SIZE)
    pretrained_of(model, layers).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert loaded.config.active_blocks == {}
    assert loaded(**padded_rows(LENGTHS, COLUMNS)).logits.isfinite().all()


def test_rows_without_their_padding() -> None:
    """Value by value."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1]])
    found = Unpadded.of(3, 3, mask)
    assert found is not None
    assert found.starts.tolist() == [0, 2, 4, 7]
    assert found.places is not None
    assert found.places.tolist() == [0, 1, 3, 5, 6, 7, 8]
    rows = torch.arange(9).view(3, 3)
    taken = found.take(rows)
    assert taken.tolist() == [[0, 1, 3, 5, 6, 7, 8]]
    assert found.take(torch.tensor([[7, 8, 9]])).tolist() == [[7, 8, 7, 9, 7, 8, 9]]
    assert found.put(taken[..., None]).squeeze(2).tolist() == [[0, 1, 0], [3, 0, 5], [6, 7, 8]]
    assert found.first(taken[..., None]).tolist() == [[0], [3], [6]]
    whole = Unpadded.of(3, 3, torch.ones(3, 3))
    assert whole is not None
    assert whole.places is None
    assert whole.starts.tolist() == [0, 3, 6, 9]
    assert Unpadded.of(3, 3, torch.tensor([[0, 1, 1]] * 3)) is None
    assert Unpadded.of(3, 3, torch.ones(3, 1, 3, 3)) is None
