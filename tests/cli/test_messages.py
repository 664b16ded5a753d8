"""What the command line says to people: mistakes in one line, help, signals, and what the kernel did."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from dsbert import __version__
from dsbert.training.wandb_mode import wandb_mode
from tests.cluster.test_launcher import PRELUDE
from tests.commands import ENVIRONMENT, SMALL, Done, complaint, dsbert

COMMANDS = ("prepare", "data", "pretrain", "submit", "evaluate", "export", "inspect", "verify", "checkpoints", "diff")


def test_version_and_help() -> None:
    done = dsbert("--version")
    assert (done.returncode, done.stdout) == (0, f"dsbert, version {__version__}\n")
    for command in COMMANDS:
        done = dsbert(command, "-h")
        assert done.returncode == 0
        assert done == dsbert(command, "--help")
        assert re.search(rf"^  Examples:\n    dsbert {command} \S", done.stdout, re.MULTILINE), command


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_can_complete(shell: str) -> None:
    command = [sys.executable, "-c", "from dsbert.cli import main; main()"]
    environment = ENVIRONMENT | {"_DSBERT_COMPLETE": f"{shell}_source"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert "_DSBERT_COMPLETE" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pretrain", "demo", "--nproc"], "requires an argument; see `dsbert"),
        (["pretrain", "demo", "--nproc", "none"], "'none' is not a valid integer"),
        (["pretrain", "demo", "--npro=2"], "--nproc"),
        (["pretrain", "demo", "--nproc", "100000"], "100000 is not in the range 1<=x<=1024"),
        (["pretrain", "demo", "--timeout", "nan"], "nan is no number of seconds"),
        (["pretrain", "demo", "--timeout", "inf"], "inf is not in the range"),
        (["inspect"], "Missing argument 'CHECKPOINT|RUN'; see `dsbert inspect --help`"),
        (["nosuch"], "No such command 'nosuch'"),
        (["pretrain", "demmo"], "do you mean demo?"),
        (["pretrain", "demo", "--run-dir", ""], "expected a path as --run-dir, found none"),
        (["submit", "demo", "--nodes", "1", "--time", "1", "--run-dir="], "expected a path as --run-dir, found none"),
        (["prepare", "--source", "sotu", "--to", ""], "expected a path as --to, found none"),
        (["verify", ""], "expected a path as CHECKPOINT|RUN|DATA, found none"),
        (["diff", "a", ""], "expected a path as A B, found none"),
        (["verify", "/tmp/\udcff"], r"expected arguments and a working directory in UTF-8, found b'/tmp/\xff'"),
        (["pretrain", "demo", "data.path=/tmp/\udcff"], r"found b'data.path=/tmp/\xff'"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], expected: str) -> None:
    assert expected in complaint(dsbert(*words))


def test_a_shell_of_srun_is_told_what_to_unset() -> None:
    step = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}
    with mock.patch.dict(os.environ, step):
        found = complaint(dsbert("pretrain", "demo", "--nproc", "2"))
    assert "as in `srun --pty bash`, unset SLURM_PROCID SLURM_STEP_NUM_TASKS SLURM_LOCALID" in found


def test_missing_data_names_its_own_command_and_what_is_near(data: Path) -> None:
    def missing(path: object) -> str:
        return complaint(dsbert("data", str(path)))

    assert "run: dsbert prepare --source sotu --to nowhere/sotu --vocab-size 2048" in missing("nowhere/sotu")
    assert "--source wikibooks --to x/wikibooks --vocab-size 30522" in missing("x/wikibooks")
    found = missing(data.parent / "other")
    assert f"run: dsbert prepare --source FILE|FOLDER --to {data.parent / 'other'} --vocab-size 30522" in found
    assert f"prepared data near it: {data}" in found
    assert "sotu" not in found


def test_what_ranks_would_find_is_told_at_once_and_once(tmp_path: Path) -> None:
    words = ["pretrain", "demo", "--nproc", "2", "--run-dir", str(tmp_path / "run"), "data.path=nowhere"]
    done = dsbert(*words, "deepspeed.overrides.gradient_cliping=1")
    found = complaint(done)
    assert "the nearest known key is 'gradient_clipping'; no prepared data in nowhere" in found
    assert done.stderr == found + "\n"


def test_inspect_is_for_people(run: Path) -> None:
    done = dsbert("inspect", str(run))
    assert done.returncode == 0
    assert not re.search(r"[{}\[\]]", done.stdout)
    assert re.search(r"^step 12, density 0\.2500, blocks of 8, explored \d+\.\d%$", done.stdout, re.MULTILINE)
    row = r"^bert\.encoder\.layer\.0\.attention\.self\.query\.weight +32x32 +4 +0\.2500 +0\.2500 +[0-9a-f]{16}$"
    assert re.search(row, done.stdout, re.MULTILINE)


def test_a_smaller_vocabulary_is_mentioned(data: Path, tmp_path: Path) -> None:
    words = ["--source", str(data.parent / "corpus.txt"), "--to", str(tmp_path / "made"), "--vocab-size", "30522"]
    done = dsbert("prepare", *words)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^dsbert: --vocab-size 30522 gave \d+ tokens", done.stderr, re.MULTILINE)) == 1
    assert "{" not in done.stdout


def interrupt(words: list[str], metrics: Path) -> Done:
    """Ctrl-C once the run has logged a step."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dsbert", *words], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=180)
    return Done(process.returncode, stdout, stderr)


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_ctrl_c_is_acknowledged_once_and_says_how_to_go_on(nproc: int, data: Path, tmp_path: Path) -> None:
    words = ["pretrain", "demo", "--nproc", str(nproc), "--run-dir", str(tmp_path / "run"), f"data.path={data}", *SMALL]
    words += ["optim.total_steps=1000000", "checkpoint.every_steps=1000000", "eval.every_steps=1000000"]
    done = interrupt(words, tmp_path / "run" / "metrics.jsonl")
    assert done.returncode == 75, done.stderr
    said = [line for line in done.stderr.splitlines() if "SIGINT" in line]
    assert said == [
        "dsbert: SIGINT: saving after this step, then exit code 75; a second Ctrl-C leaves at once, unsaved; to go on: "
        + shlex.join(["dsbert", *words])
    ]


