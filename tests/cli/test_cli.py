"""The command line, as a user runs it: real processes, real files, real ranks."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dsbert.cluster.secret import SECRET_FILE
from tests.commands import ENVIRONMENT, SMALL, Done, complaint, dsbert, dsbert_on_a_rank, dsbert_process, one_voice
from tests.helpers import run_distributed
from tests.text import write_corpus

HEAVY = ("torch", "transformers", "deepspeed", "datasets", "pydantic")


@pytest.mark.parametrize("command", [[], ["prepare"], ["pretrain"], ["evaluate"], ["export"], ["inspect"]])
def test_help_is_quick_and_imports_nothing_slow(command: list[str]) -> None:
    seconds = []
    for _ in range(5):
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = dsbert_process(*command, "--help")
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Of the processor: another test may have the other core, and more than one.
        seconds.append(end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime)
        assert done.returncode == 0
        assert "Usage: dsbert" in done.stdout
    assert statistics.median(seconds) < 0.5
    listing = (
        f"import sys; sys.argv = ['dsbert', *{command!r}, '--help']\n"
        "from dsbert.cli import main\n"
        "try:\n    main()\n"
        f"finally:\n    print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
    )
    listed = subprocess.run(
        [sys.executable, "-c", listing], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert listed.stderr.strip() == "[]"


def test_a_run_leaves_what_the_contract_says(run: Path) -> None:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 13))
    keys = {
        "step", "loss", "loss_mlm", "loss_nsp", "val_mlm_loss", "val_mlm_accuracy", "val_nsp_loss", "lr", "grad_norm",
        "tokens_total", "tokens_per_s", "padding", "flops_total", "flops_dense_total", "density", "dof", "pruned",
        "removed_new_ratio", "topology_digest", "step_s", "mask_update_s", "skipped", "save_s", "data_s",
        "validation_s",
    }  # fmt: skip
    for record in records:
        assert keys <= record.keys()
        assert record["grad_norm"] > 0
        assert record["padding"] == 0
    assert [record["step"] for record in records if record["pruned"] is not None] == [3, 6, 9]
    assert [record["step"] for record in records if record["val_mlm_loss"] is not None] == [6, 12]
    assert records[-1]["flops_total"] < records[-1]["flops_dense_total"]
    status = json.loads((run / "status.json").read_text())
    assert (status["outcome"], status["step"], status["attempt"]) == ("done", 12, 1)
    assert json.loads((run / "attempt.json").read_text())["number"] == 1
    assert (run / "checkpoints" / "latest").read_text().split()[0] == "step_00000012"
    assert "versions" in (run / "config.yaml").read_text()
    assert not list((run / "checkpoints").glob(".*tmp"))


def test_the_journal_replays_the_topology(run: Path) -> None:
    from dsbert.checkpoint.loading import read_topology
    from dsbert.checkpoint.state import read_state
    from dsbert.config.recipe import recipe_from_dict
    from dsbert.sparse import BlockTopology, DrawKey
    from dsbert.sparse.journal import replay

    last = run / "checkpoints" / "step_00000012"
    state, tensors = read_state(last), read_topology(last)
    start = {}
    for name, layer in state.layers.items():
        seed = recipe_from_dict(state.recipe.whole).seed
        start[name] = BlockTopology.random(layer.out_in, 8, 0.25, DrawKey(seed, "init", 0, name))
    entries = [json.loads(line) for line in (run / "masks.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [3, 6, 9]
    end = replay(start, entries)
    for name, topology in end.items():
        assert topology.rows.equal(tensors[f"{name}.rows"])
        assert topology.cols.equal(tensors[f"{name}.cols"])
    assert any(end[name].digest() != start[name].digest() for name in start)


@pytest.mark.exhaustive
def test_a_second_call_has_nothing_to_do(run: Path, data: Path) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    done = dsbert_process("pretrain", "demo", "--nproc", "2", "--run-dir", str(run), f"data.path={data}", *SMALL)
    assert done.returncode == 0, done.stderr
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_killed_and_resumed_ends_bit_for_bit_like_undisturbed(run: Path, data: Path, tmp_path: Path) -> None:
    """Stopped by a signal once it has taken some steps: both ranks save the same step and the launcher returns 75."""
    import signal

    words = ["pretrain", "demo", "--nproc", "2", "--run-dir", str(tmp_path / "run"), f"data.path={data}", *SMALL]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "dsbert", *words, "eval.every_steps=1"],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.02)
    launcher.send_signal(signal.SIGUSR2)
    _, stderr = launcher.communicate(timeout=90)
    assert launcher.returncode == 75, stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["outcome"], status["cause"]) == ("requeue", "SIGUSR2")
    assert 2 <= status["step"] < 12
    done = dsbert_process(*words)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 13))
    assert json.loads((tmp_path / "run" / "attempt.json").read_text())["number"] == 2
    for name in ("topology.safetensors", *(f"fragments-0000{rank}-of-00002.safetensors" for rank in (0, 1))):
        ours = tmp_path / "run" / "checkpoints" / "step_00000012" / name
        assert ours.read_bytes() == (run / "checkpoints" / "step_00000012" / name).read_bytes(), name


def test_evaluate(run: Path, tmp_path: Path) -> None:
    done = dsbert("evaluate", str(run), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    keys = "step sequences tokens mlm_loss mlm_accuracy unigram_loss nsp_loss nsp_accuracy"
    assert set(keys.split()) == result.keys()
    assert result["step"] == 12
    assert 0 < result["mlm_loss"] < 6
    assert json.loads(dsbert("evaluate", str(run / "checkpoints" / "step_00000012"), "--json").stdout) == result
    write_corpus(tmp_path / "other.txt", num_documents=5, seed=9)
    other = json.loads(dsbert("evaluate", str(run), "--text", str(tmp_path / "other.txt"), "--json").stdout)
    assert other["tokens"] != result["tokens"]
    # The same number as during training, where the set is that of all held-out samples.
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert result["sequences"] >= 16
    assert last["val_mlm_loss"] == pytest.approx(result["mlm_loss"], abs=0.3)


def test_evaluate_takes_what_prepare_takes(run: Path, tmp_path: Path) -> None:
    """Tables by their column, packed files, folders, groupings: the same text gives the same figures."""

    def evaluation(*words: str) -> dict[str, Any]:
        done = dsbert("evaluate", str(run), "--json", *words)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    write_corpus(tmp_path / "text.txt", num_documents=5, seed=9)
    documents = (tmp_path / "text.txt").read_text().strip().split("\n\n")
    folder = tmp_path / "tables"
    folder.mkdir()
    rows = [json.dumps({"body": text}) + "\n" for text in documents]
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("".join(rows[:3]).encode()))
    (folder / "b.NDJSON").write_text("".join(rows[3:]))
    (folder / "c.jsonl").touch()
    (folder / "README.md").touch()
    with (tmp_path / "lines.csv").open("w") as file:
        csv.writer(file).writerows([["body"], *([line] for text in documents for line in text.split("\n"))])
    whole = evaluation("--text", str(tmp_path / "text.txt"))
    assert whole.pop("left_out") == {}
    tables = evaluation("--text", str(folder), "--text-column", "body")
    assert tables.pop("left_out") == {
        "empty": {"files": 1, "names": [str(folder / "c.jsonl")]},
        "unknown kind": {"files": 1, "names": [str(folder / "README.md")]},
    }
    assert tables == whole
    words = ["--text", str(tmp_path / "lines.csv"), "--text-column", "body", "--documents"]
    assert evaluation(*words, "rows:1000000")["tokens"] > 0
    assert evaluation(*words, "rows:7") != evaluation(*words, "rows:3")
    shown = dsbert("evaluate", str(run), "--text", str(folder), "--text-column", "body").stdout
    assert f"1 unknown kind: {folder / 'README.md'}" in shown
    for wrong, message in (
        (["--text", ""], "found an empty name"),
        (["--text", str(folder)], "expected a column 'text' in"),
        (["--text-column", "body"], "found no --text"),
    ):
        assert message in complaint(dsbert("evaluate", str(run), *wrong))


def test_export_is_the_same_model_in_transformers(run: Path, tmp_path: Path) -> None:
    import numpy as np
    import torch
    import transformers
    from safetensors.torch import load_file

    from dsbert.checkpoint.restore import restore_model
    from dsbert.data.stream import Batch
    from dsbert.models.device_batch import DeviceBatch
    from dsbert.sparse.linear import dense_weight

    done = dsbert("export", str(run), "--to", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    model, info = transformers.BertForPreTraining.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    restored = restore_model(run)
    restored.model.eval()
    model.eval()
    inputs = tokenizer(["the cat sees a house .", "a dog"], ["it is big .", "runs"], return_tensors="pt", padding=True)
    seen: list[torch.Tensor] = []
    transform = restored.model.get_submodule("cls.predictions.transform")
    transform.register_forward_hook(lambda module, args, output: seen.append(output))
    real = inputs["attention_mask"].flatten().nonzero()[:, 0]
    rows = {name: tensor.numpy() for name, tensor in inputs.items()}
    asked = {
        "mlm_positions": real.numpy(),
        "mlm_labels": rows["input_ids"].reshape(-1)[real],
        "nsp_labels": np.zeros(2, np.int64),
    }
    batch = Batch(**rows, **asked, num_tokens=len(real))
    with torch.no_grad():
        restored.model(DeviceBatch.of(batch, torch.device("cpu")))
        ours = restored.model.get_submodule("cls.predictions.decoder")(seen[0])
        theirs = model(**inputs).prediction_logits.flatten(0, 1)[real]
    assert len(real) < inputs["input_ids"].numel()
    assert (ours - theirs).abs().max() < 1e-4
    assert ours.argmax(-1).equal(theirs.argmax(-1))
    compact = load_file(tmp_path / "out" / "sparse.safetensors")
    name = next(iter(restored.layers))
    dense = dense_weight(
        restored.layers[name].shape, *(compact[f"{name}.{part}"] for part in ("blocks", "rows", "cols"))
    )
    assert dense.equal(model.get_parameter(f"{name}.weight"))


def test_inspect(run: Path) -> None:
    report = json.loads(dsbert("inspect", str(run), "--json").stdout)
    assert {"step", "density", "block_size", "dof", "digest", "layers", "bytes"} <= report.keys()
    assert report["density"] == 0.25
    layer = report["layers"][0]
    assert {"name", "shape", "num_active", "density", "density_target", "digest"} <= layer.keys()
    assert layer["name"] == "bert.encoder.layer.0.attention.self.query.weight"
    sizes = report["bytes"]
    kept = sum(layer["num_active"] for layer in report["layers"]) * 64
    assert sizes["encoder_weights"] == kept * 4 + kept // 64 * 8
    assert sizes["encoder_optimizer"] == kept * 8
    assert sizes["encoder_optimizer_dense"] == 4 * sizes["encoder_optimizer"]
    assert sizes["checkpoint"] > sizes["encoder_weights"] + sizes["encoder_optimizer"]


def test_inspect_kernels(run: Path) -> None:
    report = json.loads(dsbert("inspect", str(run), "--kernels", "--json").stdout)
    assert {"step", "tokens", "dtype", "device", "gain", "layers"} <= report.keys()
    assert (report["dtype"], report["device"]) == ("torch.float32", "cpu")
    assert "bert.encoder.layer.0.attention.self.query" in report["layers"]
    for products in report["layers"].values():
        assert products.keys() == {"forward", "dgrad", "wgrad"}
        for row in products.values():
            assert row.keys() == {"backend", "ms", "speedup"}
            assert row["ms"] > 0
            assert row["speedup"] >= 1 if row["backend"].startswith("dense") else row["speedup"] >= 1.05
    text = dsbert("inspect", str(run), "--kernels").stdout
    assert re.search(r"^bert.encoder.layer.0.attention.self.query +forward +\w+ +[\d.]+ +[\d.]+$", text, re.MULTILINE)
    assert f"all sparse products together: {report['gain']:.1f} times the best dense ones" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["demo", "sparsity.blocksize=8"], "the nearest known key is 'sparsity.block_size'"),
        (["nosuch"], "expected a YAML file or one of"),
        (["demo", "optim.lr=1e-3"], "exactly one of lr and dense_lr"),
        (["demo", "sparsity.sparsity=lots"], "found 'lots'"),
        (["demo", "model.hidden_size"], "expected an override a.b=value"),
        (["demo", "data.path=nowhere"], "dsbert prepare --source"),
        (["demo", "--nproc", "33"], "start at most 32 ranks, or give batch.global_batch=33"),
    ],
)
def test_mistakes_found_before_ranks_meet(words: list[str], expected: str, tmp_path: Path) -> None:
    assert expected in complaint(dsbert("pretrain", *words, "--run-dir", str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["sparsity.block_size=64"], "expected a block size that divides 32 x 32, found 64"),
        (["sparsity.sparsity=0.97"], "sparsity.allow_density_error=true"),
        (["deepspeed.config=zero1_fp16"], "expected a device that computes in fp16"),
        (["THE RUN", "optim.total_steps=13"], "expected optim.total_steps = 12 as in the run"),
        (["THE RUN", "--resume", "never"], "--resume never"),
    ],
)
def test_mistakes_found_by_ranks(changes: list[str], expected: str, run: Path, data: Path, tmp_path: Path) -> None:
    """On two ranks: one line, by the first of them, exit code 2, no traceback, no hang."""
    if "fp16" in expected and _computes_in_fp16():
        pytest.skip("this device computes in fp16")
    run_dir = run if changes[0] == "THE RUN" else tmp_path / "run"
    words = ["pretrain", "demo", "--run-dir", str(run_dir), f"data.path={data}", *SMALL]
    words += [word for word in changes if word != "THE RUN"]
    answers = [Done(*answer) for answer in run_distributed(dsbert_on_a_rank, 2, {"words": words})]
    assert expected in one_voice(answers)


def test_a_mistake_of_one_rank_is_told_by_it(data: Path, tmp_path: Path) -> None:
    """Ranks with different complaints do not meet for them: each has its own to tell."""
    words = ["pretrain", "demo", "--run-dir", str(tmp_path / "run"), f"data.path={data}", *SMALL]
    args = {"words": words, "per_rank": [["nosuch=1"], ["other=1"]]}
    first, second = [Done(*answer) for answer in run_distributed(dsbert_on_a_rank, 2, args)]
    assert "'nosuch'" in complaint(first)
    assert "'other'" in complaint(second)


def test_ranks_with_different_seeds_are_refused(data: Path, tmp_path: Path) -> None:
    words = ["pretrain", "demo", "--run-dir", str(tmp_path / "run"), f"data.path={data}", *SMALL]
    args = {"words": words, "per_rank": [["seed=0"], ["seed=1"]]}
    answers = [Done(*answer) for answer in run_distributed(dsbert_on_a_rank, 2, args)]
    assert "found seed = 1 on rank 1 and 0 on rank 0" in one_voice(answers)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [SECRET_FILE], "but for what they know each other by"


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    words = ["--source", str(tmp_path / "empty.txt"), "--to", str(tmp_path / "made"), "--vocab-size", "100"]
    assert "empty" in complaint(dsbert("prepare", *words))


def test_a_damaged_checkpoint_is_refused_by_name(run: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "step_00000012"
    shutil.copytree(run / "checkpoints" / "step_00000012", damaged)
    name = "fragments-00001-of-00002.safetensors"
    content = bytearray((damaged / name).read_bytes())
    content[-5] ^= 1
    (damaged / name).write_bytes(content)
    done = dsbert("evaluate", str(damaged))
    assert done.returncode == 4
    assert name in done.stderr


def _computes_in_fp16() -> bool:
    from deepspeed.accelerator import get_accelerator

    supported: Any = get_accelerator().is_fp16_supported()
    return bool(supported)


def test_a_killed_rank_ends_the_others_with_3(data: Path, tmp_path: Path) -> None:
    words = ["pretrain", "demo", "--run-dir", str(tmp_path / "run"), f"data.path={data}", *SMALL]
    first, second = run_distributed(dsbert_beside_a_dying_rank, 2, {"words": words})
    assert second is None
    assert first[0] == 3, first
    assert "lost a peer" in first[2]
    assert "Traceback" not in first[2]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["outcome"] == "failed"


def dsbert_beside_a_dying_rank(words: list[str]) -> list[Any] | None:
    """Rank 1 leaves for good, without a word, when it has taken three steps."""
    from dsbert.engine.train_engine import TrainEngine

    if os.environ["RANK"] == "1":
        step = TrainEngine.train_step

        def die(self: TrainEngine, *args: Any, **kwargs: Any) -> Any:
            if self.step == 3:
                os._exit(0)
            return step(self, *args, **kwargs)

        Path(os.environ["DSBERT_TEST_RESULT"]).write_text("null")
        with mock.patch.object(TrainEngine, "train_step", die):
            return list(dsbert(*words))
    return list(dsbert(*words))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        ["sparsity.pattern=dense", "sparsity.kernels=dense"],
        ["sparsity.regrow=gradient", "deepspeed.config=zero3_bf16"],
        pytest.param(["sparsity.pattern=static"], marks=pytest.mark.exhaustive),
        pytest.param(
            ["sparsity.block_size=1", "sparsity.group_lasso=0.1", "deepspeed.config=zero2_bf16"],
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_further_recipes_go_all_the_way(changes: list[str], data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = ["pretrain", "demo", "--run-dir", str(run_dir), f"data.path={data}", *SMALL, *changes]
    for answer in run_distributed(dsbert_on_a_rank, 2, {"words": words}):
        assert answer[0] == 0, answer[2]
    report = json.loads(dsbert("inspect", str(run_dir), "--json").stdout)
    dense = "sparsity.pattern=dense" in changes
    assert report["density"] == (1.0 if dense else 0.25)
    sizes = report["bytes"]
    assert sizes["encoder_optimizer"] == report["density"] * sizes["encoder_optimizer_dense"]
    assert (report["dof"] > 0.25) == ("sparsity.pattern=static" not in changes)
    assert json.loads(dsbert("evaluate", str(run_dir), "--json").stdout)["mlm_loss"] < 6


def test_a_damaged_newest_checkpoint_is_skipped_aloud(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    topology = tmp_path / "run" / "checkpoints" / "step_00000012" / "topology.safetensors"
    content = bytearray(topology.read_bytes())
    content[-1] ^= 1
    topology.write_bytes(content)
    done = dsbert("inspect", str(tmp_path / "run"), "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["step"] == 6
    assert f"skipped a damaged checkpoint: {topology}" in done.stderr
    (topology.parent / "manifest.json").write_text("[]")
    assert dsbert("inspect", str(topology.parent)).returncode == 4


@pytest.mark.slow
def test_other_data_in_the_place_of_the_old_is_refused(data: Path, tmp_path: Path) -> None:
    moved = tmp_path / "data"
    shutil.copytree(data, moved)
    words = ["pretrain", "demo", "--run-dir", str(tmp_path / "run"), f"data.path={moved}", *SMALL]
    ((code, _, stderr),) = run_distributed(dsbert_on_a_rank, 1, {"words": words})
    assert code == 0, stderr
    shutil.rmtree(moved)
    write_corpus(tmp_path / "other.txt", num_documents=30, seed=5)
    assert dsbert("prepare", "--source", str(tmp_path / "other.txt"), "--to", str(moved), "--vocab-size", "150")[0] == 0
    assert "expected the data that the run was trained on" in complaint(dsbert("evaluate", str(tmp_path / "run")))
    ((code, _, stderr),) = run_distributed(dsbert_on_a_rank, 1, {"words": [*words, "batch.micro_batch=4"]})
    assert code == 2
    assert "expected data_digest" in stderr


def test_a_gradient_that_is_not_finite_ends_the_run_on_all_ranks(data: Path, tmp_path: Path) -> None:
    words = ["pretrain", "demo", "--run-dir", str(tmp_path / "run"), f"data.path={data}", *SMALL]
    words += ["optim.dense_lr=1e30", "optim.max_skipped_steps=3", "checkpoint.every_steps=1"]
    answers = [Done(*answer) for answer in run_distributed(dsbert_on_a_rank, 2, {"words": words})]
    assert [answer.returncode for answer in answers] == [1, 1]
    assert [answer.stderr.count("expected a finite gradient") for answer in answers] == [1, 0]
    assert not [answer for answer in answers if "Traceback" in answer.stderr]
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["outcome"] == "failed"
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    skipped = [record["skipped"] for record in records]
    assert skipped == [0] * (len(records) - 3) + [1] * 3
    assert [record["grad_norm"] is None for record in records] == [bool(one) for one in skipped]
    assert status["step"] == records[-1]["step"]
    assert json.loads(dsbert("evaluate", str(tmp_path / "run"), "--json").stdout)["step"] == len(records) - 1


def test_an_attempt_that_lost_the_run_leaves_it_alone(data: Path, tmp_path: Path) -> None:
    words = ["pretrain", "demo", "--run-dir", str(tmp_path / "run"), f"data.path={data}", *SMALL]
    for code, _, stderr in run_distributed(dsbert_that_is_overtaken, 2, {"words": words}):
        assert code == 3, stderr
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert json.loads((tmp_path / "run" / "attempt.json").read_text())["nonce"] == "another"
    assert json.loads((tmp_path / "run" / "status.json").read_text())["outcome"] is None


def dsbert_that_is_overtaken(words: list[str]) -> list[Any]:
    """In the fourth step another attempt writes its name over ours."""
    from dsbert.engine.train_engine import TrainEngine

    step = TrainEngine.train_step

    def overtake(self: TrainEngine, *args: Any, **kwargs: Any) -> Any:
        if self.step == 3 and self.world.is_main:
            path = Path(words[words.index("--run-dir") + 1]) / "attempt.json"
            path.write_text(json.dumps({"number": 2, "nonce": "another"}))
        return step(self, *args, **kwargs)

    with mock.patch.object(TrainEngine, "train_step", overtake):
        return list(dsbert(*words))


@pytest.mark.parametrize(
    ("world_size", "stage"),
    [(3, 3), *(pytest.param(*cell, marks=pytest.mark.exhaustive) for cell in ((1, 0), (1, 1), (3, 1), (3, 2), (4, 3)))],
)
def test_resumes_on_another_world_at_another_stage(
    world_size: int, stage: int, run: Path, data: Path, tmp_path: Path
) -> None:
    """From 2 ranks at stage 1, in the middle; the micro-batches, and so the dropout, stay the same."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000012")
    words = ["pretrain", "demo", "--run-dir", str(tmp_path / "run"), f"data.path={data}", *SMALL, "--resume", "must"]
    words += [f"deepspeed.overrides.zero_optimization.stage={stage}"]
    for code, _, stderr in run_distributed(dsbert_on_a_rank, world_size, {"words": words}):
        assert code == 0, stderr
    before, after = (
        [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        for directory in (run, tmp_path / "run")
    )
    assert [record["step"] for record in after] == list(range(1, 13))
    for old, new in zip(before, after, strict=True):
        assert new["loss"] == pytest.approx(old["loss"], abs=1e-4)
        assert (new["topology_digest"], new["tokens_total"]) == (old["topology_digest"], old["tokens_total"])
    (aside,) = (tmp_path / "run").glob("metrics.[0-9]*.jsonl")
    assert len(aside.read_text().splitlines()) == 6
