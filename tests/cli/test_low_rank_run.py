"""A run with a low-rank term beside its blocks, through every command that looks at one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dsbert.checkpoint.restore import restore_model
from dsbert.data.stream import SampleStream
from dsbert.inspection.audit_content import state_problems
from dsbert.sparse.linear import dense_weight
from tests.commands import SMALL, complaint, dsbert, dsbert_process

RANK = 2
HIDDEN, INTERMEDIATE, SEQ_LEN = 32, 128, 24
TERM = f"sparsity.low_rank={RANK}"
ARCHITECTURES = {"bert": [], "modernbert": ["model.architecture=modernbert", "data.nsp=false"]}


def words(run: Path, data: Path, *more: str) -> list[str]:
    return ["pretrain", "demo", "--run-dir", str(run), f"data.path={data}", *SMALL, *more]


@pytest.fixture(scope="module", params=["bert", pytest.param("modernbert", marks=pytest.mark.slow)])
def made(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Twelve steps with three mask updates and two checkpoints; BERT on two ranks, ModernBERT on one."""
    run = tmp_path_factory.mktemp("runs") / "run"
    nproc = ["--nproc", "2"] if request.param == "bert" else []
    done = dsbert_process(*words(run, data, TERM, *ARCHITECTURES[request.param]), *nproc)
    assert done.returncode == 0, done.stderr
    assert "block 8 and rank 2 beside" in done.stderr
    return request.param, run


def test_it_is_whole_and_named(made: tuple[str, Path], data: Path) -> None:
    architecture, run = made
    assert dsbert("verify", str(run)).returncode == 0
    report = json.loads(dsbert("inspect", str(run), "--json").stdout)
    assert (report["low_rank"], report["density"]) == (RANK, 0.25)
    kept = sum(layer["num_active"] for layer in report["layers"]) * 64
    term = sum(RANK * sum(layer["shape"]) for layer in report["layers"])
    assert report["bytes"]["encoder_weights"] == (kept + term) * 4 + kept // 64 * 8
    assert report["bytes"]["encoder_optimizer"] == (kept + term) * 8
    assert "blocks of 8 and rank 2 beside them" in dsbert("inspect", str(run)).stdout
    diff = json.loads(dsbert("diff", str(run), str(run), "--json").stdout)
    assert diff["identical"]
    assert sum(layer["name"].endswith(("low_rank_u", "low_rank_v")) for layer in diff["layers"]) == 2 * len(
        report["layers"]
    )
    # FLOPs by hand: forward and backward of the tokens of 12 steps of 12 sequences; attention is full at this length.
    lengths = (
        SampleStream.open(data, "train", SEQ_LEN, 1, nsp=architecture == "bert").batch(0, 144).attention_mask.sum(1)
    )
    flops = 6 * int(lengths.sum()) * (kept + term) + 12 * int((lengths**2).sum()) * HIDDEN
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["tokens_total"], last["flops_total"]) == (lengths.sum(), flops)
    assert lengths.sum() < 0.95 * 144 * SEQ_LEN, "there would be padding"
    assert last["density"] == 0.25
    if architecture == "bert":
        assert term == RANK * (4 * 2 * HIDDEN + 2 * (HIDDEN + INTERMEDIATE))
    assert dsbert("evaluate", str(run), "--json").returncode == 0


def test_it_resumes_to_the_bit_and_only_at_its_rank(made: tuple[str, Path], data: Path, tmp_path: Path) -> None:
    architecture, run = made
    nproc = ["--nproc", "2"] if architecture == "bert" else []
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000012")
    if architecture == "bert":
        refused = dsbert_process(*words(tmp_path / "run", data, "sparsity.low_rank=0"))
        assert "sparsity.low_rank" in complaint(refused)
    done = dsbert_process(
        *words(tmp_path / "run", data, TERM, *ARCHITECTURES[architecture], "--resume", "must"), *nproc
    )
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr
    report = json.loads(dsbert("diff", str(run), str(tmp_path / "run"), "--json").stdout)
    assert report["identical"]
    assert report["a"]["step"] == 12