MEMORY_GROUP = Path("/sys/fs/cgroup/memory")
GREEDY = """
open({group!r} + "/cgroup.procs", "w").write(str(os.getpid()))
bytes(bytearray(2**28))
"""
LAUNCHER = """
import sys
from dsbert.cluster.launcher import launch
sys.exit(launch([sys.executable, "-c", sys.argv[1]], 1, less_memory="lower batch.micro_batch (now 32)"))
"""


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group of 64 MB, without swap."""
    group = MEMORY_GROUP / f"dsbert-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(2**26))
    except OSError as error:
        pytest.skip(f"no control group of our own: {error.strerror}")
    yield group
    group.rmdir()


def launched(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, program], env=ENVIRONMENT, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    return done.stderr


def test_the_kernels_memory_killer_is_named(small_group: Path) -> None:
    found = launched(PRELUDE + GREEDY.format(group=str(small_group)))
    assert "was killed by SIGKILL by the kernel, which had no memory left: lower batch.micro_batch (now 32)" in found


def test_a_kill_of_somebody_else_is_not_blamed_on_the_kernel() -> None:
    found = launched(PRELUDE + "os.kill(os.getpid(), signal.SIGKILL)")
    assert "SIGKILL, which the kernel sends where memory runs out, if nobody else did: lower batch.micro_batch" in found


def test_w_and_bs_key_is_found_where_its_login_puts_it(tmp_path: Path) -> None:
    path = tmp_path / ".netrc"
    names = ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC")
    bare = {key: value for key, value in os.environ.items() if key not in names} | {"HOME": str(tmp_path)}

    def mode(**more: str) -> tuple[str, str | None]:
        with mock.patch.dict(os.environ, bare | more, clear=True):
            return wandb_mode()

    assert mode() == ("offline", None)
    path.write_text("machine other.example login user password key\n")
    assert mode() == ("offline", None)
    assert mode(WANDB_BASE_URL="http://other.example:8080/") == ("online", None)
    path.write_text("machine api.wandb.ai\n  login user\n  password key\n")
    assert mode() == ("online", None)
    assert mode(WANDB_MODE="offline") == ("offline", None)
    assert mode(NETRC=str(tmp_path / "nothing")) == ("offline", None)
    assert mode(NETRC=str(tmp_path / "nothing"), WANDB_API_KEY="key") == ("online", None)
    shutil.move(path, tmp_path / "_netrc")
    assert mode() == ("online", None)
    path.write_text("machine api.wandb.ai login user password key nonsense\n")
    found, why = mode()
    assert found == "offline"
    assert why is not None
    assert str(path) in why


def test_a_file_as_data_is_not_to_be_written_over(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("text")
    found = complaint(dsbert("pretrain", "demo", "--run-dir", str(tmp_path / "run"), f"data.path={file}"))
    assert f"expected a directory of prepared data, found the file {file}" in found
    assert "--to" not in found
