"""Runs whose ranks come to harm at a chosen place: real processes, real signals, full stops in the middle of things."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from tests.commands import SMALL
from tests.helpers import Rank, started


class Ended(NamedTuple):
    """code: None if the rank had to be killed by the test. seconds: from the harm done (or the start) to the end."""

    code: int | None
    stderr: str
    seconds: float


def fault(where: str, what: str, *, rank: int | None = None, step: int = 0) -> dict[str, Any]:
    """Do `what` (a signal's name, or a key of `_DEEDS`) on `rank` (None: all) at a place of `_PLACES`, at its step."""
    return {"where": where, "what": what, "rank": rank, "step": step}


def words_of(run_dir: Path, data: Path, *changes: str) -> list[str]:
    """The command line of a small run: twelve steps, updates after 3, 6 and 9."""
    words = ["pretrain", "demo", "--run-dir", str(run_dir), "--timeout", "10", f"data.path={data}", *SMALL]
    return [*words, "eval.every_steps=3", "checkpoint.every_steps=3", *changes]


def attempt(
    words: list[str],
    *faults: dict[str, Any],
    world_size: int = 2,
    record: Path | None = None,
    timeout: float = 60.0,
    env: dict[str, str] | None = None,
) -> list[Ended]:
    """Run `dsbert WORDS` on ranks with faults until all have ended that can; those that are stopped are then killed."""
    args = {"words": words, "faults": list(faults), "record": str(record) if record else None}
    with started(unlucky_dsbert, world_size, args, env=env) as ranks:
        return wait_for(ranks, {one["rank"] for one in faults if one["what"] in ("SIGSTOP", "hang")}, timeout)


def wait_for(ranks: list[Rank], lost: set[int | None], timeout: float) -> list[Ended]:
    """Until every rank but the lost ones has ended."""
    start, ends = time.time(), {}
    while time.time() - start < timeout:
        for rank in ranks:
            if rank.exitcode is not None and rank.number not in ends:
                ends[rank.number] = time.time()
        if {rank.number for rank in ranks} - lost <= ends.keys():
            break
        time.sleep(0.02)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    harmed = min((os.stat(rank.result).st_mtime for rank in ranks if rank.result.exists()), default=start)
    return [
        Ended(code, rank.output, ends.get(rank.number, time.time()) - harmed)
        for rank, code in zip(ranks, codes, strict=True)
    ]


def unlucky_dsbert(words: list[str], faults: list[dict[str, Any]], record: str | None) -> None:
    """A rank: leaves with the command's exit code."""
    from dsbert.cli import app

    own = [one for one in faults if one["rank"] in (None, int(os.environ["RANK"]))]
    for one in own:  # each on top of the one before
        _PLACES[one["where"]](one["step"], _deed(one["what"]))()
    if record:
        _record_samples(Path(record))()
    sys.exit(app.run(words))


def final_files(run_dir: Path, step: int = 12) -> dict[str, bytes]:
    """The state of a run at a step, as bytes: weights, moments, topology."""
    directory = run_dir / "checkpoints" / f"step_{step:08d}"
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


def status(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
    return found


def samples_by_step(record: Path) -> dict[int, list[int]]:
    """Of every step the samples that the last attempt which took it has trained on, over all ranks."""
    taken: dict[int, dict[str, list[int]]] = {}
    for path in sorted(record.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            taken.setdefault(entry["step"], {}).setdefault(entry["attempt"], []).extend(entry["samples"])
    return {step: attempts[max(attempts, key=float)] for step, attempts in taken.items()}


# What is done


def _deed(what: str) -> Callable[..., object]:
    if what.startswith("SIG"):
        return lambda *_: (_mark(), os.kill(os.getpid(), getattr(signal, what)))
    deed = _DEEDS[what]
    return lambda *args: (_mark(), deed(*args))


def _mark() -> None:
    Path(os.environ["DSBERT_TEST_RESULT"]).write_text("null")


def _limit_files(nbytes: int) -> Callable[..., None]:
    """No file may grow beyond it: what a full disk does to a process."""
    return lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))


def _fail(*_: Any) -> None:
    raise MemoryError("no more memory, says the test")


def _flip_an_entry(engine: Any) -> None:
    layer = next(iter(engine.layers.values()))
    layer.cols[0] = (layer.cols[0] + 1) % (layer.shape[1] // layer.block_size)


def _spoil_the_loss(engine: Any) -> None:
    module = engine.deepspeed_engine.module
    handle: Any = module.register_forward_hook(
        lambda _module, _args, output: (handle.remove(), (output[0] * float("nan"), output[1]))[1]
    )


def _wait_to_be_overtaken(engine: Any) -> None:
    """Until another attempt owns the run; the rank goes on saying that it lives."""
    path = Path(os.environ["DSBERT_TEST_RUN"]) / "attempt.json"
    own = path.read_bytes()
    while path.read_bytes() == own:
        engine.on_progress()
        time.sleep(0.02)


def _publish_a_late_one(*_: Any) -> None:
    """What the attempt before had under way appears."""
    late = Path(os.environ["DSBERT_TEST_LATE"])
    late.rename(Path(os.environ["DSBERT_TEST_RUN"]) / "checkpoints" / late.name)


def _linger(*_: Any) -> None:
    """Long enough for the test to stop all ranks here."""
    with Path(os.environ["DSBERT_TEST_LINGERS"]).open("a") as file:
        file.write("here\n")
    time.sleep(0.5)


_DEEDS: dict[str, Callable[..., object]] = {
    "full": _limit_files(20_000),
    "no room": _limit_files(2_000),
    "hang": lambda *_: time.sleep(1000),
    "fail": _fail,
    "flip": _flip_an_entry,
    "nan": _spoil_the_loss,
    "wait to be overtaken": _wait_to_be_overtaken,
    "publish a late one": _publish_a_late_one,
    "linger": _linger,
    "slow": lambda *_: time.sleep(0.5),
}


# Where


def _around(owner: Any, name: str, before: Callable[..., object]) -> Callable[[], object]:
    """A patch for the life of the process: `before(*args)` ahead of every call."""
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        before(*args)
        return original(*args, **kwargs)

    return lambda: mock.patch.object(owner, name, call).start()


def _at_step(step: int, deed: Callable[..., object]) -> Callable[[], object]:
    from dsbert.engine.train_engine import TrainEngine

    return _around(TrainEngine, "train_step", lambda engine, *_: deed(engine) if engine.step == step else None)


def _from_step(step: int, deed: Callable[..., object]) -> Callable[[], object]:
    from dsbert.engine.train_engine import TrainEngine

    return _around(TrainEngine, "train_step", lambda engine, *_: deed(engine) if engine.step >= step else None)


def _while_writing(step: int, deed: Callable[..., object]) -> Callable[[], object]:
    from dsbert.checkpoint import writer

    def half(path: Path, data: memoryview, *_: Any) -> None:
        if f"{step:08d}" in path.parent.name and path.name.startswith("fragments"):
            path.write_bytes(data[: len(data) // 2])
            deed()

    return _around(writer, "write_and_read_back", half)


def _before_publication(step: int, deed: Callable[..., object]) -> Callable[[], object]:
    from dsbert.checkpoint.publisher import Publisher

    return _around(Publisher, "publish", lambda _self, _from, to, *_: deed() if f"{step:08d}" in to.name else None)


def _before_latest(step: int, deed: Callable[..., object]) -> Callable[[], object]:
    from dsbert.checkpoint import publisher

    def pointer(path: Path, data: bytes) -> None:
        if path.name.startswith(".latest") and f"{step:08d}".encode() in data:
            deed()

    return _around(publisher, "write_durably", pointer)


def _in_update(step: int, deed: Callable[..., object]) -> Callable[[], object]:
    """When the first layers have their new topology, and the others have not."""
    from dsbert.sparse import MaskManager

    calls: list[str] = []

    def third(_masks: Any, name: str, _update: Any, number: int, _second_moment: float) -> None:
        if number == step:
            calls.append(name)
            if len(calls) == 3:
                deed()

    return _around(MaskManager, "_apply", third)


def _in_evaluation(step: int, deed: Callable[..., object]) -> Callable[[], object]:
    from dsbert.engine.train_engine import TrainEngine

    return _around(TrainEngine, "evaluate_batch", lambda engine, *_: deed() if engine.step == step else None)


def _at_start(step: int, deed: Callable[..., object]) -> Callable[[], object]:
    from dsbert.training import run

    return _around(run, "build_model", lambda *_: deed())


def _at_claim(step: int, deed: Callable[..., object]) -> Callable[[], object]:
    from dsbert.training.run_directory import RunDirectory

    return _around(RunDirectory, "open_attempt", lambda *_: deed())


def _at_load(step: int, deed: Callable[..., object]) -> Callable[[], object]:
    from dsbert.training import run

    return _around(run, "load_checkpoint", lambda *_: deed())


_PLACES: dict[str, Callable[[int, Callable[..., object]], Callable[[], object]]] = {
    "start": _at_start,
    "claim": _at_claim,
    "load": _at_load,
    "step": _at_step,
    "from step": _from_step,
    "write": _while_writing,
    "publish": _before_publication,
    "latest": _before_latest,
    "update": _in_update,
    "evaluate": _in_evaluation,
}


def _record_samples(directory: Path) -> Callable[[], object]:
    """Write down which samples every step is trained on, from the batches that the engine gets."""
    from dsbert.data.stream import SampleStream
    from dsbert.engine.train_engine import TrainEngine

    made: dict[int, tuple[Any, list[int]]] = {}  # the batch is kept, so that its id stays its own
    batch, step = SampleStream.batch, TrainEngine.train_step
    began = str(time.time())
    file = directory / f"{began}-{os.environ['RANK']}.jsonl"

    def remember(self: Any, first: int, count: int, *args: Any, **kwargs: Any) -> Any:
        result = batch(self, first, count, *args, **kwargs)
        made[id(result)] = (result, list(range(first, first + count)))
        return result

    def write(self: Any, batches: list[Any], **kwargs: Any) -> Any:
        samples = [sample for one in batches for sample in made.pop(id(one))[1]]
        result = step(self, batches, **kwargs)
        with file.open("a") as lines:
            lines.write(
                json.dumps({"attempt": os.environ["DSBERT_TEST_ATTEMPT"], "step": self.step, "samples": samples}) + "\n"
            )
        return result

    def start() -> None:
        mock.patch.object(SampleStream, "batch", remember).start()
        mock.patch.object(TrainEngine, "train_step", write).start()

    return start
