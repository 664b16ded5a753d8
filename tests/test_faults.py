"""The faults that a run must survive (docs/faults.md): real processes that are killed, stopped, signalled and lied to.

A launch costs seconds, so that most faults are attempts in the life of ONE run, each of which resumes where the one
before has left it; in the end the run must be what it would have been.
"""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.commands import Done, complaint, one_voice
from tests.fault_rows import FaultTable
from tests.faults import attempt, fault, final_files, samples_by_step, status, unlucky_dsbert, wait_for, words_of
from tests.helpers import started

BOTH = None


class Attempt(NamedTuple):
    """One attempt of the life below. starts: the step of the checkpoint that it must resume from. numbers: of the
    faults, as docs/faults.md counts them. before: what is done to the files first."""

    numbers: str
    what: str
    faults: tuple[dict[str, Any], ...]
    codes: tuple[int | None, ...]
    starts: int | None
    culprit: int | None = None
    says: str = ""
    before: Callable[[Path], None] = lambda checkpoints: None


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path, at: float = 0.99) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 16
    path.write_bytes(data)


def _damage_two(checkpoints: Path) -> None:
    _flip(checkpoints / "step_00000006" / "topology.safetensors")
    (checkpoints / "latest").write_text("")


def _leave_rubbish(checkpoints: Path) -> None:
    shutil.copytree(checkpoints / "step_00000003", checkpoints / "step_00000011")
    (checkpoints / "step_00000011" / "manifest.json").unlink()
    shutil.copytree(checkpoints / "step_00000003", checkpoints / ".step_00000003.9-dead.tmp")
    (checkpoints / "latest").write_text("step_00000099 0123\n")


LIFE = [
    Attempt("1", "SIGKILL of a rank at a step", (fault("step", "SIGKILL", rank=1, step=2),), (3, -9), None, 1),
    Attempt(
        "2",
        "SIGKILL of a rank while it writes its shard, SIGTERM to the other",
        (fault("write", "SIGKILL", rank=1, step=3), fault("write", "SIGTERM", rank=0, step=3)),
        (3, -9),
        None,
        1,
    ),
    Attempt(
        "3", "SIGKILL of rank 0 before it publishes", (fault("publish", "SIGKILL", rank=0, step=3),), (-9, 3), None, 0
    ),
    Attempt(
        "3",
        "SIGKILL of rank 0 before it writes `latest`",
        (fault("latest", "SIGKILL", rank=0, step=3),),
        (-9, 3),
        None,
        0,
    ),
    Attempt("4", "SIGSTOP of a rank", (fault("step", "SIGSTOP", rank=1, step=4),), (3, None), 3, 1),
    Attempt(
        "5, 6",
        "SIGTERM to one rank, and again while it saves",
        (fault("step", "SIGTERM", rank=1, step=3), fault("write", "SIGTERM", rank=1, step=5)),
        (75, 75),
        3,
    ),
    Attempt(
        "8, 7",
        "a truncated shard in the newest checkpoint; then SIGUSR1 during an evaluation",
        (fault("evaluate", "SIGUSR1", rank=1, step=6),),
        (75, 75),
        3,
        says="step_00000005/fragments-00001-of-00002.safetensors: expected",
        before=lambda root: _cut(root / "step_00000005" / "fragments-00001-of-00002.safetensors"),
    ),
    Attempt(
        "9, 10, 1",
        "a flipped bit in the newest topology, `latest` empty; then SIGKILL of a rank in the middle of a mask update",
        (fault("update", "SIGKILL", rank=1, step=2),),
        (3, -9),
        3,
        1,
        says="step_00000006/topology.safetensors: the checksum differs",
        before=_damage_two,
    ),
    Attempt(
        "10, 11, 7",
        "`latest` dangling, a partial step directory, a writer's left-overs; then SIGTERM during a mask update",
        (fault("update", "SIGTERM", rank=0, step=2),),
        (75, 75),
        3,
        says="step_00000011/manifest.json: missing",
        before=_leave_rubbish,
    ),
    Attempt(
        "10, 12",
        "`latest` missing; then a full disk on one rank",
        (fault("step", "full", rank=1, step=8),),
        (74, 74),
        6,
        1,
        says="could not write the checkpoint",
        before=lambda root: (root / "latest").unlink(),
    ),
    Attempt(
        "12",
        "a full disk under metrics.jsonl",
        (fault("step", "no room", rank=0, step=7),),
        (74, 3),
        6,
        0,
        says="metrics.jsonl: File too large; checkpoints are intact",
    ),
    Attempt(
        "15",
        "an entry of the topology flipped on one rank",
        (fault("step", "flip", rank=1, step=8),),
        (3, 3),
        6,
        1,
        says="expected kernels and mask manager to hold one topology",
    ),
    Attempt(
        "-", "an error on one rank alone", (fault("step", "fail", rank=1, step=8),), (3, 1), 6, 1, says="no more memory"
    ),
    Attempt("-", "Ctrl-C", (fault("step", "SIGINT", rank=BOTH, step=8),), (75, 75), 6),
    Attempt("18", "nothing: resumed once more, to the end; each sample was trained on once", (), (0, 0), 9),
]


