"""A checkpoint from a stranger: its manifest is right, its files are pickles that would run code. None may run."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsbert.base.durable import checksum
from tests.commands import dsbert


class _Bomb:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def _pickled(trace: Path) -> bytes:
    return pickle.dumps(_Bomb(trace))


def _torch_saved(trace: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weights": _Bomb(trace)}, buffer)
    return buffer.getvalue()


def _numpy_object(trace: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([_Bomb(trace)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("file", "make"),
    [
        ("fragments-00000-of-00002.safetensors", _torch_saved),
        ("topology.safetensors", _pickled),
        ("unigram.npy", _numpy_object),
        ("tokenizer/tokenizer.json", _pickled),
        ("state.json", _pickled),
    ],
)
def test_no_file_of_a_checkpoint_is_unpickled(file: str, make: Any, run: Path, tmp_path: Path) -> None:
    trace = tmp_path / "code has run"
    path = tmp_path / "run" / "checkpoints" / "step_00000012"
    shutil.copytree(run, tmp_path / "run")
    (path / file).write_bytes(make(trace))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][file] = {"bytes": (path / file).stat().st_size, "xxh3": checksum(path / file)}
    (path / "manifest.json").write_text(json.dumps(manifest))
    for command in (
        ["evaluate", str(path)],
        ["inspect", str(path)],
        ["verify", str(path)],
        ["diff", str(path), str(path)],
        ["export", str(path), "--to", str(tmp_path / "out")],
    ):
        done = dsbert(*command)
        assert not trace.exists(), command
        assert "Traceback" not in done.stderr, (command, done.stderr)
        assert done.returncode in (0, 2, 4), (command, done)  # 0: the command does not need this file
    assert dsbert("verify", str(path)).returncode == (0 if "tokenizer" in file or "unigram" in file else 4)


def test_no_file_outside_of_a_checkpoint_is_read(run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("a secret")
    shutil.copytree(run / "checkpoints" / "step_00000012", path := tmp_path / "step_00000012")
    (path / "tokenizer" / "link").symlink_to(outside)  # in no manifest: nobody may hand it on
    assert dsbert("export", str(path), "--to", str(tmp_path / "out")).returncode == 0
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not (tmp_path / "out" / "link").exists()
    text = (path / "manifest.json").read_text()
    for name in ("../outside", str(outside)):
        manifest = json.loads(text)
        manifest["files"][name] = {"bytes": outside.stat().st_size, "xxh3": checksum(outside)}
        (path / "manifest.json").write_text(json.dumps(manifest))
        for command in ("evaluate", "inspect", "verify"):
            done = dsbert(command, str(path))
            assert done.returncode == 4, done
            assert "expected names of files in the checkpoint" in done.stdout + done.stderr


def test_the_bombs_are_live(tmp_path: Path) -> None:
    """Or the test above could not fail."""
    for number, make in enumerate((_pickled, _torch_saved, _numpy_object)):
        trace = tmp_path / str(number)
        data = io.BytesIO(make(trace))
        if make is _torch_saved:
            torch.load(data, weights_only=False)
        elif make is _numpy_object:
            np.load(data, allow_pickle=True)
        else:
            pickle.load(data)
        assert trace.exists()
