"""Runs that begin with the weights of another model: the same model by its losses, and a run like any other after."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dsbert.base.errors import UserError
from dsbert.checkpoint.initial_weights import Taken, begin_with_
from dsbert.checkpoint.restore import restore_model
from dsbert.checkpoint.weight_source import COMPACT, open_source, source_digest
from dsbert.config.recipe import Recipe, load_recipe
from dsbert.data.manifest import TOKENIZER, load_manifest
from dsbert.data.stream import SampleStream
from dsbert.models.construction import build_model
from dsbert.models.device_batch import DeviceBatch
from tests.commands import SMALL, complaint, dsbert, dsbert_process

QUERY = "bert.encoder.layer.0.attention.self.query"


def begun(source: Path, data: Path, *overrides: str) -> tuple[Any, dict[str, Any], Taken, Recipe]:
    recipe = load_recipe("demo", [f"data.path={data}", *SMALL, *overrides])
    vocab_size = load_manifest(data).tokenizer.vocab_size
    model, layers = build_model(recipe, vocab_size)
    taken = begin_with_(model, layers, open_source(source), recipe, data / TOKENIZER)
    return model.eval(), layers, taken, recipe


def losses(model: Any, data: Path, seq_len: int) -> torch.Tensor:
    batch = SampleStream.open(data, "train", seq_len, 5).batch(0, 8)
    with torch.no_grad():
        found: torch.Tensor = model(DeviceBatch.of(batch, torch.device("cpu")))[0]
    return found


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("export") / "made"
    assert dsbert("export", str(run), "--to", str(to)).returncode == 0
    return to


def test_it_is_the_source_by_its_losses(run: Path, exported: Path, data: Path, tmp_path: Path) -> None:
    """A run, an export in both forms, its dense half alone; at more positions than it has, and at as many."""
    dense_only = tmp_path / "dense"
    shutil.copytree(exported, dense_only)
    (dense_only / COMPACT).unlink()
    sparse_form = tmp_path / "sparse"
    assert dsbert("export", str(run), "--form", "sparse", "--to", str(sparse_form)).returncode == 0
    restored = restore_model(run)
    restored.model.eval()
    for source, kept in ((run, True), (exported, True), (sparse_form, True), (dense_only, False)):
        model, layers, taken, _ = begun(source, data, "model.max_positions=64", "seed=9")
        torch.testing.assert_close(losses(model, data, 24), losses(restored.model, data, 24), rtol=0, atol=1e-5)
        assert (len(taken.kept), len(taken.cut), taken.anew, taken.positions) == (6 * kept, 6 * (not kept), [], 32)
        for name, layer in layers.items():
            torch.testing.assert_close(layer.to_dense(), restored.layers[name].to_dense())
        positions = model.bert.embeddings.position_embeddings.weight
        assert torch.equal(positions[32:], positions[:32])
    as_long, *_ = begun(run, data)
    assert torch.equal(losses(as_long, data, 24), losses(restored.model, data, 24))


def test_a_dense_weight_keeps_its_largest_blocks(run: Path, exported: Path, data: Path) -> None:
    weight = load_file(exported / "model.safetensors")[f"{QUERY}.weight"]
    _, layers, taken, recipe = begun(run, data, "sparsity.sparsity=0.875", "seed=3")
    assert (len(taken.kept), len(taken.cut)) == (0, 6)
    layer = layers[QUERY]
    norms = weight.view(4, 8, 4, 8).abs().sum((1, 3)).flatten()
    assert layer.num_active == 2
    assert set((layer.rows * 4 + layer.cols).tolist()) == set(norms.topk(2).indices.tolist())
    blocks = weight.view(4, 8, 4, 8).transpose(1, 2)
    assert torch.equal(layer.blocks.detach(), blocks[layer.rows.long(), layer.cols.long()])
    assert "not always-sparse" in " ".join(taken.lines(open_source(run), recipe))
    dense, _, nothing, _ = begun(run, data, "sparsity.pattern=dense")
    assert torch.equal(dense.get_submodule(QUERY).weight.detach(), weight)
    assert (nothing.kept, nothing.cut) == ([], [])
    _, rowwise, _, _ = begun(run, data, "sparsity.balance=rows", "sparsity.sparsity=0.75")
    assert rowwise[QUERY].rows.bincount().tolist() == [1, 1, 1, 1]


def test_a_transformers_model_without_its_heads(data: Path, tmp_path: Path) -> None:
    """As BertModel writes it: no `bert.` in front, and what pre-trains begins anew."""
    from transformers import BertConfig, BertModel

    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 128}
    config = BertConfig(vocab_size=load_manifest(data).tokenizer.vocab_size, max_position_embeddings=32, **size)
    model = BertModel(config, add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    found, _, taken, _ = begun(tmp_path, data, "sparsity.pattern=dense")
    assert torch.equal(found.get_submodule(QUERY).weight, model.encoder.layer[0].attention.self.query.weight)
    assert taken.anew
    assert all(name.startswith(("cls.", "bert.pooler.")) for name in taken.anew)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_heads=2"], "expected model.num_heads=1 as in init_from"),
        (["model.hidden_size=64", "model.num_heads=1"], "of shape [64, 64] in init_from"),
        (["model.num_layers=2"], "expected bert.encoder.layer.1.attention.self.query.weight in init_from"),
        (["sparsity.balance=even", "sparsity.sparsity=0.5"], "override sparsity.balance"),
    ],
)
def test_another_shape_is_one_line(run: Path, data: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        begun(run, data, *overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_deeper_source_and_another_vocabulary_are_refused(
    run: Path, exported: Path, data: Path, tmp_path: Path
) -> None:
    deeper = tmp_path / "deeper"
    shutil.copytree(exported, deeper)
    (deeper / COMPACT).unlink()
    from safetensors.torch import save_file

    tensors = load_file(deeper / "model.safetensors")
    more = {
        name.replace("layer.0.", "layer.1."): value.clone() for name, value in tensors.items() if "layer.0." in name
    }
    save_file(tensors | more, deeper / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"expected no bert\.encoder\.layer\.1"):
        begun(deeper, data)
    source, other = open_source(run), tmp_path / "tokenizer"
    shutil.copytree(data / TOKENIZER, other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"the"', '"thee"'))
    recipe = load_recipe("demo", [f"data.path={data}", *SMALL])
    model, layers = build_model(recipe, load_manifest(data).tokenizer.vocab_size)
    with pytest.raises(UserError, match="found another vocabulary"):
        begin_with_(model, layers, source, recipe, other)


@pytest.mark.slow
def test_a_run_that_began_so_is_a_run(run: Path, exported: Path, data: Path, tmp_path: Path) -> None:
    """On two ranks with mask updates: resumes without the source, verifies, and is refused with another one."""
    source, run_dir = tmp_path / "source", tmp_path / "run"
    shutil.copytree(run, source)
    words = ["pretrain", "demo", "--nproc", "2", "--run-dir", str(run_dir), f"data.path={data}", *SMALL]
    words += ["optim.total_steps=8", "optim.warmup_steps=2", "checkpoint.every_steps=4", "sparsity.num_updates=4"]
    first = dsbert_process(*words, f"init_from={source}")
    assert first.returncode == 0, first.stderr
    assert "begins with the weights of" in first.stderr
    assert "6 sparse weights keep their topology" in first.stderr
    identity = json.loads((run_dir / "checkpoints/step_00000008/state.json").read_text())["identity"]
    assert identity["init_from"] == source_digest(source)
    assert dsbert("verify", str(run_dir)).returncode == 0
    shutil.rmtree(run_dir / "checkpoints/step_00000008")
    expected = (run_dir / "metrics.jsonl").read_text().splitlines()[-1]
    assert "expected init_from = " in complaint(dsbert_process(*words)), "a run that goes on with random weights"
    shutil.rmtree(source)
    again = dsbert_process(*words, f"init_from={source}")
    assert again.returncode == 0, again.stderr
    assert json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["loss"] == json.loads(expected)["loss"]
    assert dsbert("verify", str(run_dir)).returncode == 0
    assert "expected init_from = " in complaint(dsbert_process(*words, f"init_from={exported}"))


def test_nothing_there_is_one_line(data: Path, tmp_path: Path) -> None:
    words = ["pretrain", "demo", "--nproc", "1", "--run-dir", str(tmp_path / "run"), f"data.path={data}", *SMALL]
    assert "expected init_from=" in complaint(dsbert_process(*words, f"init_from={tmp_path / 'none'}"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"expected a run, a checkpoint, an export .* found nothing of the kind"):
        open_source(tmp_path / "empty")
    (tmp_path / "empty/config.json").write_text("{}")
    (tmp_path / "empty/pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="save_pretrained"):
        open_source(tmp_path / "empty")