@pytest.mark.slow
def test_a_life_full_of_faults_ends_like_an_undisturbed_one(
    run: Path, data: Path, tmp_path: Path, fault_table: FaultTable
) -> None:
    run_dir, record = tmp_path / "run", tmp_path / "record"
    record.mkdir()
    checkpoints = run_dir / "checkpoints"
    rows = []
    for number, one in enumerate(LIFE):
        one.before(checkpoints)
        ended = attempt(
            words_of(run_dir, data), *one.faults, record=record, env={"DSBERT_TEST_ATTEMPT": str(number)}, timeout=90
        )
        label = f"attempt {number}: {one.what}\n" + "\n".join(rank.stderr for rank in ended)
        assert tuple(rank.code for rank in ended) == one.codes, label
        everything = "".join(rank.stderr for rank in ended)
        assert one.says in everything, label
        if one.codes != (74, 74):
            assert "Traceback" not in everything.replace("MemoryError", "") or "no more memory" in everything, label
        history = [json.loads(line) for line in (run_dir / "attempts.jsonl").read_text().splitlines()]
        starts = history[-1]["checkpoint"]
        assert starts == (f"step_{one.starts:08d}" if one.starts else None), label
        assert len(history) == number + 1
        found = status(run_dir)
        if one.culprit is not None:
            assert found["culprit"]["rank"] == one.culprit, label
            assert found["culprit"]["host"], label
            assert f"rank {one.culprit} on {found['culprit']['host']}" in everything, label
            assert found["outcome"] == "failed"
        else:
            assert found["outcome"] == ("done" if one.codes == (0, 0) else "requeue"), label
        survivors = [rank.seconds for rank in ended if rank.code not in (None, -9)]
        rows.append(fault_table.row(one.numbers, one.what, max(survivors), one.codes, found["culprit"]))
    assert final_files(run_dir) == final_files(run)
    assert list(checkpoints.glob("step_00000006.damaged-*")), "what was damaged is moved aside, not overwritten"
    assert not list(checkpoints.glob(".*")), "nothing is left of writers that were killed"
    samples = samples_by_step(record)
    assert sorted(samples) == list(range(1, 13))
    for step, taken in samples.items():
        assert sorted(taken) == list(range((step - 1) * 12, step * 12)), f"step {step} must take its samples once"
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13))
    assert len(json.loads((run_dir / "attempts.jsonl").read_text().splitlines()[1])["previous"]["cause"]) > 10
    fault_table.identical(rows)


