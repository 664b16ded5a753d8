"""Both forms of an export: what their directories hold, their cards, and the way to the hub."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.commands import complaint, dsbert
from tests.hub_server import hub

TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "vocab.txt"}
FILES = {
    "sparse": {"config.json", "model.safetensors", "README.md", *TOKENIZER},
    "dense": {"config.json", "model.safetensors", "README.md", "sparse.safetensors", *TOKENIZER},
}


def exported(run: Path, to: Path, form: str, *more: str) -> dict[str, Any]:
    before = os.umask(0o022)
    try:
        done = dsbert("export", str(run), "--to", str(to), "--form", form, "--json", *more)
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_sparse_form_is_a_directory_without_a_dense_weight(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from dsbert.checkpoint.restore import restore_model

    found = exported(run, tmp_path / "out", "sparse")
    assert set(found["files"]) == FILES["sparse"] | {"export.json"}
    paths = list((tmp_path / "out").iterdir())
    assert {path.name for path in paths} == FILES["sparse"] | {"export.json"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o644}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["pad_token_id"], config["kernels"]) == ("dsbert", 0, "auto")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["model_max_length"] == 32
    tensors, restored = load_file(tmp_path / "out" / "model.safetensors"), restore_model(run)
    for name, layer in restored.layers.items():
        assert f"{name}.weight" not in tensors
        assert tensors[f"{name}.blocks"].equal(layer.blocks)
        assert tensors[f"{name}.rows"].equal(layer.rows)
    # The other form in its place: its own files go, and those of others stay.
    (tmp_path / "out" / "mine.txt").write_text("mine")
    exported(run, tmp_path / "out", "dense")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES["dense"] | {"export.json", "mine.txt"}
    exported(run, tmp_path / "out", "sparse")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES["sparse"] | {"export.json", "mine.txt"}


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_the_card_says_what_the_model_is(form: str, run: Path, tmp_path: Path) -> None:
    import yaml

    exported(run, tmp_path, form)
    head, text = (tmp_path / "README.md").read_text().removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(head)["library_name"] == "transformers"
    lines = (line.strip("|").split("|") for line in text.splitlines() if line.startswith("| "))
    rows = {line[0].strip(): line[1].strip() for line in lines}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(record for record in reversed(records) if record["val_mlm_loss"] is not None)
    assert rows["masked tokens, nats per token"] == f"{last['val_mlm_loss']:.4f}"
    assert rows["next sentence, nats per pair"] == f"{last['val_nsp_loss']:.4f}"
    assert rows["held-out text, measured at step"] == "12"
    total, dense = last["flops_total"], last["flops_dense_total"]
    assert rows["FLOPs of encoder and attention"] == f"{total:.4g}, {total / dense:.3f} of the dense model's"
    assert (rows["blocks"], rows["steps"]) == ("8 x 8, sparsity 0.75", "12 of 12, of 12 samples")
    assert rows["sources"] == "corpus.txt"
    assert len(rows["digest"]) == 32
    assert ("import dsbert.hf" in text) == (form == "sparse")
    assert ("BertForPreTraining.from_pretrained" in text) == (form == "dense")
    assert str(run.parent) not in text


def test_a_card_that_somebody_has_written_stays(run: Path, tmp_path: Path) -> None:
    exported(run, tmp_path / "out", "sparse")
    card = tmp_path / "out" / "README.md"
    as_written = card.read_text()
    card.write_text(as_written.replace("# demo", "# My model"))
    changed = card.read_text()
    assert changed != as_written
    for form in ("sparse", "dense"):
        assert "README.md" not in exported(run, tmp_path / "out", form)["files"]
        assert card.read_text() == changed
    card.unlink()
    exported(run, tmp_path / "out", "sparse")
    assert card.read_text() == as_written
    # Also where an export was killed on its way: what it left of its card is not somebody's.
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    record["files"]["README.md"] = "0" * 32
    (tmp_path / "out" / "export.json").write_text(json.dumps(record | {"complete": False}))
    exported(run, tmp_path / "out", "dense")
    assert "BertForPreTraining" in card.read_text()
    (tmp_path / "out" / "export.json").unlink()
    exported(run, tmp_path / "out", "sparse")
    assert card.read_text() == as_written


def test_an_export_goes_to_the_hub(run: Path, tmp_path: Path) -> None:
    to = tmp_path / "out"
    with hub() as server:
        found = exported(run, to, "sparse", "--push-to-hub", "somebody/small-bert", "--private")
        assert found["commit"] == f"{server.url}/somebody/small-bert/commit/{'0' * 40}"
        (to / "README.md").write_text("---\nlicense: mit\n---\nmy words")
        (to / "mine.txt").write_text("mine")
        exported(run, to, "sparse", "--push-to-hub", "small-bert")
    assert server.repositories["somebody/small-bert"]["visibility"] == "private"
    (name, summary, first), (_, _, second) = server.commits
    assert (name, summary) == ("somebody/small-bert", "demo at step 12")
    assert first.keys() == second.keys() == FILES["sparse"]
    assert first["model.safetensors"] == (to / "model.safetensors").read_bytes()
    assert second["README.md"].endswith(b"my words")


def test_what_the_hub_refuses_is_one_line(run: Path, tmp_path: Path) -> None:
    to = tmp_path / "out"
    words = ["export", str(run), "--to", str(to), "--push-to-hub"]
    assert "expected NAME or OWNER/NAME for --push-to-hub, found 'a/b/c': " in complaint(dsbert(*words, "a/b/c"))
    assert not to.exists()
    with hub(token=None) as server:
        line = complaint(dsbert(*words, "somebody/small-bert"))
        assert f"expected the hub to take {to} as somebody/small-bert, found HfHubHTTPError: " in line
        assert "give HF_TOKEN" in line
        assert (to / "model.safetensors").exists()
    assert not server.commits
    with hub() as server:
        server.server_close()
        line = complaint(dsbert(*words, "somebody/small-bert"))
        # Refused, or reset where it had come in before.
        assert re.search("found (Connect|Read|Write|RemoteProtocol)Error: ", line)