def test_verify_holds_the_term_against_its_layer(made: tuple[str, Path]) -> None:
    _, run = made
    checkpoint = max((run / "checkpoints").glob("step_*"))
    manifest = json.loads((checkpoint / "manifest.json").read_text())

    def problems(change: Any) -> list[str]:
        state = json.loads((checkpoint / "state.json").read_text())
        change(state)
        return [problem.problem for problem in state_problems(state, manifest)]

    name = next(iter(json.loads((checkpoint / "state.json").read_text())["layers"]))
    assert problems(lambda state: None) == []
    assert f"expected {name}.low_rank_u" in problems(lambda state: state["params"].pop(f"{name}.low_rank_u"))[0]
    (found,) = problems(lambda state: state["params"].update({f"{name}.low_rank_v": [3, HIDDEN]}))
    assert found == f"expected {name}.low_rank_v of rank 2, [2, 32], found [3, 32]"
    layers = json.loads((checkpoint / "state.json").read_text())["layers"]
    assert len(problems(lambda state: state["recipe"]["sparsity"].pop("low_rank"))) == 2 * len(layers)


def test_an_export_is_the_sum(made: tuple[str, Path], tmp_path: Path) -> None:
    import transformers
    from safetensors import safe_open

    architecture, run = made
    to = tmp_path / "out"
    for _ in range(2):  # the second replaces the first, which it knows as its own
        done = dsbert("export", str(run), "--to", str(to))
        assert done.returncode == 0, done.stderr
    (to / "export.json").unlink()
    assert dsbert("export", str(run), "--to", str(to)).returncode == 0
    classes = {"bert": transformers.BertForPreTraining, "modernbert": transformers.ModernBertForMaskedLM}
    theirs = classes[architecture].from_pretrained(to).eval()
    restored = restore_model(run)
    ours: Any = restored.model.eval()
    for layer in restored.layers.values():
        assert layer.low_rank_u.abs().max() > 1e-4
    with safe_open(to / "sparse.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "dsbert-compact-2"
        compact = {name: file.get_tensor(name) for name in list(file.keys())}
    for name, layer in restored.layers.items():
        blocks = dense_weight(layer.shape, *(compact[f"{name}.{part}"] for part in ("blocks", "rows", "cols")))
        term = compact[f"{name}.low_rank_u"].double() @ compact[f"{name}.low_rank_v"].double()
        exported = theirs.get_parameter(f"{name}.weight").detach()
        assert (exported - (blocks.double() + term)).abs().max() < 1e-8
        assert (exported - blocks).abs().max() > 1e-7, "the term is part of it"
        assert f"{name}.low_rank_u" not in dict(theirs.named_parameters())
    tokenizer = transformers.AutoTokenizer.from_pretrained(to)
    inputs = tokenizer(["the cat sees a house .", "a dog"], return_tensors="pt", padding=True)
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        if architecture == "bert":
            own = ours.cls.predictions(ours.bert(**inputs).last_hidden_state)
            logits = theirs(**inputs).prediction_logits
        else:
            own = ours.decoder(ours.head(ours.model(**inputs).last_hidden_state))
            logits = theirs(**inputs).logits
    assert (own - logits)[seen].abs().max() < 1e-4
    assert own[seen].argmax(-1).equal(logits[seen].argmax(-1))


def test_an_export_without_the_term_is_as_it_was(run: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    assert dsbert("export", str(run), "--to", str(tmp_path / "out")).returncode == 0
    with safe_open(tmp_path / "out" / "sparse.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "dsbert-compact-1"
        assert not [name for name in list(file.keys()) if "low_rank" in name]
    state = json.loads((max((run / "checkpoints").glob("step_*")) / "state.json").read_text())
    assert "low_rank" not in json.dumps(state)
    assert "low_rank" not in dsbert("inspect", str(run), "--json").stdout
