"""A second encoder behind the model's seam: another attention, no biases, one objective."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import ModernBertForMaskedLM

from dsbert.base.errors import UserError
from dsbert.config.architectures import ARCHITECTURES
from dsbert.config.recipe import Recipe, load_recipe
from dsbert.models.construction import build_model, layer_shapes
from dsbert.models.device_batch import DeviceBatch
from dsbert.models.modern_bert import modern_bert_config
from dsbert.models.spec import model_spec
from dsbert.sparse import SparsityConfig
from tests import workbench as bench
from tests.commands import dsbert, dsbert_on_a_rank
from tests.helpers import run_distributed

SMALL = (
    "model.hidden_size=32", "model.num_layers=2", "model.max_positions=32", "data.seq_len=24", "model.dropout=0.1",
    "model.intermediate_size=48", "sparsity.block_size=8", "sparsity.sparsity=0.75", "sparsity.num_updates=5",
    "batch.global_batch=12", "batch.micro_batch=3", "optim.total_steps=20", "optim.warmup_steps=2",
    "eval.every_steps=10", "eval.sequences=16", "checkpoint.every_steps=10", "log.every_steps=1", "log.wandb=false",
)  # fmt: skip
LAYERS = ["attn.Wo", "attn.Wqkv", "mlp.Wi", "mlp.Wo"]


def recipe(**sections: Any) -> Recipe:
    sections["model"] = {"architecture": "modernbert", "num_layers": 3} | sections.get("model", {})
    return bench.recipe(**{"data": {"nsp": False}} | sections)


def outputs(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Logits at every position, of ours or of transformers' model."""
    hidden = model.model(input_ids, attention_mask=attention_mask).last_hidden_state
    found: Tensor = model.decoder(model.head(hidden))
    return found


