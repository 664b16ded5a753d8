"""An export is for others: their tools read it, their files stay, and what cannot be written is one line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ENVIRONMENT, SMALL, complaint, dsbert

FILES = {
    "README.md",
    "config.json",
    "model.safetensors",
    "sparse.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
}
LONG = "the cat sees a big house and a dog . " * 40


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("exported") / "out"
    before = os.umask(0o022)
    try:
        done = dsbert("export", str(run), "--to", str(to))
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr
    return to


def _content(directory: Path) -> dict[str, bytes]:
    """But for blocks, whose metadata stands in no fixed order, and the record, which has their checksum."""
    files = {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.is_file()}
    vary = ("sparse.safetensors", "export.json")
    return {name: b"there" if name in vary else path.read_bytes() for name, path in files.items()}


def test_others_may_read_it_and_tools_know_its_limits(exported: Path) -> None:
    import transformers

    assert {path.name for path in exported.iterdir()} == FILES | {"export.json"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in exported.iterdir()} == {0o644}
    assert stat.S_IMODE(exported.stat().st_mode) == 0o755
    record = json.loads((exported / "export.json").read_text())
    assert (record["complete"], set(record["files"])) == (True, FILES)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert tokenizer.model_max_length == 32
    assert len(tokenizer(LONG, truncation=True)["input_ids"]) == 32
    config = transformers.AutoConfig.from_pretrained(exported)
    assert config.pad_token_id == tokenizer.pad_token_id == 0
    assert (config.architectures, config.type_vocab_size, config.hidden_act) == (["BertForPreTraining"], 2, "gelu")
    assert str(config.dtype) == "torch.float32"
    # What a text of any length goes through.
    fill = transformers.pipeline("fill-mask", model=str(exported), tokenizer_kwargs={"truncation": True})
    assert len(fill(f"the [MASK] sees {LONG}")) == 5
    features = transformers.pipeline("feature-extraction", model=str(exported), tokenize_kwargs={"truncation": True})
    assert len(features(LONG)[0]) == 32


def test_an_export_replaces_its_own_files_and_no_others(exported: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, to := tmp_path / "out")
    (to / "README.md").write_text("mine")
    (to / ".git").mkdir()
    (to / ".git" / "HEAD").write_text("ref")
    (to / "finetuned").mkdir()
    (to / "finetuned" / "model.safetensors").write_text("weeks of work")
    # Of an earlier version's export: one file is as it was, one somebody has made his own, one never was there.
    record = json.loads((to / "export.json").read_text())
    for name in ("old.txt", "changed.txt"):
        (to / name).write_text("old")
        record["files"][name] = record["files"]["vocab.txt"]
    from dsbert.base.durable import checksum

    record["files"] |= {
        "old.txt": checksum(to / "old.txt"),
        "gone.txt": "0",
        "../outside.txt": checksum(to / "old.txt"),
    }
    (tmp_path / "outside.txt").write_text("old")
    (to / "export.json").write_text(json.dumps(record))
    (to / "model.safetensors").write_text("of another model")
    expected = _content(to) | _content(exported)
    del expected["old.txt"]
    expected["README.md"] = b"mine"
    done = dsbert("export", str(run), "--to", str(to), "--json")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["files"]) == FILES - {"README.md"} | {"export.json"}
    assert _content(to) == expected
    assert (tmp_path / "outside.txt").read_text() == "old"
    # By a link and from inside, too; and an export of before there was a record.
    (to / "export.json").unlink()
    (link := tmp_path / "link").symlink_to(to)
    assert dsbert("export", str(run), "--to", str(link)).returncode == 0
    assert link.is_symlink()
    assert _content(to) == expected


def _occupied(how: str, to: Path, exported: Path) -> tuple[str, str]:
    """What is given as --to, and what is said."""
    if how == "empty name":
        return "", "expected a path as --to, found none: '' (is a variable unset?)"
    if how == "file":
        to.write_text("mine")
        return str(to), f"expected a directory to export to, found the file {to}: give another --to"
    if how == "below a file":
        to.write_text("mine")
        return f"{to}/x/y", f"expected a directory to export to, found the file {to}: give another --to"
    if how == "fifo":
        os.mkfifo(to)
        return str(to), f"expected a directory to export to, found the file {to}: give another --to"
    to.mkdir()
    if how == "foreign blocks":  # a file of that name is no export yet
        (to / "sparse.safetensors").write_text("mine")
        (to / "thesis.tex").write_text("mine")
        found = "sparse.safetensors, thesis.tex"
    elif how == "foreign record":
        (to / "export.json").write_text("[]")
        shutil.copy(exported / "sparse.safetensors", to)
        found = "export.json, sparse.safetensors"
    elif how == "many":
        for number in range(5):
            (to / str(number)).write_text("mine")
        found = "0, 1, 2 and 2 more"
    else:
        shutil.copytree(exported, to, dirs_exist_ok=True)
        record = json.loads((to / "export.json").read_text())
        del record["files"]["vocab.txt"]
        if how == "directory in the way":
            (to / "vocab.txt").unlink()
            (to / "vocab.txt").mkdir()
        (to / "export.json").write_text(json.dumps(record))
        return str(to), f"expected no vocab.txt of somebody else in {to}, found one: move it, or give another --to"
    return str(to), f"expected a new directory, or an earlier export, at {to}, found {found}: give another --to"


@pytest.mark.parametrize(
    "how",
    [
        "empty name", "file", "below a file", "fifo", "foreign blocks", "foreign record", "many", "foreign file",
        "directory in the way",
    ],
)  # fmt: skip
def test_what_is_in_the_way_is_one_line_and_stays(how: str, exported: Path, run: Path, tmp_path: Path) -> None:
    (place := tmp_path / "place").mkdir()
    to, message = _occupied(how, place / "to", exported)
    before = sorted(place.rglob("*")), _content(place)
    assert complaint(dsbert("export", str(run), "--to", to)).startswith(f"dsbert: {message}")
    assert (sorted(place.rglob("*")), _content(place)) == before


def test_the_working_directory_is_no_export(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("mine")
    assert "found mine: give another --to" in complaint(dsbert("export", str(run), "--to", "."))
    assert os.listdir(tmp_path) == ["mine"]


def test_where_nobody_may_write_is_one_line(run: Path, tmp_path: Path) -> None:
    assert "expected to write an export to /proc/" in complaint(dsbert("export", str(run), "--to", "/proc/nowhere/out"))


KILLED = """
import os, signal, sys
from dsbert.base import durable
from dsbert.hf import export
count = [0]
def dying(temporary, path, publish=durable.publish):
    if count[0] == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    count[0] += 1
    publish(temporary, path)
