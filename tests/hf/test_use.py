"""A sparse directory in other hands: pipelines in a fresh process, Trainer, embeddings, a run without an export."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset

from dsbert import hf
from dsbert.base.errors import UserError
from dsbert.hf.sentence_embedder import mean_pooled
from dsbert.sparse import BlockSparseLinear
from tests.commands import ENVIRONMENT, dsbert

SENTENCES = ["the cat sees a big house .", "a dog", "the bird and the cat like a house that the dog sees . " * 3]
MASKED = ["the [MASK] sees a big house .", "[MASK] dog likes"]


@pytest.fixture(scope="module")
def exports(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both forms of the run."""
    folder = tmp_path_factory.mktemp("exports")
    for form in ("dense", "sparse"):
        done = dsbert("export", str(run), "--to", str(folder / form), "--form", form)
        assert done.returncode == 0, done.stderr
    return folder


PIPELINES = """
import json, sys
import dsbert.hf
from transformers import pipeline

directory, sentences, masked = json.loads(sys.argv[1])
fill = pipeline("fill-mask", model=directory)
found = {"fill-mask": [[[row["token"], row["score"]] for row in rows] for rows in fill(masked, batch_size=2)]}
classify = pipeline("text-classification", model=directory, top_k=None)
found["text-classification"] = [len(rows) for rows in classify(sentences, truncation=True)]
features = pipeline("feature-extraction", model=directory, tokenize_kwargs={"truncation": True})
found["feature-extraction"] = [rows[0] for rows in features(sentences)]
found["classes"] = [type(one.model).__name__ for one in (fill, classify, features)]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_pipelines_in_a_fresh_process_say_what_the_dense_export_says(exports: Path) -> None:
    arguments = json.dumps([str(exports / "sparse"), SENTENCES, MASKED])
    done = subprocess.run(
        [sys.executable, "-c", PIPELINES, arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "not supported for" not in done.stderr
    found = json.loads(done.stdout)
    assert found["classes"] == ["DsbertForMaskedLM", "DsbertForSequenceClassification", "DsbertModel"]
    assert found["text-classification"] == [2] * 3
    dense = str(exports / "dense")
    fill = transformers.pipeline("fill-mask", model=dense)
    for ours, theirs in zip(found["fill-mask"], fill(MASKED), strict=True):
        expected = [[row["token"], row["score"]] for row in theirs]
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    features = transformers.pipeline("feature-extraction", model=dense, tokenize_kwargs={"truncation": True})
    for ours, theirs in zip(found["feature-extraction"], features(SENTENCES), strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs[0]), rtol=1e-5, atol=1e-5)


def test_embeddings_are_means_of_what_the_dense_export_has(exports: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(exports / "dense")
    model = transformers.AutoModel.from_pretrained(exports / "dense")
    expected = []
    for sentence in SENTENCES:
        row = tokenizer(sentence, truncation=True, return_tensors="pt")
        with torch.no_grad():
            expected.append(model(**row).last_hidden_state[0].mean(0))
    for path in (exports / "sparse", str(exports / "dense")):
        found = hf.SentenceEmbedder.from_pretrained(path).encode(SENTENCES, batch_size=2)
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert hf.SentenceEmbedder.from_pretrained(exports / "sparse").encode([]).shape == (0, 32)
    hidden, mask = torch.tensor([[[1.0], [3.0], [9.0]], [[1.0], [1.0], [1.0]]]), torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert mean_pooled(hidden, mask).tolist() == [[2.0], [0.0]]


@pytest.mark.slow
def test_it_is_a_module_of_sentence_transformers(exports: Path, tmp_path: Path) -> None:
    """With the mean pooling that it gives to a model without a pooling of its own; saved by it and loaded again."""
    from sentence_transformers import SentenceTransformer

    expected = hf.SentenceEmbedder.from_pretrained(exports / "sparse").encode(SENTENCES)
    model = SentenceTransformer(str(exports / "sparse"), device="cpu")
    torch.testing.assert_close(torch.from_numpy(model.encode(SENTENCES)), expected, rtol=1e-5, atol=1e-5)
    model.save(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), device="cpu")
    assert torch.equal(torch.from_numpy(again.encode(SENTENCES)), torch.from_numpy(model.encode(SENTENCES)))


def test_a_run_is_taken_without_an_export(run: Path, exports: Path) -> None:
    exported = transformers.AutoModelForPreTraining.from_pretrained(exports / "sparse")
    row = transformers.AutoTokenizer.from_pretrained(exports / "sparse")(SENTENCES[0], return_tensors="pt")
    for path in (run, str(run), run / "checkpoints" / "step_00000012"):
        model = hf.from_run(path)
        assert type(model) is hf.DsbertForPreTraining
        assert not model.training
        for name, tensor in exported.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
        ours, saved = model.config.to_dict(), exported.config.to_dict()
        about = ("_name_or_path", "architectures", "dtype", "transformers_version")
        assert {name: ours[name] for name in ours if name not in about} == {
            name: saved[name] for name in saved if name not in about
        }
    tokens = hf.tokenizer_from_run(str(run))
    assert tokens(SENTENCES[0], return_tensors="pt")["input_ids"].tolist() == row["input_ids"].tolist()
    assert tokens.model_max_length == 32
    assert hf.from_run(run, hf.DsbertForTokenClassification, num_labels=5).classifier.out_features == 5
    with pytest.raises(UserError, match="expected a run directory or a checkpoint at"):
        hf.from_run(run / "nowhere")


def trainer(directory: Path, to: Path, **arguments: Any) -> transformers.Trainer:
    """Four steps of classification: whether a cat is in it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    texts = [f"the {animal} sees a {thing} ." for animal in ("cat", "dog") for thing in ("house", "big bird", "tree")]
    rows = tokenizer(texts)
    data = Dataset.from_dict({**rows, "labels": [int("cat" in text) for text in texts]})
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory, num_labels=2)
    settings = transformers.TrainingArguments(
        output_dir=str(to), max_steps=4, save_steps=2, learning_rate=1e-3, per_device_train_batch_size=3, use_cpu=True,
        report_to=[], logging_steps=1, disable_tqdm=True, seed=1, **arguments,
    )  # fmt: skip
    collate = transformers.DataCollatorWithPadding(tokenizer)
    return transformers.Trainer(
        model=model, args=settings, train_dataset=data, processing_class=tokenizer, data_collator=collate
    )


def test_trainer_trains_saves_and_resumes(exports: Path, tmp_path: Path) -> None:
    whole = trainer(exports / "sparse", tmp_path / "whole")
    begun = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    whole.train()
    layers = {name: each for name, each in whole.model.named_modules() if isinstance(each, BlockSparseLinear)}
    assert layers
    for name, layer in layers.items():
        assert not torch.equal(layer.blocks, begun[f"{name}.blocks"]), name
        assert torch.equal(layer.rows, begun[f"{name}.rows"]), name
    again = trainer(exports / "sparse", tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    again.save_model(str(tmp_path / "tuned"))
    tuned = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned")
    row = transformers.AutoTokenizer.from_pretrained(tmp_path / "tuned")("the cat sees", return_tensors="pt")
    with torch.no_grad():
        # To rounding: products of torch's depend on where a file that is mapped puts a tensor.
        torch.testing.assert_close(tuned(**row).logits, again.model.eval()(**row).logits, rtol=1e-5, atol=1e-6)