def pretrain(words: list[str], world_size: int = 2) -> None:
    for code, _, stderr in run_distributed(dsbert_on_a_rank, world_size, {"words": words}):
        assert code == 0, stderr


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Twenty steps on two ranks, and the words that did it."""
    words = [f"data.path={data}", *SMALL]
    run = tmp_path_factory.mktemp("modern") / "run"
    pretrain(["pretrain", "modernbert-demo", "--run-dir", str(run), *words])
    return run, words


def test_it_trains_sparse(trained: tuple[Path, list[str]]) -> None:
    run, _ = trained
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 21))
    assert all(record["loss"] == record["loss_mlm"] > 0 for record in records)
    assert np.mean([one["loss"] for one in records[-5:]]) < np.mean([one["loss"] for one in records[:5]]) - 0.1
    assert not [key for key in records[0] if "nsp" in key]
    assert [one["step"] for one in records if one["val_mlm_loss"] and one["val_mlm_accuracy"] is not None] == [10, 20]
    updates = [json.loads(line) for line in (run / "masks.jsonl").read_text().splitlines()]
    assert sum(record["pruned"] or 0 for record in records) > 0
    assert len(updates) >= 4
    state = json.loads((run / "checkpoints" / "step_00000020" / "state.json").read_text())
    assert state["identity"]["model"]["architecture"] == "modernbert"
    assert sorted(state["layers"]) == [f"model.layers.{number}.{name}" for number in range(2) for name in LAYERS]
    assert {layer["block_size"] for layer in state["layers"].values()} == {8}
    assert not [name for name in state["params"] if name.endswith(".bias") and name != "decoder.bias"]


def test_it_resumes_bit_for_bit(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    run, words = trained
    shutil.copytree(run, resumed := tmp_path / "run")
    shutil.rmtree(resumed / "checkpoints" / "step_00000020")
    pretrain(["pretrain", "modernbert-demo", "--run-dir", str(resumed), *words, "--resume", "must"])
    for name in ("topology.safetensors", *(f"fragments-0000{rank}-of-00002.safetensors" for rank in (0, 1))):
        before, after = (one / "checkpoints" / "step_00000020" / name for one in (run, resumed))
        assert before.read_bytes() == after.read_bytes(), name
    assert dsbert("diff", str(run), str(resumed), "--exit-code").returncode == 0
    done = dsbert("verify", str(resumed))
    assert done.returncode == 0, done.stderr


def test_commands_know_it(trained: tuple[Path, list[str]]) -> None:
    run, _ = trained
    report = json.loads(dsbert("inspect", str(run), "--json").stdout)
    assert (report["density"], len(report["layers"])) == (0.25, 8)
    result = json.loads(dsbert("evaluate", str(run), "--json").stdout)
    assert list(result) == ["step", "sequences", "tokens", "mlm_loss", "mlm_accuracy", "unigram_loss"]
    assert 0 < result["mlm_loss"] < np.log(200)


def test_an_export_is_the_same_model_in_transformers(
    trained: tuple[Path, list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from dsbert.checkpoint.restore import restore_model

    run, _ = trained
    done = dsbert("export", str(run), "--to", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    transformers.utils.logging.enable_propagation()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
            model, info = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    finally:
        transformers.utils.logging.disable_propagation()
    assert [record.message for record in caplog.records if record.name.startswith("transformers")] == []
    assert type(model) is ModernBertForMaskedLM
    assert not any(info.values()), info
    special = {name: getattr(model.config, f"{name}_token_id") for name in ("pad", "cls", "sep", "bos", "eos")}
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    assert special == {"pad": tokenizer.pad_token_id, "cls": cls, "sep": sep, "bos": cls, "eos": sep}
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 32
    restored = restore_model(run)
    restored.model.eval()
    model.eval()
    inputs = tokenizer(["the cat sees a big house .", "a [MASK]"], return_tensors="pt", padding=True)
    assert not inputs["attention_mask"].all()
    with torch.no_grad():
        ours = outputs(restored.model, inputs["input_ids"], inputs["attention_mask"])
        theirs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    real = inputs["attention_mask"].bool()
    assert (ours - theirs)[real].abs().max() < 1e-4
    assert theirs[real].std() > 0.1
    assert not any(param.device.type == "meta" for param in model.parameters())


@pytest.mark.parametrize("pattern", ["dense", "static"])
def test_the_model_is_the_one_of_transformers(pattern: str) -> None:
    """On texts longer than what local attention sees, with padding; in eval mode, and while training."""
    # Weights large enough for every token that is seen to tell.
    config = recipe(model={"max_positions": 256, "dropout": 0.0, "initializer_std": 0.3}, sparsity={"pattern": pattern})
    model, layers = build_model(config, bench.VOCAB_SIZE)
    assert len(layers) == (0 if pattern == "dense" else 12)
    twin = ModernBertForMaskedLM(modern_bert_config(config.model, bench.VOCAB_SIZE))
    weights = dict(model.state_dict())
    for name, layer in layers.items():
        weights[f"{name}.weight"] = layer.to_dense()
        for part in ("blocks", "rows", "cols"):
            del weights[f"{name}.{part}"]
    twin.load_state_dict(weights)
    input_ids = torch.randint(5, bench.VOCAB_SIZE, (3, 200), generator=torch.Generator().manual_seed(0))
    seen = torch.ones_like(input_ids)
    seen[1, 90:] = 0
    for training in (False, True):
        model.train(training)
        twin.train(training)
        ours, theirs = (outputs(one, input_ids, seen)[seen.bool()] for one in (model, twin))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    # The first layer sees all; the others would, too, where nothing told them apart.
    assert [layer.attention_type for layer in twin.model.layers] == ["full_attention"] + ["sliding_attention"] * 2
    batch = bench.stream().batch(0, 4)
    assert not batch.attention_mask.all()
    losses, hits = model.eval()(DeviceBatch.of(batch, torch.device("cpu")))
    labels = torch.from_numpy(batch.mlm_labels)
    logits = twin.eval()(**bench.padded(batch, "token_type_ids")).logits.flatten(0, 1)[batch.mlm_positions]
    chosen = logits.log_softmax(-1).gather(1, labels[:, None])
    torch.testing.assert_close(losses, -chosen.sum()[None], rtol=1e-4, atol=1e-5)
    assert hits.tolist() == [int((logits.argmax(-1) == labels).sum())]


def test_it_begins_as_transformers_would() -> None:
    """Standard deviations of every matrix, over tens of thousands of draws; norms at 1, biases at 0; tied as there."""
    config = recipe(model={"hidden_size": 192, "num_heads": 3}, sparsity={"pattern": "dense"})
    model, _ = build_model(config, 1000)
    twin = ModernBertForMaskedLM(modern_bert_config(config.model, 1000))
    ours, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    assert list(ours) == list(theirs)
    for name, param in ours.items():
        if param.dim() > 1:
            assert param.std().item() == pytest.approx(theirs[name].std().item(), rel=0.03), name
            assert param.abs().max() <= 2.0001 * config.model.initializer_std
        else:
            assert torch.equal(param, theirs[name]), name
    assert model.get_submodule("decoder").weight is model.get_submodule("model.embeddings.tok_embeddings").weight
    for name, buffer in twin.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], buffer), name


def test_positions_stay_exact_in_half_precision() -> None:
    model, _ = build_model(recipe(), bench.VOCAB_SIZE)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "inv_freq" in name}
    model.bfloat16()
    after = dict(model.named_buffers())
    assert len(before) == 4
    assert all(torch.equal(after[name], buffer) for name, buffer in before.items())
    batch = DeviceBatch.of(bench.stream().batch(0, 4), torch.device("cpu"))
    losses, _ = model(batch)
    losses.sum().backward()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in model.parameters())


def test_flops_count_the_pairs_that_see_each_other() -> None:
    config, spec = recipe().model, model_spec(recipe().model)
    near = sum(abs(i - j) <= 64 for i in range(200) for j in range(200))
    assert spec.attention_pairs(config, [200]) == 200**2 + 2 * near
    assert spec.attention_pairs(config, [16]) == 3 * 16**2
    assert spec.attention_pairs(config, [16, 200, 1]) == 3 * 16**2 + 200**2 + 2 * near + 3
    model, _ = build_model(recipe(), bench.VOCAB_SIZE)
    shapes = layer_shapes(model, spec)
    assert sum(shape["kept"] for shape in shapes.values()) * 4 == sum(
        shape["shape"][0] * shape["shape"][1] for shape in shapes.values()
    )


def test_a_recipe_names_it() -> None:
    found = load_recipe("modernbert-demo")
    assert found.sparsity.modules == ("*model.layers.*",)
    assert load_recipe("demo", ["model.architecture=modernbert", "data.nsp=false"]).sparsity.modules == (
        "*model.layers.*",
    )
    with pytest.raises(UserError, match=r"^recipe: expected data\.nsp=false with model\.architecture=modernbert, "):
        load_recipe("modernbert-demo", ["data.nsp=true"])
    known = re.escape(f"recipe model.architecture: expected one of {', '.join(ARCHITECTURES)}, found 'gpt'")
    with pytest.raises(UserError, match=known):
        load_recipe("demo", ["model.architecture=gpt"])
    with pytest.raises(UserError, match="linear layers of the encoder only, found head"):
        build_model(recipe(sparsity={"modules": ["*"]}), 64)


def test_bert_is_what_it_was_before_there_was_a_choice() -> None:
    """Runs that began then have no such key in their identity and records."""
    plain, named = load_recipe("demo"), load_recipe("demo", ["model.architecture=bert"])
    assert named == plain
    assert "architecture" not in plain.identity()["model"]
    assert "architecture" not in plain.model_dump(mode="json")["model"]
    assert SparsityConfig().modules == (ARCHITECTURES["bert"].encoder,)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_architecture_has_its_spec(name: str) -> None:
    config = bench.recipe(model={"architecture": name}, data={"nsp": name == "bert"}).model
    spec = model_spec(config)
    assert spec.architecture is ARCHITECTURES[name]
    assert [objective.name for objective in spec.objectives] == list(ARCHITECTURES[name].objectives)