export.publish = dying
export.export(export.Path(sys.argv[1]), export.Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_an_export_that_was_killed_says_so_and_the_next_one_mends_it(exported: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, to := tmp_path / "out")
    (to / "README.md").write_text("mine")
    expected = _content(to)
    for name in ("model.safetensors", "config.json"):
        (to / name).write_text("of another model")
    for count in (0, 3):
        command = [sys.executable, "-c", KILLED, str(run), str(to), str(count)]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert json.loads((to / "export.json").read_text())["complete"] is (count == 0)
        for name, content in expected.items():
            assert _content(to)[name] in (content, b"of another model")
    assert dsbert("export", str(run), "--to", str(to)).returncode == 0
    assert _content(to) == expected
    assert not list(to.glob(".dsbert-export-*"))


def _with_pad_at(data: Path, place: int, to: Path) -> Path:
    """The data's tokenizer with [PAD] at another id."""
    tokenizer: dict[str, Any] = json.loads((data / "tokenizer" / "tokenizer.json").read_text())
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    tokens.insert(place, tokens.pop(tokens.index("[PAD]")))
    ids = {token: number for number, token in enumerate(tokens)}
    tokenizer["model"]["vocab"] = ids
    for token in tokenizer["added_tokens"]:
        token["id"] = ids[token["content"]]
    for token in tokenizer["post_processor"]["special_tokens"].values():
        token["ids"] = [ids[token["id"]]]
    to.mkdir()
    (to / "tokenizer.json").write_text(json.dumps(tokenizer))
    return to


@pytest.mark.slow
def test_padding_is_what_the_tokenizer_pads_with(data: Path, tmp_path: Path) -> None:
    import transformers

    from tests.text import write_corpus

    write_corpus(tmp_path / "corpus.txt", num_documents=30)
    given = _with_pad_at(data, 76, tmp_path / "given")
    words = [
        "prepare",
        "--source",
        str(tmp_path / "corpus.txt"),
        "--to",
        str(tmp_path / "data"),
        "--tokenizer",
        str(given),
    ]
    assert (done := dsbert(*words)).returncode == 0, done.stderr
    small = [word for word in SMALL if "total_steps" not in word and "num_updates" not in word]
    words = ["pretrain", "demo", "--run-dir", str(tmp_path / "run"), f"data.path={tmp_path / 'data'}", *small]
    done = dsbert(*words, "optim.total_steps=6", "sparsity.num_updates=2")
    assert done.returncode == 0, done.stderr
    assert (done := dsbert("export", str(tmp_path / "run"), "--to", str(tmp_path / "out"))).returncode == 0, done.stderr
    model = transformers.BertForPreTraining.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.pad_token_id == tokenizer.pad_token_id == 76
    assert model.get_input_embeddings().padding_idx == 76