@pytest.mark.slow
def test_resumed_on_2_then_4_3_and_1_ranks_at_stages_1_3_2_and_1(
    run: Path, data: Path, tmp_path: Path, fault_table: FaultTable
) -> None:
    run_dir, record = tmp_path / "run", tmp_path / "record"
    record.mkdir()
    start = time.time()
    for number, (world_size, stage, stop) in enumerate(((2, 1, 1), (4, 3, 4), (3, 2, 7), (1, 1, None))):
        words = words_of(run_dir, data, f"deepspeed.overrides.zero_optimization.stage={stage}")
        faults = [] if stop is None else [fault("step", "SIGUSR2", rank=0, step=stop)]
        ended = attempt(
            words, *faults, world_size=world_size, record=record, env={"DSBERT_TEST_ATTEMPT": str(number)}, timeout=120
        )
        assert {rank.code for rank in ended} == {75 if faults else 0}, "\n".join(rank.stderr for rank in ended)
    before, after = (
        [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        for directory in (run, run_dir)
    )
    for old, new in zip(before, after, strict=True):
        assert new["loss"] == pytest.approx(old["loss"], abs=1e-4)
        assert (new["topology_digest"], new["tokens_total"]) == (old["topology_digest"], old["tokens_total"])
    for step, taken in samples_by_step(record).items():
        assert sorted(taken) == list(range((step - 1) * 12, step * 12))
    largest = max(abs(new["loss"] - old["loss"]) for old, new in zip(before, after, strict=True))
    what = f"resume on 2 -> 4 -> 3 -> 1 ranks, ZeRO 1 -> 3 -> 2 -> 1: losses within {largest:.0e}, equal digests"
    fault_table.row("13", what, time.time() - start, (75, 75, 75, 0), None)


@pytest.mark.exhaustive
def test_bf16_on_another_world_stays_close(data: Path, tmp_path: Path) -> None:
    """The digest agrees up to the first later update (paper, algorithm 1: equal weights give equal decisions)."""
    words = ["deepspeed.config=zero1_bf16"]
    for name, stop in (("straight", None), ("resumed", 3)):
        faults = [] if stop is None else [fault("step", "SIGTERM", rank=0, step=stop)]
        ended = attempt(words_of(tmp_path / name, data, *words), *faults)
        assert {rank.code for rank in ended} == {75 if faults else 0}, ended[0].stderr
    stage = "deepspeed.overrides.zero_optimization.stage=3"
    ended = attempt(words_of(tmp_path / "resumed", data, *words, stage), world_size=3, timeout=120)
    assert {rank.code for rank in ended} == {0}, ended[0].stderr
    before, after = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("straight", "resumed")
    )
    for old, new in zip(before, after, strict=True):
        assert new["loss"] == pytest.approx(old["loss"], abs=2e-2)
    assert [new["topology_digest"] for new in after[:5]] == [old["topology_digest"] for old in before[:5]]


def test_the_second_ctrl_c_leaves_at_once(data: Path, tmp_path: Path) -> None:
    interrupts = [fault(where, "SIGINT", step=step) for where, step in (("step", 3), ("write", 5))]
    ended = attempt(words_of(tmp_path / "run", data), *interrupts)
    assert [rank.code for rank in ended] == [130, 130], ended[0].stderr
    assert not (tmp_path / "run" / "checkpoints" / "step_00000005").exists()


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, pytest.param(None, marks=pytest.mark.exhaustive)])
def test_a_rank_that_lives_but_does_not_go_on(
    who: int | None, data: Path, tmp_path: Path, fault_table: FaultTable
) -> None:
    """Rank 0 alone: the other's collective ends by itself. Both: none waits, and the heartbeats' threads see."""
    args = {
        "words": words_of(tmp_path / "run", data),
        "faults": [fault("step", "hang", rank=who, step=4)],
        "record": None,
    }
    with started(unlucky_dsbert, 2, args) as ranks:
        ended = wait_for(ranks, {who}, 40 + 30)
    codes = [rank.code for rank in ended]
    assert codes == ([None, 3] if who == 0 else [3, 3]), ended[0].stderr
    assert max(rank.seconds for rank in ended) < 10 + 30
    found = status(tmp_path / "run")
    assert found["outcome"] == "failed"
    assert found["culprit"]["rank"] == 0
    if who == 0:
        assert "rank 0 on" in ended[1].stderr
        assert "see to the network" not in ended[1].stderr
        fault_table.row("4", "rank 0 lives but does not go on", ended[1].seconds, ["hangs", 3], found["culprit"])


def test_who_waited_in_vain_is_not_who_was_waited_for(tmp_path: Path) -> None:
    from dsbert.cluster.health import Heartbeat

    beats = [Heartbeat(tmp_path, rank, ["a", "b", "c"], 1.0) for rank in range(3)]
    for beat in beats:
        beat.start()
        beat.enter("train")
        beat.advance(4)
    for beat in beats[1:]:
        beat.leave()
    assert [(one.rank, one.host, one.step) for one in beats[1].culprits()] == [(0, "a", 4)]
    assert beats[0].culprits() == [], "by its own watchdog: it has not waited for anybody"
    beats[0].leave()
    assert beats[1].culprits() == [], "all have waited: the network"
    for beat in beats:
        beat.end(3)


def test_a_loss_that_is_not_a_number_on_one_rank_skips_the_step_on_all(
    data: Path, tmp_path: Path, fault_table: FaultTable
) -> None:
    start = time.time()
    ended = attempt(words_of(tmp_path / "run", data), fault("step", "nan", rank=1, step=4))
    assert [rank.code for rank in ended] == [0, 0], ended[0].stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["skipped"] for record in records] == [int(step == 5) for step in range(1, 13)]
    assert records[4]["loss"] is None
    assert all(record["loss"] for record in records[5:])
    fault_table.row("16", "NaN in the loss of one rank: the step is skipped on all", time.time() - start, (0, 0), None)


