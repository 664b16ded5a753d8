"""A stranger's words do not steer the terminal, nor feign lines of ours."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from dsbert.base.errors import printable
from tests.commands import complaint, dsbert

EVIL = "\x1b]0;owned\x07\x1b[2J\u202egnp\u2028\x9b31m\r\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("\x9b\x00\x7f\x85", r"\x9b\x00\x7f\x85"),
        ("one\ntwo\r\tthree", r"one\ntwo\r\tthree"),
        ("\u202e\u2066\u200f\u061c", r"\u202e\u2066\u200f\u061c"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("\udcff\ufeff\U000e0041", r"\udcff\ufeff\U000e0041"),
        ("é 東京 क्\u200dष \xa0\u3000 😀 [red]", "é 東京 क्\u200dष \xa0\u3000 😀 [red]"),
        (r"C:\new \x1b", r"C:\new \x1b"),
    ],
)
def test_what_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(printable(text)) == shown
    printable(text).encode()


def test_several_lines_may_stay() -> None:
    assert printable("a\nb\x1b", lines=True) == "a\nb\\x1b"


def _harmless(text: str) -> bool:
    return re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e]", text) is None


@pytest.mark.parametrize(
    "words",
    [
        ["pretrain", EVIL],
        ["pretrain", "demo", f"data.path={EVIL}"],
        ["pretrain", "demo", f"{EVIL}=1"],
        ["pretrain", "demo", f"sparsity.pattern={EVIL}"],
        ["evaluate", EVIL],
        ["export", EVIL, "--to", "out"],
        ["inspect", EVIL],
        ["verify", EVIL],
        ["checkpoints", EVIL],
        ["diff", EVIL, EVIL],
        ["data", EVIL],
        ["prepare", "--source", EVIL, "--to", "out", "--vocab-size", "100"],
        ["submit", EVIL, "--nodes", "1", "--time", "1:00"],
        [EVIL],
        ["data", "--seq-len", EVIL, "x"],
    ],
    ids=lambda words: " ".join("EVIL" if word == EVIL else word.replace(EVIL, "EVIL") for word in words),
)
def test_a_message_about_a_strangers_name_is_one_harmless_line(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = dsbert(*words)
    assert done.returncode in (2, 4)
    assert "Traceback" not in done.stderr
    assert _harmless(done.stderr), done.stderr
    assert _harmless(done.stdout)


def test_names_in_listings_and_json(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, copy := tmp_path / "run")
    (copy / "checkpoints" / f"step_00000012{EVIL}").mkdir()
    stray = copy / "checkpoints" / "step_00000006" / f"x{EVIL}"
    stray.write_text("")
    for command in ("checkpoints", "verify", "inspect"):
        done = dsbert(command, str(copy))
        assert _harmless(done.stdout), (command, done.stdout)
        assert _harmless(done.stderr), (command, done.stderr)
        as_json = dsbert(command, str(copy), "--json")
        assert _harmless(as_json.stdout), command
        json.loads(as_json.stdout)


def test_words_are_no_markup(tmp_path: Path) -> None:
    """As in the line that a run begins with."""
    from dsbert.base.progress import TrainingBar

    assert "[red]x" in complaint(dsbert("verify", str(tmp_path / "[red]x")))
    bar = TrainingBar(10, 0)
    with bar._console.capture() as shown:
        bar.print(f"[red]loud[/red] :smile: {EVIL}")
    bar.close()
    assert "[red]loud[/red] :smile:" in shown.get()
    assert _harmless(shown.get())