def test_a_run_directory_that_is_not_shared_is_refused(data: Path, tmp_path: Path, fault_table: FaultTable) -> None:
    start = time.time()
    words = words_of(tmp_path / "here", data)
    args = {"words": words, "faults": [], "record": None}
    with started(unlucky_in_another_place, 2, args | {"elsewhere": str(tmp_path / "there")}) as ranks:
        ended = wait_for(ranks, set(), 60)
    for rank in ended:  # each: they have not met, and do not believe each other
        line = complaint(Done(rank.code or 0, "", rank.stderr))
        assert "run directory is not shared: rank 1 on" in line
        assert f"does not see in {tmp_path / 'there'} what rank 0" in line
    fault_table.row("14, 22", "ranks with different run directories", time.time() - start, (2, 2), {"rank": 1})


def unlucky_in_another_place(elsewhere: str, words: list[str], **more: Any) -> None:
    """Rank 1 is told another run directory."""
    import os

    if os.environ["RANK"] == "1":
        words = [*words]
        words[words.index("--run-dir") + 1] = elsewhere
    unlucky_dsbert(words, **more)


def test_where_no_checkpoint_is_whole_nothing_starts_from_scratch(run: Path, data: Path, tmp_path: Path) -> None:
    ended = attempt([*words_of(tmp_path / "none", data), "--resume", "must"])
    assert "expected a valid checkpoint in" in one_voice([Done(rank.code or 0, "", rank.stderr) for rank in ended], 4)
    shutil.copytree(run, tmp_path / "run")
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))
    for path in checkpoints:
        _cut(path / "topology.safetensors")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    ended = attempt(words_of(tmp_path / "run", data))
    assert [rank.code for rank in ended] == [4, 4], ended
    assert [rank.stderr.count("found none: remove the directory to start again") for rank in ended] == [1, 0]
    assert sorted((tmp_path / "run" / "checkpoints").glob("step_*")) == checkpoints
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    for path in checkpoints:  # as a site that purges old files may leave it
        shutil.rmtree(path)
    assert status(tmp_path / "run")["step"] == 12, "there is something to be lost"
    for rank in attempt(words_of(tmp_path / "run", data)):
        assert rank.code == 4, rank.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("damage", [b"\0" * 300 + b"\n", b"[]\n", b"null\n", b"{}\n", b"[" * 200_000 + b"\n"])
def test_damaged_records_do_not_hold_up_the_next_attempt(damage: bytes, data: Path, tmp_path: Path) -> None:
    """What is needed to go on stands in the checkpoints; the records beside them are for people."""
    from dsbert.training.run_directory import RunDirectory
    from tests.workbench import recipe

    directory, small = RunDirectory(tmp_path), recipe(data={"path": str(data)})
    for nonce in ("first", "second"):
        directory.mark(nonce)
        directory.open_attempt(small, {}, None, nonce, 1)
    for name in ("attempts.jsonl", "attempt.json", "status.json"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() * (name == "attempts.jsonl") + damage)
    directory.mark("third")
    third = directory.open_attempt(small, {}, None, "third", 1)
    assert (third.number, third.previous) == (3, None)
    assert directory.owns(third)
    assert not directory.has_ended(third)
    directory.set_status(third, "failed", 5)
    assert directory.has_ended(third)
    assert [path.name for path in (tmp_path / "heartbeats").iterdir()] == ["third"]


def test_a_corrupt_data_shard_is_refused_on_all_ranks(data: Path, tmp_path: Path, fault_table: FaultTable) -> None:
    shutil.copytree(data, tmp_path / "data")
    (shard,) = (tmp_path / "data").glob("train-*.arrow")
    _flip(shard, 0.4)  # among the tokens: nothing but the checksum can tell
    start = time.time()
    ended = attempt(words_of(tmp_path / "run", tmp_path / "data"))
    assert shard.name in one_voice([Done(rank.code or 0, "", rank.stderr) for rank in ended], 4)
    fault_table.row("17", "a flipped bit in a data shard", time.time() - start, (4, 4), None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("notices", "changes"),
    [
        ("at a log step", ()),
        ("on rank 0 alone, at an update", ("log.every_steps=100", "eval.every_steps=100")),
        ("when its files are gone", ("log.every_steps=100", "eval.every_steps=100", "checkpoint.every_steps=1")),
    ],
)
def test_of_two_live_attempts_the_older_one_leaves(
    notices: str, changes: tuple[str, ...], run: Path, data: Path, tmp_path: Path, fault_table: FaultTable
) -> None:
    """As after the death of a slurmd: its tasks live on beside those of the job's next attempt."""
    run_dir = tmp_path / "run"
    words = words_of(run_dir, data, "checkpoint.max_mb_per_s=0.01", *changes)
    waits = {"words": words, "faults": [fault("step", "wait to be overtaken", step=4)], "record": None}
    with started(unlucky_dsbert, 2, waits, env={"DSBERT_TEST_RUN": str(run_dir)}) as older:
        _wait_until(lambda: all(rank.result.exists() for rank in older))
        nonce = json.loads((run_dir / "attempt.json").read_text())["nonce"]
        start = time.time()
        newer = attempt(words, timeout=90)
        ended = wait_for(older, set(), 30)
    assert [rank.code for rank in newer] == [0, 0], newer[0].stderr
    assert [rank.code for rank in ended] == [3, 3], ended[0].stderr
    for rank in ended:
        said = [line for line in rank.stderr.splitlines() if line.startswith("dsbert: expected attempt 1 to own")]
        assert len(said) == 1 or (rank is not ended[0] and not said), f"{notices}: {rank.stderr}"
        assert all(line.endswith("this one leaves") for line in said)
        assert "heartbeat" not in rank.stderr, "nobody is accused of what the next attempt has removed"
    owner = json.loads((run_dir / "attempt.json").read_text())
    assert owner["nonce"] != nonce
    for path in (run_dir / "checkpoints").glob("step_*"):
        if path.name < "step_00000004":
            continue  # before it was overtaken
        published_by = json.loads((path / "manifest.json").read_text())["attempt"]
        assert published_by == f"2-{owner['nonce']}"
    assert status(run_dir)["outcome"] == "done"
    assert final_files(run_dir) == final_files(run)
    row = fault_table.row("21", "two live attempts on one run directory", time.time() - start, (3, 3), None)
    fault_table.identical([row])


def test_what_the_attempt_before_publishes_last_is_not_lost(run: Path, data: Path, tmp_path: Path) -> None:
    """It may until the run is claimed, and the next attempt has looked for a checkpoint before that."""
    run_dir, late = tmp_path / "run", tmp_path / "step_00000012"
    shutil.copytree(run, run_dir)
    (run_dir / "checkpoints" / late.name).rename(late)
    env = {"DSBERT_TEST_LATE": str(late), "DSBERT_TEST_RUN": str(run_dir)}
    ended = attempt(words_of(run_dir, data), fault("claim", "publish a late one", rank=0), env=env)
    assert [rank.code for rank in ended] == [0, 0], ended[0].stderr
    assert f"resuming from {run_dir}/checkpoints/{late.name}" in ended[0].stderr


@pytest.mark.slow
def test_a_wandb_server_that_never_answers_slows_no_step(
    run: Path, data: Path, tmp_path: Path, fault_table: FaultTable
) -> None:
    """It accepts, and that is all. The run saves, says nothing of W&B but one line, and leaves."""
    pytest.importorskip("wandb")
    run_dir = tmp_path / "run"
    with _mute_server() as (port, connections):
        env = {"WANDB_MODE": "online", "WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "0" * 40}
        words = words_of(run_dir, data, "log.wandb=true", "optim.total_steps=400", "checkpoint.every_steps=200")
        faults = [fault("from step", "slow", step=8), fault("step", "SIGTERM", rank=0, step=16)]
        start = time.time()
        ended = attempt(words, *faults, env=env)
    assert [rank.code for rank in ended] == [75, 75], ended[0].stderr
    assert connections, "W&B has not even tried"
    assert ended[0].stderr.count("W&B:") <= 1
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    slowest = max(record["step_s"] for record in records[9:])  # half a second of each is sleep; W&B waits for many
    assert slowest < 3
    fault_table.row("20", "a W&B server that accepts and never answers", time.time() - start, (75, 75), None)


@contextmanager
def _mute_server() -> Iterator[tuple[int, list[socket.socket]]]:
    connections: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connections.append(server.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield server.getsockname()[1], connections
        finally:
            for connection in connections:
                connection.close()


def _wait_until(condition: Callable[[], bool], timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
